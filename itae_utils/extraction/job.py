"""The work of an extraction: which shards of which variants are missing, and one pass over the images that need it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from itae_utils.errors import ItaeError
from itae_utils.extraction.batches import is_out_of_memory, model_batches
from itae_utils.method.one_pass import OnePass
from itae_utils.method.setting import ITAE
from itae_utils.models.backbones import Backbone
from itae_utils.store.variants import KeptVariant

SHARD_IMAGES = 2000
SHARD_SECONDS = 120  # what a killed run may lose on a slow machine: then fewer images make a shard …
CPU_RATE = 1e11      # … reckoned at this many operations a second, so that every run cuts the same shards

Work = dict[int, list[str]]  # variants by shard


def shard_size(backbone: Backbone, batch_size: int) -> int:
    """Images a shard, a multiple of the batch: 2,000, on a CPU no more than some two minutes of work, but one batch."""
    images = SHARD_IMAGES
    if backbone.device.type == "cpu":
        rows, columns = backbone.patch_grid
        tokens = rows * columns + backbone.model.num_prefix_tokens
        parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
        images = min(images, int(SHARD_SECONDS * CPU_RATE / (2 * parameters * tokens)))
    return max(1, round(images / batch_size)) * batch_size


def missing_work(kept: Mapping[str, KeptVariant]) -> Work:
    """Which variants lack which shards, in the order of the shards."""
    work: Work = {}
    for name, variant in kept.items():
        for shard in variant.missing():
            work.setdefault(shard, []).append(name)
    return dict(sorted(work.items()))


@dataclass(frozen=True)
class Job:
    """An extraction: of what, and where to.

    Attributes:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`.
        kept: where each variant goes; prepared.
        settings: the variants, with numeric thresholds.
        batch_size: images at a time; shards are multiples of it, so any part of the work cuts its batches alike.
        num_workers: processes that decode images.
    """

    backbone: Backbone
    dataset: Dataset
    kept: Mapping[str, KeptVariant]
    settings: Mapping[str, ITAE | None]
    batch_size: int
    num_workers: int | Literal["auto"] = 0

    def of(self, work: Work) -> Job:
        """The same for the variants in `work` alone."""
        names = dict.fromkeys(name for names in work.values() for name in names)
        return replace(self, kept={name: self.kept[name] for name in names},
                       settings={name: self.settings[name] for name in names})

    def rows(self, shard: int) -> slice:
        """The images of a shard, by their numbers in the data set."""
        return next(iter(self.kept.values())).rows(shard)

    def images(self, work: Work) -> int:
        """How many images some work has."""
        return sum(rows.stop - rows.start for rows in map(self.rows, work))


def compute(job: Job, work: Work, advance: Callable[[int], None] = lambda images: None) -> None:
    """Compute the shards in `work` in one pass over their images, and keep each as soon as it is whole.

    Args:
        job: what is extracted.
        work: from `missing_work`, or a part of it.
        advance: is told the number of images after each batch.

    Raises:
        ItaeError: features that are not finite, a store that can't be written, a batch that doesn't fit the memory.
    """
    backbone, indices = job.backbone, np.concatenate([np.r_[job.rows(shard)] for shard in work])
    batches = model_batches(backbone, job.dataset, batch_size=job.batch_size, num_workers=job.num_workers,
                            indices=indices)
    with torch.inference_mode(), backbone.autocast():
        try:
            for shard, names in work.items():
                one_pass = OnePass(backbone.model, {name: job.settings[name] for name in names}, backbone.truth)
                features, counts = _shard(one_pass, names, batches, job.rows(shard), backbone.dim, advance)
                for place, name in enumerate(names):
                    job.kept[name].save(shard, features[place], counts[place])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ItaeError(f"batch_size={job.batch_size} doesn't fit the memory of {backbone.device}: use a smaller "
                            "one, or 'auto'") from error


def _shard(one_pass: OnePass, names: Sequence[str], batches: Iterator[Tensor], rows: slice, dim: int,
           advance: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """Features (variants, m, dim) and artifact counts (variants, m) of the images of one shard."""
    features = np.empty((len(names), rows.stop - rows.start, dim), dtype=np.float32)
    counts = np.empty(features.shape[:2], dtype=np.int64)
    waiting: list[tuple[int, Tensor, Tensor]] = []  # fetched when the device has the next batch to work on

    def fetch() -> None:
        first, outputs, found = waiting.pop(0)
        place = slice(first - rows.start, first - rows.start + outputs.shape[1])
        features[:, place], counts[:, place] = outputs.cpu().numpy(), found.cpu().numpy()
        _check_finite(features[:, place], names, first)
        advance(outputs.shape[1])

    first = rows.start
    while first < rows.stop:
        images = next(batches)
        results = one_pass(images, first).values()
        waiting.append((first, torch.stack([output.float() for output, _ in results]),
                        torch.stack([artifacts.sum(dim=-1) for _, artifacts in results])))
        first += len(images)
        if len(waiting) > 1:
            fetch()
    fetch()
    return features, counts


def _check_finite(features: np.ndarray, names: Sequence[str], first: int) -> None:
    for name, values in zip(names, features, strict=True):
        if not np.isfinite(values).all():
            raise ItaeError(f"features of {name!r} are not finite in the batch of images {first} to "
                            f"{first + len(values) - 1}: try precision='fp32', or look at these images and the weights")
