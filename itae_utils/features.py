"""One pass over the images for any number of variants.

The method touches only the `[CLS]` row of the last block, so what enters that block, and its keys and values, are the
same for every variant; and after the attention only one token is needed. Each further variant costs one row of
attention and one token through the MLP. Variants that reach into earlier blocks share the pass up to there and run the
rest each.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from itae_utils.artifacts import patch_norms
from itae_utils.attention import (
    ITAE,
    attended,
    attenuate,
    attenuated_logits,
    check_blocks,
    scaled_logits,
    select_artifacts,
)
from itae_utils.errors import ItaeError
from itae_utils.layers import BlockInput
from itae_utils.thresholds import fit_thresholds
from itae_utils.vit import anatomy, block_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from itae_utils.backbones import Backbone
    from itae_utils.thresholds import Thresholds

GROUP = 8  # the tail's bits depend on how many variants run at once: always this many, padded with the baseline


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

    start, extraction = time.perf_counter(), _Pass(backbone, settings)
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


class _Pass:
    """What is done to one batch: the shared pass, the variants of the last block in groups, then the deeper ones."""

    def __init__(self, backbone: Backbone, settings: Mapping[str, ITAE | None]) -> None:
        self.model, self.truth, self.settings = backbone.model, backbone.truth, settings
        self.last = len(self.model.blocks) - 1
        self.deep = [name for name, itae in settings.items() if itae is not None and itae.blocks > 1]
        self.shallow = [name for name, itae in settings.items() if itae is not None and itae.blocks == 1]
        self.doors = range(min([self.last, *map(self._first_block, self.deep)]), self.last + 1)
        self.needs_truth = any(itae is not None and itae.select == "oracle" for itae in settings.values())

    def _first_block(self, name: str) -> int:
        return self.last + 1 - self.settings[name].blocks

    def __call__(self, images: Tensor, first_image: int) -> dict[str, tuple[Tensor, Tensor]]:
        """(B, dim) `[CLS]` outputs and (B, N) artifacts in the last block, by variant."""
        entering, truth = self._shared(images)
        tail = _LastBlock(self.model, entering[self.last], first_image, truth)
        baseline = tail.run([None])[0]
        results = {name: baseline for name, itae in self.settings.items() if itae is None}
        for start in range(0, len(self.shallow), GROUP):
            names = self.shallow[start:start + GROUP]
            for name, row in zip(names, tail.run([self.settings[name] for name in names]), strict=True):
                results[name] = row.or_else(baseline)
        for name in self.deep:
            itae, first = self.settings[name], self._first_block(name)
            with attenuate(self.model, itae, truth=truth, first_image=first_image):
                tokens = entering[first].tokens
                for index in range(first, self.last):
                    tokens = replace(entering[index], tokens=tokens).through(self.model.blocks[index])
            at_last = replace(entering[self.last], tokens=tokens)
            row = _LastBlock(self.model, at_last, first_image, truth).run([itae])[0]
            row.changed |= (tokens != entering[self.last].tokens).flatten(1).any(dim=1)
            results[name] = row.or_else(baseline)
        return {name: (row.cls_output, row.artifacts) for name, row in results.items()}

    def _shared(self, images: Tensor) -> tuple[dict[int, BlockInput], Tensor | None]:
        if not self.needs_truth:
            return block_inputs(self.model, images, self.doors), None
        with self.truth.watch(self.model) as watch:
            return block_inputs(self.model, images, self.doors), watch.mask


@dataclass
class _Row:
    """One variant of one batch: `[CLS]` outputs (B, dim), artifacts (B, N), and which images it changed (B,)."""

    cls_output: Tensor
    artifacts: Tensor
    changed: Tensor

    def or_else(self, baseline: _Row) -> _Row:
        """Images that were not changed take the baseline's output itself, so that doing no harm holds to the bit."""
        import torch

        return replace(self, cls_output=torch.where(self.changed[:, None], self.cls_output, baseline.cls_output))


class _LastBlock:
    """The last block, computed for `[CLS]` alone; keys, values and logits are shared by all variants."""

    def __init__(self, model: nn.Module, entering: BlockInput, first_image: int, truth: Tensor | None) -> None:
        self.model, self.layer = model, anatomy(model).layers[-1]
        self.first_image, self.truth = first_image, truth
        normed = self.layer.block.norm1(entering.tokens)
        self.cls_token, self.cls_normed = entering.tokens[:, 0], normed[:, 0]
        query = self.layer.project(normed[:, :1], entering.rope, ["query"])
        self.shared = self.layer.project(normed, entering.rope, ["key", "value"])
        self.all_queries = lambda: self.layer.project(normed, entering.rope, ["query"])
        self.values = self.shared.heads("value")
        self.logits = scaled_logits(query.heads("query"), self.shared.heads("key"))
        self.norms: dict[str, Tensor] = {}

    def run(self, settings: Sequence[ITAE | None]) -> list[_Row]:
        """At most `GROUP` variants at once; padded to that many, so that bits don't depend on how many there are."""
        import torch

        artifacts = [self._artifacts(itae) for itae in settings]
        rows = [self.logits if itae is None else attenuated_logits(self.logits, found, itae)
                for itae, found in zip(settings, artifacts, strict=True)]
        padded = torch.cat(rows + [self.logits] * (GROUP - len(rows)), dim=2)
        outputs = self._after_attention(attended(padded, self.values))
        return [
            _Row(output, found, (logits != self.logits).flatten(1).any(dim=1))
            for output, found, logits in zip(outputs, artifacts, rows, strict=False)
        ]

    def _artifacts(self, itae: ITAE | None) -> Tensor:
        if itae is None:
            num_patches = self.logits.shape[-1] - self.model.num_prefix_tokens
            return self.logits.new_zeros((len(self.logits), num_patches), dtype=bool)
        if itae.source not in self.norms:
            projected = self.all_queries() if itae.source == "query" else self.shared
            self.norms[itae.source] = patch_norms(projected[itae.source], self.model.num_prefix_tokens)
        threshold = None if itae.select == "oracle" else itae.thresholds[-1]
        return select_artifacts(self.norms[itae.source], threshold, itae, block=len(self.model.blocks) - 1,
                                first_image=self.first_image, truth=self.truth)

    def _after_attention(self, heads: Tensor) -> Tensor:
        """(B, H, G, d) -> (G, B, dim): everything after the value sum, for one token a variant and image."""
        tokens = self.layer.finish(self.cls_token, self.cls_normed, heads.permute(2, 0, 1, 3).flatten(2))
        return self.model.fc_norm(self.model.norm(tokens))  # the final norm is one of them, the other an Identity
