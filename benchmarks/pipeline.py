"""Time the whole pipeline: files to features, scaling, and a run from a warm store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.contenders import SIZES, Workload, make_variants, make_workload
from benchmarks.timing import Conditions, interleaved
from itae_utils.data.datasets import load_dataset
from itae_utils.extraction.batches import image_batches
from itae_utils.extraction.features import extract_features
from itae_utils.method.one_pass import OnePass
from itae_utils.method.setting import ITAE
from itae_utils.method.statistics import qkv_norms
from itae_utils.models.backbones import Backbone, load_backbone

PICTURE = (500, 375)  # pixels of a typical ImageNet photo
BATCHES = {"cpu": 8, "cuda": 64}  # batches of files: seconds of work, so that starting worker processes hardly counts
PICTURES = 256  # different files; all others are links to them
FEW_IMAGES, FEW_VARIANTS = 179, 5  # the small run; the large one has ten times as many, almost all digits
SMALL, LARGE = 70, 224  # image sizes with 25 and 256 patches


def measure_files(size: str, conditions: Conditions) -> dict[str, object]:
    """Time JPEG files to features of two variants, and the bare forward pass on tensors already on the device."""
    with _photos(size, conditions) as (backbone, dataset, batch):
        ready = [images.to(conditions.device)
                 for images, _ in image_batches(dataset, backbone.transform, batch_size=batch)]
        variants = _variants(backbone, ready[0])

        def bare() -> None:
            with conditions.running():
                for images in ready:
                    backbone.model.forward_features(images)

        calls = {"bare forward": bare, "from files": lambda: _extract(backbone, dataset, variants, batch_size=batch)}
        for call in calls.values():
            call()
        seconds = interleaved(calls, conditions)
    return {"images": len(dataset), "batch": batch, "pixels": PICTURE, "seconds": seconds}


def measure_store(size: str, conditions: Conditions) -> dict[str, object]:
    """Time the same extraction with an empty store, and again with the store that it filled."""
    seconds = {"cold": [], "warm": []}
    with _photos(size, conditions) as (backbone, dataset, batch):
        images, _ = next(image_batches(dataset, backbone.transform, batch_size=batch))
        variants = _variants(backbone, images.to(conditions.device))
        _extract(backbone, dataset, variants, batch_size=batch)
        for repeat in range(conditions.repeats):
            conditions.log(f"repeat {repeat + 1} of {conditions.repeats}")
            with TemporaryDirectory() as store:
                run = partial(_extract, backbone, dataset, variants, batch_size=batch, store=store)
                for runs in seconds.values():
                    runs.append(conditions.seconds(run))
    return {"images": len(dataset), "batch": batch, "seconds": seconds}


def measure_scaling(size: str, conditions: Conditions) -> dict[str, object]:
    """Time a small run and one ten times as large: images (the demo on digits), variants, tokens (one batch)."""
    demo = load_backbone("demo", device=conditions.device, precision=conditions.precision)
    work = make_workload(size, conditions)
    two = {"baseline": None, "itae": ITAE("key", 1.0)}
    calls, counts = {}, {"images": [], "variants": [], "tokens": []}

    def add(what: str, count: int, call: Callable[[], object]) -> None:
        calls[f"{count} {what}"] = call
        counts[what].append(count)
        call()

    for times in (1, 10):
        digits = load_dataset("digits", limit=times * FEW_IMAGES)
        add("images", len(digits), lambda digits=digits: _extract(demo, digits, two))
        add("variants", times * FEW_VARIANTS, _one_pass(work, times * FEW_VARIANTS, conditions))
    for side in (SMALL, LARGE):
        other = replace(work, images=torch.randn(len(work.images), 3, side, side).to(conditions.device))
        tokens = (side // work.model.patch_embed.patch_size[0]) ** 2 + 1
        add("tokens", tokens, _one_pass(other, FEW_VARIANTS, conditions))
    return {"batch": len(work.images), "counts": counts, "seconds": interleaved(calls, conditions)}


@contextmanager
def _photos(size: str, conditions: Conditions) -> Iterator[tuple[Backbone, Dataset, int]]:
    """Yield a backbone of that size with random weights, a temporary folder of JPEG files, and the batch size."""
    entry, rng = SIZES[size], np.random.default_rng(0)
    batch = conditions.batch or entry.batches[conditions.kind]
    backbone = load_backbone(
        entry.backbone, pretrained=False, device=conditions.device, precision=conditions.precision)
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number:05}.jpg" for number in range(BATCHES[conditions.kind] * batch)]
        for number, path in enumerate(paths):
            if number >= PICTURES:
                path.hardlink_to(paths[number % PICTURES])
                continue
            # smooth with a little grain, so that decoding takes as long as for photos
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
    """Extract all features and read them into memory; they are stored only if `store` is given."""
    features = extract_features(backbone, dataset, variants, store=store, **options)
    return {name: np.asarray(features[name]) for name in features}


def _one_pass(work: Workload, count: int, conditions: Conditions) -> Callable[[], object]:
    extraction = OnePass(work.model, make_variants(work, count, conditions))

    def call() -> object:
        with conditions.running():
            return extraction(work.images, 0)

    return call
