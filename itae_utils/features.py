"""`[CLS]` features of a data set under any number of variants."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from itae_utils.attention import ITAE, check_blocks
from itae_utils.errors import ItaeError
from itae_utils.one_pass import OnePass
from itae_utils.thresholds import fit_thresholds

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    from itae_utils.backbones import Backbone
    from itae_utils.thresholds import Thresholds


@dataclass(frozen=True)
class Features(Mapping):
    """`[CLS]` features by variant name, and what they were made with.

    Attributes:
        arrays: (n, dim) float32 by variant.
        targets: (n,) labels, or None.
        thresholds: θ of each block a variant touches, in block order; None where nothing was found.
        artifact_counts: patches attenuated in the last block, by variant, (n,).
        left_alone: images without a normal patch, which "mean" leaves as they are, by variant.
        settings: backbone, device, precision, batch size.
        fit_seconds: time for fitting thresholds.
        seconds: time of the pass.
    """

    arrays: dict[str, np.ndarray] = field(repr=False)
    targets: np.ndarray | None = field(repr=False)
    thresholds: dict[str, tuple[float | None, ...]]
    artifact_counts: dict[str, np.ndarray] = field(repr=False)
    left_alone: dict[str, int]
    settings: dict[str, object]
    fit_seconds: float
    seconds: float

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


def extract_features(
    backbone: Backbone,
    dataset: Dataset,
    variants: Mapping[str, ITAE | None],
    *,
    thresholds: Thresholds | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Features:
    """The `[CLS]` output of every image under every variant, in one pass over the images, in the data set's order.

    Args:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`, or any torch data set of (PIL image, label).
        variants: `ITAE` settings by name; None is the model as it is.
        thresholds: fits to take "auto" from; made here where they are needed and not given.
        batch_size: images at a time. It can change the last bits of the features.
        num_workers: processes that decode and preprocess images; 0 for none.

    Raises:
        ItaeError: bad variants, an oracle without ground truth, features that are not finite.
    """
    import torch

    if not variants:
        raise ItaeError("no variants were given: name at least one, as in {'baseline': None}")
    needs_fit = any(itae is not None and itae.threshold == "auto" and itae.select != "oracle"
                    for itae in variants.values())
    fit_seconds = 0.0
    if needs_fit and thresholds is None:
        thresholds = fit_thresholds(backbone, dataset)
        fit_seconds = thresholds.seconds
    settings = {name: _resolved(backbone, name, itae, thresholds) for name, itae in variants.items()}

    start, extraction = time.perf_counter(), OnePass(backbone.model, settings, backbone.truth)
    count = len(dataset)
    arrays = {name: np.empty((count, backbone.dim), dtype=np.float32) for name in settings}
    artifact_counts = {name: np.zeros(count, dtype=np.int64) for name in settings}
    left_alone = dict.fromkeys(settings, 0)
    with torch.inference_mode(), backbone.autocast():
        for first, images in _batches(backbone, dataset, batch_size, num_workers):
            rows = slice(first, first + len(images))
            for name, (cls_output, artifacts) in extraction(images, first).items():
                values = cls_output.float().cpu().numpy()
                if not np.isfinite(values).all():
                    raise ItaeError(f"features of {name!r} are not finite in the batch of images {rows.start} to "
                                    f"{rows.stop - 1}: try precision='fp32', or look at these images and the weights")
                arrays[name][rows] = values
                artifact_counts[name][rows] = artifacts.sum(dim=-1).cpu().numpy()
                if settings[name] is not None and settings[name].attenuation == "mean":
                    left_alone[name] += int(artifacts.all(dim=-1).sum())
    return Features(
        arrays=arrays,
        targets=getattr(dataset, "targets", None),
        thresholds={name: () if itae is None or itae.select == "oracle" else itae.thresholds
                    for name, itae in settings.items()},
        artifact_counts=artifact_counts,
        left_alone=left_alone,
        settings={"backbone": backbone.name, "device": str(backbone.device), "precision": backbone.precision,
                  "batch_size": batch_size},
        fit_seconds=fit_seconds,
        seconds=time.perf_counter() - start,
    )


def _batches(backbone: Backbone, dataset: Dataset, batch_size: int, num_workers: int) -> Iterator[tuple[int, Tensor]]:
    from tqdm.auto import tqdm

    from itae_utils.batches import image_batches

    hidden = os.environ.get("ITAE_PROGRESS") == "0" or None  # None: shown on a terminal only
    with tqdm(total=len(dataset), unit="image", desc="features", disable=hidden, leave=False) as progress:
        first = 0
        for images, _ in image_batches(dataset, backbone.transform, batch_size=batch_size, num_workers=num_workers):
            yield first, images.to(backbone.device)
            first += len(images)
            progress.update(len(images))


def _resolved(backbone: Backbone, name: str, itae: ITAE | None, thresholds: Thresholds | None) -> ITAE | None:
    """The variant with numbers for "auto", checked against the backbone."""
    if itae is None:
        return None
    if itae.select == "oracle" and backbone.truth is None:
        raise ItaeError(f"variant {name!r} has select='oracle', but {backbone.name} has no ground truth: 'demo' has")
    check_blocks(backbone.model, itae, backbone.truth)
    if itae.threshold == "auto" and itae.select != "oracle":
        numbers = tuple(thresholds[block, itae.source].threshold for block in range(-itae.blocks, 0))
        itae = replace(itae, threshold=numbers)
    return itae
