"""The work of an extraction: the missing shards of each variant, and one pass over the images that need it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from itae_utils.errors import ItaeError
from itae_utils.extraction.batches import memory_errors, model_batches, one_ahead
from itae_utils.method.one_pass import OnePass
from itae_utils.method.register_setting import Variant
from itae_utils.models.backbones import Backbone
from itae_utils.store.variants import StoredVariant

SHARD_IMAGES = 2000
SHARD_SECONDS = 120  # the most work that a killed run loses on a CPU, at …
CPU_RATE = 1e11      # … this many operations per second: a constant, so that shards are the same in all runs

Work = dict[int, list[str]]  # names of variants by shard


def shard_size(backbone: Backbone, batch_size: int) -> int:
    """Return the number of images per shard, a multiple of the batch size.

    It is near 2,000. On a CPU it is smaller if a shard would take more than about two minutes, but at least one batch.
    """
    images = SHARD_IMAGES
    if backbone.device.type == "cpu":
        tokens = math.prod(backbone.patch_grid) + backbone.model.num_prefix_tokens
        parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
        images = min(images, int(SHARD_SECONDS * CPU_RATE / (2 * parameters * tokens)))
    return max(1, round(images / batch_size)) * batch_size


def missing_work(stored: Mapping[str, StoredVariant]) -> Work:
    """Return the names of the variants that lack each shard, in the order of the shards."""
    work: Work = {}
    for name, variant in stored.items():
        for shard in variant.missing():
            work.setdefault(shard, []).append(name)
    return dict(sorted(work.items()))


@dataclass(frozen=True)
class Job:
    """An extraction: its inputs, and the prepared places of its features."""

    backbone: Backbone
    dataset: Dataset
    stored: Mapping[str, StoredVariant]
    settings: Mapping[str, Variant]  # with numeric thresholds and neurons
    batch_size: int  # shards are multiples of it, so each image is in the same batch in every run
    num_workers: int | Literal["auto"] = 0

    def of(self, work: Work) -> Job:
        """Return the job with only the variants in `work`."""
        names = dict.fromkeys(name for names in work.values() for name in names)
        return replace(self, stored={name: self.stored[name] for name in names},
                       settings={name: self.settings[name] for name in names})

    def rows(self, shard: int) -> slice:
        """Return the images of a shard, as indices into the data set."""
        return next(iter(self.stored.values())).rows(shard)

    def images(self, shards: Iterable[int]) -> int:
        """Return the number of images in some shards."""
        return sum(rows.stop - rows.start for rows in map(self.rows, shards))


def compute(job: Job, work: Work, advance: Callable[[int], None] = lambda images: None) -> None:
    """Compute the shards in `work` in one pass over their images, and store each shard once it is whole.

    Call `advance` after each batch with its number of images.

    Raises:
        ItaeError: features are not finite, the store can't be written, or a batch doesn't fit in memory.
    """
    backbone, indices = job.backbone, np.concatenate([np.r_[job.rows(shard)] for shard in work])
    batches = model_batches(backbone, job.dataset, batch_size=job.batch_size, num_workers=job.num_workers,
                            indices=indices)
    with memory_errors(job.batch_size, backbone.device), torch.inference_mode(), backbone.autocast():
        for shard, names in work.items():
            one_pass = OnePass(backbone.model, {name: job.settings[name] for name in names}, backbone.truth)
            features, counts = _shard(one_pass, names, batches, job.rows(shard), backbone.dim, advance)
            for place, name in enumerate(names):
                job.stored[name].save(shard, features[place], counts[place])


def _shard(one_pass: OnePass, names: Sequence[str], batches: Iterator[Tensor], rows: slice, dim: int,
           advance: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """Return features (variants, m, dim) and artifact counts (variants, m) of the images of one shard."""
    features = np.empty((len(names), rows.stop - rows.start, dim), dtype=np.float32)
    counts = np.empty(features.shape[:2], dtype=np.int64)

    def run() -> Iterator[tuple[int, Tensor, Tensor]]:
        first = rows.start
        while first < rows.stop:
            images = next(batches)
            results = one_pass(images, first).values()
            yield (first, torch.stack([output.float() for output, _ in results]),
                   torch.stack([artifacts.sum(dim=-1) for _, artifacts in results]))
            first += len(images)

    for first, outputs, found in one_ahead(run()):  # the device works on the next batch while this one is fetched
        place = slice(first - rows.start, first - rows.start + outputs.shape[1])
        features[:, place], counts[:, place] = outputs.cpu().numpy(), found.cpu().numpy()
        for name, values in zip(names, features[:, place], strict=True):
            if not np.isfinite(values).all():
                raise ItaeError(f"features of {name!r} are not finite in the batch of images {first} to "
                                f"{first + len(values) - 1}: try precision='fp32', or check these images and the "
                                "weights")
        advance(outputs.shape[1])
    return features, counts
