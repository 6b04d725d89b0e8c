"""Estimate what a report would download, and how much disk and time it would take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from itae_utils.data.datasets import size
from itae_utils.data.huggingface import PREFIX
from itae_utils.data.published import DATASETS, unpacked_folder
from itae_utils.extraction.fitting import SAMPLE
from itae_utils.extraction.neurons import TOP_K
from itae_utils.method.setting import ATTENUATIONS
from itae_utils.models.backbones import stock_model
from itae_utils.models.hub import cached_weights
from itae_utils.models.registry import BACKBONES
from itae_utils.report.plan import Plan, Step

RUN_MB = 5  # page, figures and numbers of one run of a notebook
START = 10  # seconds for imports and figures
MODEL_EFFICIENCY, KMEANS_EFFICIENCY = 0.5, 0.7  # of a matrix product's rate
USUAL_ROUNDS = 5  # of products of all centres, which a start of k-means takes
SCORE = 12_000  # operations per start, image and cluster that k-means takes beside its products: it waits for memory
DRAWS = 1000  # of an interval
HARM_STEPS = 4  # comparisons of edits in notebook 02
TABLE, MATCH = 1.5e-8, 3e-11  # seconds per image in a contingency table, and per cubed class in a match
SPREAD = 3  # the estimate may be wrong by this factor, in either direction


@dataclass(frozen=True)
class Size:
    """Number of weights, width, and tokens per image of a backbone."""

    parameters: int
    dim: int
    tokens: int


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of the model, on its device, and of k-means and k-NN; seconds for intervals."""

    model: float
    kmeans: float
    interval_seconds: float


def dry_run(plan: Plan, unchanged: Collection[str] = ()) -> list[str]:
    """Describe a plan in lines of text, with downloads, disk and time; nothing is run, downloaded or written.

    Args:
        plan: of a report.
        unchanged: folders of the steps that will be reused; they need nothing.
    """
    to_run = tuple(step for step in plan.steps if step.folder not in unchanged)
    count = cache(size)  # reads a folder once
    downloads = _downloads([step for step in to_run if not step.notebook.collects], count)
    missing = [megabytes for _, megabytes, present in downloads if not present]
    unknown = f" and {missing.count(0)} of unknown size" if 0 in missing else ""
    return [
        f"profile {plan.profile}: {len(plan.steps)} run{'s' if len(plan.steps) > 1 else ''} of notebooks",
        *_runs(plan, unchanged),
        "",
        "to download:" if downloads else "nothing to download",
        *(f"  {name:<34} {f'{megabytes:,} MB' if megabytes else 'size unknown':>12}  "
          f"{'present' if present else 'missing'}" for name, megabytes, present in downloads),
        *([f"  missing in all: {sum(missing):,.0f} MB{unknown}"] if downloads else []),
        "",
        _disk(to_run, downloads),
        *(_time(to_run, count) if to_run else ["time: none, nothing has changed"]),
        "",
        "nothing was run or downloaded, no report was written",
    ]


def _runs(plan: Plan, unchanged: Collection[str]) -> list[str]:
    """Return the notebooks, those of one pairing in one line."""
    pairings: dict[str, list[str]] = {}
    for step in plan.steps:
        note = " (unchanged, reused)" if step.folder in unchanged else ""
        pairings.setdefault(step.pairing, []).append(f"{step.notebook.name}{note}")
    return [f"  {pairing + ': ' if pairing else ''}{', '.join(names)}" for pairing, names in pairings.items()]


def _downloads(steps: list[Step], count: Callable[..., tuple]) -> list[tuple[str, int, bool]]:
    """Return name, size in MB (0 if unknown) and presence of all weights and images that come over the network."""
    found = {}
    for step in steps:
        backbone, dataset = step.setting("backbone"), step.setting("dataset")
        names = [backbone] if backbone and not step.setting("checkpoint") else []
        for name in names + _trained_registers(step.notebook.key, step.settings):
            entry = BACKBONES.get(name)
            if not (entry and entry.timm_name is None):
                present = cached_weights(entry.timm_name if entry else name) is not None
                found[f"weights {name}"] = (entry.size_mb if entry else 0, present)
        if folder := unpacked_folder(dataset):
            found[f"images {dataset}"] = (DATASETS[dataset].megabytes, folder.is_dir())
        elif str(dataset).startswith(PREFIX) and count(dataset, step.setting("limit"), **step.chosen)[0] is None:
            found[f"images {dataset}"] = (0, False)
    return [(name, *about) for name, about in found.items()]


def _trained_registers(key: str, settings: Mapping[str, object]) -> list[str]:
    """Return the checkpoint that notebook 05 compares a backbone's own weights with, if there is one."""
    name = f"{settings.get('backbone')}_reg"
    return [name] if key == "05" and name in BACKBONES and not settings.get("checkpoint") else []


def _disk(steps: tuple[Step, ...], downloads: list[tuple[str, int, bool]]) -> str:
    images = sum(megabytes for name, megabytes, present in downloads if not present and name.startswith("images"))
    weights = sum(megabytes for name, megabytes, present in downloads if not present and name.startswith("weights"))
    total = weights + 2 * images + RUN_MB * len(steps)
    amount = f"{total / 1000:,.1f} GB" if total >= 1000 else f"{total:,.0f} MB"
    least = "at least" if any(not megabytes and not present for _, megabytes, present in downloads) else "about"
    return (f"disk: {least} {amount} more (weights; archives and as much again for their contents; {RUN_MB} MB per run "
            "for the report)")


