"""Whole runs: from files to features, k-means' share, how cost grows, and a second run that finds the first's store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from benchmarks.contenders import SIZES, make_variants, make_workload
from benchmarks.timing import Conditions, interleaved
from itae_utils.analysis.kmeans import cluster_seeds
from itae_utils.data.datasets import load_dataset
from itae_utils.extraction.batches import image_batches
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.observation import fit_thresholds
from itae_utils.method.artifacts import qkv_norms
from itae_utils.method.one_pass import OnePass
from itae_utils.method.setting import ITAE
from itae_utils.models.backbones import load_backbone

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    from benchmarks.contenders import Workload
    from itae_utils.models.backbones import Backbone

PICTURE = (500, 375)  # what an ImageNet photo measures
BATCHES = {"cpu": 8, "cuda": 64}  # of files: seconds of work, beside which starting worker processes is little
PICTURES = 256  # different ones; further files are links to them
FEW_IMAGES, FEW_VARIANTS, SMALL, LARGE = 179, 5, 70, 224  # ten times as many digits are almost all; 25 and 256 patches
SEEDS = N_INIT = 10  # of notebook 03, on
DIGITS = None  # all of them


def measure_files(size: str, how: Conditions) -> dict[str, object]:
    """From JPEG files to features of two variants, against the bare forward pass on tensors that lie ready."""
    with _photos(size, how) as (backbone, dataset, batch):
        ready = [images.to(how.device) for images, _ in image_batches(dataset, backbone.transform, batch_size=batch)]
        variants = _variants(backbone, ready[0])

        def bare() -> None:
            with how.running():
                for images in ready:
                    backbone.model.forward_features(images)

        calls = {"bare forward": bare, "from files": lambda: _extract(backbone, dataset, variants, batch_size=batch)}
        for call in calls.values():
            call()
        seconds = interleaved(calls, how)
    return {"images": len(dataset), "batch": batch, "pixels": PICTURE, "seconds": seconds}


def measure_store(size: str, how: Conditions) -> dict[str, object]:
    """The same extraction twice with one store, the second time from what the first left."""
    seconds = {"cold": [], "warm": []}
    with _photos(size, how) as (backbone, dataset, batch):
        images, _ = next(image_batches(dataset, backbone.transform, batch_size=batch))
        variants = _variants(backbone, images.to(how.device))
        _extract(backbone, dataset, variants, batch_size=batch)
        for repeat in range(how.repeats):
            how.say(f"repeat {repeat + 1} of {how.repeats}")
            with TemporaryDirectory() as store:
                run = partial(_extract, backbone, dataset, variants, batch_size=batch, store=store)
                for runs in seconds.values():
                    runs.append(how.seconds(run))
    return {"images": len(dataset), "batch": batch, "seconds": seconds}


def measure_kmeans(_size: str, how: Conditions) -> dict[str, object]:
    """Notebook 03's work on the embedded bench: θ and features of four variants, and k-means on them."""
    backbone = load_backbone("demo", device=how.device, precision=how.precision)
    dataset = load_dataset("digits", limit=DIGITS)
    found: dict[str, np.ndarray] = {}

    def extract() -> None:
        fits = fit_thresholds(backbone, dataset)
        variants = {"baseline": None, "itae": ITAE(), "random control": ITAE(select="random"),
                    "oracle": ITAE(select="oracle")}
        found.update(_extract(backbone, dataset, variants, thresholds=fits))

    def kmeans() -> None:
        for features in found.values():
            cluster_seeds(features, len(dataset.classes), seeds=SEEDS, n_init=N_INIT)

    extract()
    seconds = interleaved({"features": extract, "k-means": kmeans}, how)
    return {"images": len(dataset), "variants": len(found), "seeds": SEEDS, "n_init": N_INIT, "seconds": seconds}


def measure_scaling(size: str, how: Conditions) -> dict[str, object]:
    """Seconds for a little and for ten times as much: images (the demo on digits), variants, tokens (one batch)."""
    demo, work = load_backbone("demo", device=how.device, precision=how.precision), make_workload(size, how)
    two = {"baseline": None, "itae": ITAE("key", 1.0)}
    calls, counts = {}, {"images": [], "variants": [], "tokens": []}

    def add(what: str, count: int, call: Callable[[], object]) -> None:
        calls[f"{count} {what}"] = call
        counts[what].append(count)
        call()

    for times in (1, 10):
        digits = load_dataset("digits", limit=times * FEW_IMAGES)
        add("images", len(digits), lambda digits=digits: _extract(demo, digits, two))
        add("variants", times * FEW_VARIANTS, _one_pass(work, times * FEW_VARIANTS, how))
    for side in (SMALL, LARGE):
        other = replace(work, images=torch.randn(len(work.images), 3, side, side).to(how.device))
        tokens = (side // work.model.patch_embed.patch_size[0]) ** 2 + 1
        add("tokens", tokens, _one_pass(other, FEW_VARIANTS, how))
    return {"batch": len(work.images), "counts": counts, "seconds": interleaved(calls, how)}


@contextmanager
def _photos(size: str, how: Conditions) -> Iterator[tuple[Backbone, Dataset, int]]:
    """A backbone of that size with random weights, a folder of JPEG files as a data set, and the batch size."""
    entry, rng = SIZES[size], np.random.default_rng(0)
    batch = how.batch or entry.batches[how.kind]
    backbone = load_backbone(entry.backbone, pretrained=False, device=how.device, precision=how.precision)
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number:05}.jpg" for number in range(BATCHES[how.kind] * batch)]
        for number, path in enumerate(paths):
            if number >= PICTURES:
                path.hardlink_to(paths[number % PICTURES])
                continue
            # smooth with a little grain, so that they decode as photos do
            rough = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize(PICTURE, Image.BICUBIC)
            picture = np.asarray(rough) + rng.integers(-8, 8, (*PICTURE[::-1], 3))
            Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(path, quality=90)
        yield backbone, load_dataset(f"imagefolder:{folder}"), batch


def _variants(backbone: Backbone, images: Tensor) -> dict[str, ITAE | None]:
    with torch.inference_mode():
        threshold = float(qkv_norms(backbone.model, images)["key"].quantile(0.05))
    return {"baseline": None, "itae": ITAE("key", threshold)}


def _extract(backbone: Backbone, dataset: Dataset, variants: Mapping[str, ITAE | None], *, store: str | None = None,
             **options: object) -> dict[str, np.ndarray]:
    """All features, read; kept nowhere unless a store is named."""
    features = extract_features(backbone, dataset, variants, store=store, **options)
    return {name: np.asarray(features[name]) for name in features}


def _one_pass(work: Workload, count: int, how: Conditions) -> Callable[[], object]:
    extraction = OnePass(work.model, make_variants(work, count, how))

    def call() -> object:
        with how.running():
            return extraction(work.images, 0)

    return call
