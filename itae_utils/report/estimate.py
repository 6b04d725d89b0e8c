"""Estimate what a report would download, and how much disk and time it would take."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from itae_utils.data.datasets import DATASETS, image_count, unpacked_folder
from itae_utils.extraction.observation import SAMPLE
from itae_utils.models.backbones import stock_model
from itae_utils.models.hub import cached_weights
from itae_utils.models.registry import BACKBONES
from itae_utils.report.plan import Plan, Step

RUN_MB = 5  # page, figures and numbers of one run of a notebook
START = 8  # seconds that a kernel takes to import everything
MODEL_EFFICIENCY, KMEANS_EFFICIENCY = 0.5, 0.2  # of a matrix product's rate; measured on a CPU: 0.7, and 0.06 to 0.3
ITERATIONS = 30  # per start of k-means
SPREAD = 3  # the estimate may be wrong by this factor, in either direction


@dataclass(frozen=True)
class Size:
    """Number of weights, width, and tokens per image of a backbone."""

    parameters: int
    dim: int
    tokens: int


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of the model, on its device, and of k-means, on the CPU."""

    model: float
    kmeans: float


def dry_run(plan: Plan, unchanged: Collection[str] = ()) -> list[str]:
    """Describe a plan in lines of text, with downloads, disk and time; nothing is run, downloaded or written.

    Args:
        plan: of a report.
        unchanged: folders of the steps that will be reused; they need nothing.
    """
    to_run = tuple(step for step in plan.steps if step.folder not in unchanged)
    downloads = _downloads([step for step in to_run if not step.notebook.collects])
    missing = [megabytes for _, megabytes, present in downloads if not present]
    unknown = " and a file of unknown size" if 0 in missing else ""
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
        *(_time(to_run) if to_run else ["time: none, nothing has changed"]),
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


def _downloads(steps: list[Step]) -> list[tuple[str, int, bool]]:
    """Return name, size in MB (0 if unknown) and presence of all weights and images that come over the network."""
    found = {}
    for settings in (step.settings for step in steps):
        backbone, dataset = settings.get("backbone"), settings.get("dataset")
        entry = BACKBONES.get(backbone)
        if backbone and not settings.get("checkpoint") and not (entry and entry.timm_name is None):
            name = entry.timm_name if entry else backbone
            found[f"weights {backbone}"] = (entry.size_mb if entry else 0, cached_weights(name) is not None)
        if folder := unpacked_folder(dataset):
            found[f"images {dataset}"] = (DATASETS[dataset].megabytes, folder.is_dir())
    return [(name, *about) for name, about in found.items()]


def _disk(steps: tuple[Step, ...], downloads: list[tuple[str, int, bool]]) -> str:
    images = sum(megabytes for name, megabytes, present in downloads if not present and name.startswith("images"))
    weights = sum(megabytes for name, megabytes, present in downloads if not present and name.startswith("weights"))
    total = weights + 2 * images + RUN_MB * len(steps)
    amount = f"{total / 1000:,.1f} GB" if total >= 1000 else f"{total:,.0f} MB"
    return (f"disk: about {amount} more (weights; archives and as much again for their contents; {RUN_MB} MB per run "
            "for the report)")


def _time(steps: tuple[Step, ...]) -> list[str]:
    """Estimate the time of all steps, and say from which assumptions."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = {name: matmul_rate(name) for name in {device, "cpu"}}
    sizes: dict[tuple, Size] = {}
    seconds = 0.0
    count = cache(image_count)  # a folder is read once
    for step in steps:
        seconds += START
        settings = step.settings
        if step.notebook.collects or not {"backbone", "dataset"} <= set(settings):
            continue
        images = count(settings["dataset"], settings.get("limit"))
        key = (settings["backbone"], settings.get("image_size"))
        sizes[key] = sizes.get(key) or backbone_size(*key)
        needed = work(step.notebook.key, settings, sizes[key], images)
        seconds += needed.model / (MODEL_EFFICIENCY * rates[device])
        seconds += needed.kmeans / (KMEANS_EFFICIENCY * rates["cpu"])
    return [
        f"time: about {_duration(seconds)} on this machine's {device}, rough: {_duration(seconds / SPREAD)} to "
        f"{_duration(seconds * SPREAD)}, downloads not counted",
        "  estimated from 2 × parameters × tokens operations per image and 2 × images × width × clusters × "
        f"{ITERATIONS} per start of k-means, at {100 * MODEL_EFFICIENCY:.0f} and {100 * KMEANS_EFFICIENCY:.0f} % of "
        "the rate of a matrix product, measured now "
        f"({', '.join(f'{name} {rate / 1e9:,.0f} GFLOP/s' for name, rate in rates.items())}), and {START} s to start "
        "each run",
    ]


def backbone_size(name: str, image_size: int | None) -> Size:
    """Return the size of a backbone, from its structure without weights."""
    entry = BACKBONES.get(name)
    model = stock_model(name)
    side = image_size or (entry.image_size if entry else model.pretrained_cfg["input_size"][-1])
    patches = (side // model.patch_embed.patch_size[0]) ** 2
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Size(parameters, model.embed_dim, patches + model.num_prefix_tokens)


def work(key: str, parameters: Mapping[str, object], size: Size, images: int) -> Operations:
    """Return the operations that notebook `key` needs."""
    def number(name: str, default: int) -> int:
        return int(parameters.get(name) or default)

    fit = min(images, SAMPLE)
    starts = number("seeds", 1) * number("n_init", 1)
    if key == "01":
        passes, clusterings = fit + min(images, number("sample", 2000)), 0
    elif key == "02":  # the deeper settings run the last blocks by themselves
        columns = len(parameters.get("percents", ())) + 1
        settings = len(parameters.get("sources", ())) * columns * (len(parameters.get("attenuations", ())) + 1)
        passes, clusterings = fit + 1.6 * images, settings * starts
    else:  # the model, and the same with random weights; raw pixels and the variants are clustered
        passes, clusterings = fit + 2 * images, 6 * starts
    known = DATASETS.get(str(parameters["dataset"]))
    classes = number("clusters", (known and known.classes) or 10)
    return Operations(2.0 * size.parameters * size.tokens * passes,
                2.0 * images * size.dim * classes * ITERATIONS * clusterings)


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