def _time(steps: tuple[Step, ...], count: Callable[..., tuple]) -> list[str]:
    """Estimate the time of all steps, and say from which assumptions."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = {name: matmul_rate(name) for name in {device, "cpu"}}
    size_of, seconds, unknown = cache(backbone_size), 0.0, {}
    for step in steps:
        seconds += START
        settings = step.settings
        if step.notebook.collects or not {"backbone", "dataset"} <= set(settings):
            continue
        images, classes = count(settings["dataset"], settings.get("limit"), **step.chosen)
        fitted = sum(count(settings["dataset"], settings.get("limit"), **part)[0] or 0 for part in step.parts[1:])
        if images is None:  # only the hub knows
            unknown[settings["dataset"]] = None
            continue
        model = size_of(settings["backbone"], settings.get("image_size"))
        needed = work(step.notebook.key, settings, model, images, classes or 10, fitted)
        seconds += needed.model / (MODEL_EFFICIENCY * rates[device])
        seconds += needed.kmeans / (KMEANS_EFFICIENCY * rates[device]) + needed.interval_seconds
    return [
        f"time: about {_duration(seconds)} on this machine's {device}, rough: {_duration(seconds / SPREAD)} to "
        f"{_duration(seconds * SPREAD)}, downloads not counted"
        + (f", nor {', '.join(unknown)}, whose number of images is unknown" if unknown else ""),
        "  estimated from the operations of the model and of k-means, at "
        f"{100 * MODEL_EFFICIENCY:.0f} and {100 * KMEANS_EFFICIENCY:.0f} % of the rate of a matrix product, measured "
        f"now ({', '.join(f'{name} {rate / 1e9:,.0f} GFLOP/s' for name, rate in rates.items())}), from the matches of "
        f"intervals, and {START} s per run for imports and figures",
    ]


def backbone_size(name: str, image_size: int | None) -> Size:
    """Return the size of a backbone, from its structure without weights."""
    entry = BACKBONES.get(name)
    model = stock_model(name)
    side = image_size or (entry.image_size if entry else model.pretrained_cfg["input_size"][-1])
    patches = (side // model.patch_embed.patch_size[0]) ** 2
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Size(parameters, model.embed_dim, patches + model.num_prefix_tokens)


def work(
    key: str, parameters: Mapping[str, object], size: Size, images: int, classes: int, fitted: int = 0
) -> Operations:
    """Return the operations that notebook `key` needs; `fitted` images are those of a split to fit k-means on."""
    def number(name: str, default: int) -> int:
        return int(parameters.get(name) or default)

    fit, k, seeds, comparisons, pairs = min(images, SAMPLE), number("clusters", classes), number("seeds", 1), 0, 0
    if key == "00":
        passes, clusterings = fit + images, 2
    elif key == "01":
        passes, clusterings = fit + min(images, number("sample", 2000)), 0
    elif key == "02":  # the deeper settings run the last blocks by themselves
        columns = len(parameters.get("percents", ())) + 1
        clusterings = len(parameters.get("sources", ())) * columns * (len(parameters.get("attenuations", ())) + 1)
        clusterings, comparisons = clusterings + len(ATTENUATIONS), HARM_STEPS
        passes = fit + 1.6 * images
    elif key == "05":  # plain, start, bias, half of the blocks for late and for zeroed, patches, and other weights
        others = len(_trained_registers(key, parameters))
        clusterings, comparisons = 12 + others, 10 + others  # one row has twice the width
        passes = (5 + len(TOP_K) // 2) * fit + (5 + others) * images + 7 * min(images, number("sample", 512))
        pairs = images**2  # k-NN compares them all
    else:  # the model, and the same with random weights; raw pixels and the variants are clustered
        passes, clusterings, comparisons = fit + 2 * (images + fitted), 6, 5
    one = kmeans_operations(fitted or images, size.dim, k, seeds * number("n_init", 1)) + 2.0 * size.dim * pairs
    intervals = comparisons * DRAWS * 2 * seeds * (TABLE * images + MATCH * k**3)
    return Operations(2.0 * size.parameters * size.tokens * passes, clusterings * one, intervals)


def kmeans_operations(n: int, dim: int, k: int, starts: int) -> float:
    """Return the operations of some starts of k-means: products of centres or pairs of images, and their scores."""
    products = n * min(n / 2, starts * k * (2 + math.log(k) + USUAL_ROUNDS))
    return 2.0 * dim * products + SCORE * starts * n * k


def matmul_rate(device: str, *, side: int = 1024, seconds: float = 0.3) -> float:
    """Measure the floating-point operations per second of a float32 matrix product on `device`."""
    matrix = torch.ones(side, side, device=device)

    def product() -> None:
        (matrix @ matrix)[0, 0].item()  # waits for the device

    product()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        product()
        count += 1
    return 2 * side**3 * count / (time.perf_counter() - start)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
