"""What a report would download, how much disk and time it would take: rough, said with how it was reckoned."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from itae_utils.data.datasets import DATASETS, image_count, unpacked_folder
from itae_utils.extraction.observation import SAMPLE
from itae_utils.models import demo
from itae_utils.models.backbones import stock_model
from itae_utils.models.hub import cached_weights
from itae_utils.models.registry import BACKBONES
from itae_utils.report.plan import Plan, Step

RUN_MB = 5  # what one run of a notebook leaves: its page, figures and numbers
START = 8  # seconds until a kernel has imported everything
MODEL_EFFICIENCY, KMEANS_EFFICIENCY = 0.5, 0.2  # of a matrix product's rate; measured on a CPU: 0.7, and 0.06 to 0.3
ITERATIONS = 30  # of a start of k-means
SPREAD = 3  # the estimate's factor of error, either way


@dataclass(frozen=True)
class Size:
    """What decides how long a backbone takes: weights, width, and tokens of an image."""

    parameters: int
    dim: int
    tokens: int


@dataclass(frozen=True)
class Work:
    """Floating-point operations: of the model, on its device, and of k-means, on the CPU."""

    model: float
    kmeans: float


def dry_run(plan: Plan, kept: Collection[str] = ()) -> list[str]:
    """The plan in lines of text, with downloads, disk and time; nothing is run or downloaded, no report is written.

    Args:
        plan: of a report.
        kept: folders of the steps that will not be run again; they need nothing.
    """
    to_run = tuple(step for step in plan.steps if step.folder not in kept)
    downloads = _downloads([step for step in to_run if not step.notebook.collects])
    missing = sum(megabytes for _, megabytes, there in downloads if not there)
    return [
        f"profile {plan.profile}: {len(plan.steps)} run{'s' if len(plan.steps) > 1 else ''} of notebooks",
        *_runs(plan, kept),
        "",
        "to download:" if downloads else "nothing to download",
        *(f"  {name:<34} {f'{megabytes:,} MB' if megabytes else 'size unknown':>12}  "
          f"{'already there' if there else 'not there yet'}" for name, megabytes, there in downloads),
        *[f"  still to come: {missing:,.0f} MB"] * bool(downloads),
        "",
        _disk(to_run, downloads),
        *(_time(to_run) if to_run else ["time: none, all is unchanged"]),
        "",
        "nothing was run or downloaded, no report written",
    ]


def _runs(plan: Plan, kept: Collection[str]) -> list[str]:
    """The notebooks, those of equal cells together."""
    cells: dict[str, list[str]] = {}
    for step in plan.steps:
        unchanged = " (unchanged, kept)" if step.folder in kept else ""
        cells.setdefault(step.cell, []).append(f"{step.notebook.name}{unchanged}")
    return [f"  {cell + ': ' if cell else ''}{', '.join(names)}" for cell, names in cells.items()]


def _downloads(steps: list[Step]) -> list[tuple[str, int, bool]]:
    """Name, size in MB (0 where unknown) and whether it is there, of all that may have to come over the network."""
    found = {}
    for parameters in (step.parameters for step in steps):
        backbone, dataset = parameters.get("backbone"), parameters.get("dataset")
        entry = BACKBONES.get(backbone)
        if backbone and not parameters.get("checkpoint") and not (entry and entry.timm_name is None):
            name = entry.timm_name if entry else backbone
            found[f"weights {backbone}"] = (entry.size_mb if entry else 0, cached_weights(name) is not None)
        if folder := unpacked_folder(dataset):
            found[f"images {dataset}"] = (DATASETS[dataset].megabytes, folder.is_dir())
    return [(name, *about) for name, about in found.items()]


def _disk(steps: tuple[Step, ...], downloads: list[tuple[str, int, bool]]) -> str:
    images = sum(megabytes for name, megabytes, there in downloads if not there and name.startswith("images"))
    weights = sum(megabytes for name, megabytes, there in downloads if not there and name.startswith("weights"))
    total = weights + 2 * images + RUN_MB * len(steps)
    amount = f"{total / 1000:,.1f} GB" if total >= 1000 else f"{total:,.0f} MB"
    return (f"disk: about {amount} more (weights; archives, which stay, and as much again unpacked; "
            f"{RUN_MB} MB a run for the report)")


def _time(steps: tuple[Step, ...]) -> list[str]:
    """The time of all steps, with what it was reckoned from."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = {name: matmul_rate(name) for name in {device, "cpu"}}
    sizes: dict[tuple, Size] = {}
    seconds = 0.0
    count = cache(lambda dataset, limit: image_count({"dataset": dataset, "limit": limit}))  # a folder is read once
    for step in steps:
        seconds += START
        parameters = step.parameters
        if step.notebook.collects or not {"backbone", "dataset"} <= set(parameters):
            continue
        images = count(parameters["dataset"], parameters.get("limit"))
        key = (parameters["backbone"], parameters.get("image_size"))
        sizes[key] = sizes.get(key) or backbone_size(*key)
        needed = work(step.notebook.key, parameters, sizes[key], images)
        seconds += needed.model / (MODEL_EFFICIENCY * rates[device])
        seconds += needed.kmeans / (KMEANS_EFFICIENCY * rates["cpu"])
    return [
        f"time: about {_duration(seconds)} on this machine's {device}, rough: {_duration(seconds / SPREAD)} to "
        f"{_duration(seconds * SPREAD)}, downloads not counted",
        f"  reckoned from 2 × parameters × tokens operations an image, 2 × images × width × clusters × {ITERATIONS} a "
        f"start of k-means, at {100 * MODEL_EFFICIENCY:.0f} and {100 * KMEANS_EFFICIENCY:.0f} % of the rate of a "
        "matrix product measured just now "
        f"({', '.join(f'{name} {rate / 1e9:,.0f} GFLOP/s' for name, rate in rates.items())}), {START} s a run to start",
    ]


def backbone_size(name: str, image_size: int | None) -> Size:
    """The size of a backbone, from its structure without weights."""
    entry = BACKBONES.get(name)
    model = demo.build_model() if entry and entry.timm_name is None else stock_model(name)
    side = image_size or (entry.image_size if entry else model.pretrained_cfg["input_size"][-1])
    patches = (side // model.patch_embed.patch_size[0]) ** 2
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Size(parameters, model.embed_dim, patches + model.num_prefix_tokens)


def work(key: str, parameters: Mapping[str, object], size: Size, images: int) -> Work:
    """The operations that notebook `key` needs."""
    def number(name: str, default: int) -> int:
        return int(parameters.get(name) or default)

    fit = min(images, SAMPLE)
    starts = number("seeds", 1) * number("n_init", 1)
    if key == "01":
        passes, clusterings = fit + min(images, number("sample", 2000)), 0
    elif key == "02":  # the deeper settings cost their own way through the last blocks
        columns = len(parameters.get("percents", ())) + 1
        settings = len(parameters.get("sources", ())) * columns * (len(parameters.get("attenuations", ())) + 1)
        passes, clusterings = fit + 1.6 * images, settings * starts
    else:  # the model, and the same with random weights; raw pixels and the variants are clustered
        passes, clusterings = fit + 2 * images, 6 * starts
    known = DATASETS.get(str(parameters["dataset"]))
    classes = number("clusters", (known and known.classes) or 10)
    return Work(2.0 * size.parameters * size.tokens * passes,
                2.0 * images * size.dim * classes * ITERATIONS * clusterings)


def matmul_rate(device: str, *, side: int = 1024, seconds: float = 0.3) -> float:
    """Floating-point operations a second of a float32 matrix product on `device`, measured."""
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
