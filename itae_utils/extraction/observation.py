"""Measurements of the unmodified model: statistics of patches, and the attention of `[CLS]` before and after ITAE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from itae_utils.errors import ItaeError, whole_number
from itae_utils.extraction.batches import checked_inputs, chosen_batch_size, memory_errors, model_batches
from itae_utils.method.anatomy import adapt, block_index, block_inputs
from itae_utils.method.artifacts import capture_truth, select_artifacts
from itae_utils.method.attention import attention_map, attenuated_logits, check_setting
from itae_utils.method.direction import has_directions, singular_directions
from itae_utils.method.layers import BlockInput
from itae_utils.method.register_setting import Variant, parted
from itae_utils.method.registers import apply_registers
from itae_utils.method.setting import ITAE, SOURCES
from itae_utils.method.statistics import cls_attention, patch_norms, patch_statistics
from itae_utils.models.backbones import Backbone
from itae_utils.store.store import Store, open_store
from itae_utils.store.variants import Place


def sample_indices(size: int, sample: int, seed: int, *, second: bool = False) -> np.ndarray:
    """Draw `sample` numbers from range(size), or all of them if the sample is larger; return them in ascending order.

    A second sample has no number of the first, if the range is long enough.

    Raises:
        ItaeError: a sample of less than one, or a negative seed.
    """
    sample, seed = whole_number("sample", sample, 1), whole_number("seed", seed, 0)
    drawn = np.random.default_rng(seed).permutation(size)
    return np.sort(drawn[-sample:] if second else drawn[:sample])


@dataclass(frozen=True)
class Observation:
    """Measurements of n images with N patches each; patches are in reading order of `patch_grid`.

    Attributes:
        indices: (n,), the images' numbers in the data set.
        patch_grid: rows and columns.
        hidden_norms: (n, blocks, N), L2 norm of the patch tokens after each block, before the final norm.
        statistics: {source: (n, N)} in the last block, see `ITAE.source`; a model without singular directions has no
            "direction".
        attention: (n, N), attention weight from `[CLS]` in the last block of the unmodified model, mean over heads.
        attention_after: the same under the setting; equal to `attention` without a setting.
        artifacts: (n, N) bool, the patches that the setting edits.
        value_norms: (n, H, 2), per head the mean norm of the values of the artifacts and of the other patches; NaN if
            an image has none.
        truth: (n, N) bool, the true artifacts of a planted backbone; None for any other.
    """

    indices: np.ndarray
    patch_grid: tuple[int, int]
    hidden_norms: np.ndarray
    statistics: dict[str, np.ndarray]
    attention: np.ndarray
    attention_after: np.ndarray
    artifacts: np.ndarray
    value_norms: np.ndarray
    truth: np.ndarray | None


def observe(backbone: Backbone, dataset: Dataset, itae: ITAE | None = None, *, sample: int | None = None, seed: int = 0,
            batch_size: int | Literal["auto"] = "auto", num_workers: int | Literal["auto"] = 0,
            store: str | Path | Store | None = "auto") -> Observation:
    """Run the unmodified model once over the images, and measure norms and attention.

    Args:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`.
        itae: a setting of the last block with a numeric threshold. Without a setting or a threshold (None), no patch
            is edited.
        sample: number of images, drawn with `seed`; None takes all.
        seed: seed for drawing them.
        batch_size: images per batch; "auto" as in `extract_features`.
        num_workers: processes that load images, or "auto", as in `model_batches`.
        store: as in `extract_features`; used only to look up an automatic batch size.

    Raises:
        ItaeError: a setting with more than one block, or one that `attenuate` refuses.
    """
    dataset = checked_inputs(backbone, dataset, num_workers)
    if itae is not None:
        check_setting(backbone.model, itae, backbone.truth)
        if itae.blocks > 1:
            raise ItaeError(f"blocks={itae.blocks}: only the last block is observed, pass a setting with blocks=1")
    directions = directions_entering(backbone, 1 if itae is None else itae.rank)
    indices = sample_indices(len(dataset), len(dataset) if sample is None else sample, seed)
    measured = measured_batches(Place(open_store(store), backbone, dataset), indices,
                                partial(_observe_batch, backbone, itae, directions), batch_size, num_workers)
    return Observation(indices=indices, patch_grid=backbone.patch_grid, hidden_norms=measured["hidden"],
                       statistics={source: measured[source] for source in SOURCES if source in measured},
                       attention=measured["attention"], attention_after=measured["attention_after"],
                       artifacts=measured["artifacts"], value_norms=measured["value_norms"],
                       truth=measured.get("truth"))


@dataclass(frozen=True)
class Rows:
    """The `[CLS]` rows of one block of n images, from which every edit of attention weights can be computed.

    Attributes:
        indices: (n,), the images' numbers in the data set.
        patch_grid: rows and columns.
        statistics: {source: (n, N)}, as in `Observation`.
        logits: (n, H, T) of the unmodified model; the last N of the T tokens are the patches.
    """

    indices: np.ndarray
    patch_grid: tuple[int, int]
    statistics: dict[str, np.ndarray]
    logits: np.ndarray


def observe_rows(backbone: Backbone, dataset: Dataset, indices: np.ndarray, *, block: int = -1, rank: int = 1,
                 kept: list[BlockInput] | None = None, **reading: object) -> Rows:
    """Run the unmodified model once over some images, and return statistics and logits of one block.

    Args:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`.
        indices: (n,), the images' numbers in the data set.
        block: counted from the front, or if negative from the end.
        rank: number of singular directions, for the source "direction", which the first block lacks.
        kept: a list that receives what enters the block, batch by batch.
        reading: batch_size, num_workers and store, as in `observe`.
    """
    dataset = checked_inputs(backbone, dataset, reading.get("num_workers", 0))
    index = block_index(backbone.model, block)
    vit, directions = adapt(backbone.model), directions_entering(backbone, rank, index)

    def measure(images: Tensor, _image_numbers: tuple[int, ...]) -> dict[str, Tensor]:
        inputs = block_inputs(backbone.model, images, [index])[index]
        if kept is not None:
            kept.append(inputs)
        qkv = vit.blocks[index].qkv(inputs)
        return {"logits": qkv.cls_logits[:, :, 0], **patch_statistics(qkv, vit.num_prefix_tokens, directions)}

    place = Place(open_store(reading.get("store", "auto")), backbone, dataset)
    measured = measured_batches(place, indices, measure, reading.get("batch_size", "auto"),
                                reading.get("num_workers", 0))
    logits = measured.pop("logits")
    return Rows(indices, backbone.patch_grid, measured, logits)


def observe_attention(backbone: Backbone, dataset: Dataset, variants: Mapping[str, Variant], indices: np.ndarray, *,
                      batch_size: int | Literal["auto"] = "auto", num_workers: int | Literal["auto"] = 0,
                      store: str | Path | Store | None = "auto") -> dict[str, np.ndarray]:
    """Return the `[CLS]` attention in the last block under each variant, mean over the heads: (n, rows, columns).

    `variants` are fitted; `indices` (n,) are the images' numbers in the data set. The other arguments are as in
    `observe`.
    """
    model, place = backbone.model, Place(open_store(store), backbone, checked_inputs(backbone, dataset, num_workers))

    def measure(images: Tensor, _image_numbers: tuple[int, ...]) -> dict[str, Tensor]:
        found = {}
        for name, (registers, itae) in parts.items():
            with apply_registers(model, registers) if registers else nullcontext():
                found[name] = attention_map(model, images, itae=itae)
        return found

    parts = {name: parted(variant) for name, variant in variants.items()}
    return measured_batches(place, indices, measure, batch_size, num_workers)


def measured_batches(place: Place, indices: np.ndarray,
                     measure: Callable[[Tensor, tuple[int, ...]], Mapping[str, Tensor]],
                     batch_size: int | Literal["auto"] = "auto", num_workers: int | Literal["auto"] = 0
                     ) -> dict[str, np.ndarray]:
    """Return what `measure` finds in each batch of images, with their numbers, joined by name."""
    backbone, dataset, batch_size = place.backbone, place.dataset, chosen_batch_size(batch_size, place)
    batches: dict[str, list[np.ndarray]] = {}
    with memory_errors(batch_size, backbone.device), torch.inference_mode(), backbone.autocast():
        done = 0
        for images in model_batches(backbone, dataset, batch_size=batch_size, num_workers=num_workers, indices=indices):
            image_numbers = tuple(indices[done:done + len(images)].tolist())
            for name, values in measure(images, image_numbers).items():
                values = values.float() if values.dtype == torch.bfloat16 else values  # NumPy has no such type
                batches.setdefault(name, []).append(values.cpu().numpy())
            done += len(images)
    return {name: np.concatenate(values) for name, values in batches.items()}


def _observe_batch(backbone: Backbone, itae: ITAE | None, directions: Tensor | None, images: Tensor,
                   image_numbers: tuple[int, ...]) -> dict[str, Tensor]:
    measured = measure_batch(backbone, images, directions)
    logits, values, attention = measured.pop("logits"), measured.pop("head_values"), measured["attention"]
    artifacts, measured["attention_after"] = torch.zeros_like(attention, dtype=torch.bool), attention
    if itae is not None:
        artifacts = select_artifacts(measured[itae.source], itae.thresholds[-1], itae, block=backbone.num_blocks - 1,
                                     image_numbers=image_numbers, truth=measured.get("truth"))
        after = cls_attention(attenuated_logits(logits, artifacts, itae), artifacts.shape[-1])
        measured["attention_after"] = after.mean(dim=1)
    groups = torch.stack([artifacts, ~artifacts], dim=1).to(values.dtype)  # (B, 2, N)
    means = torch.einsum("bhn,bgn->bhg", values, groups) / groups.sum(dim=-1)[:, None]  # 0 / 0 is NaN
    return measured | {"artifacts": artifacts, "value_norms": means}


def directions_entering(backbone: Backbone, rank: int = 1, block: int = -1) -> Tensor | None:
    """Return the singular directions of the tokens that enter a block, (C, rank); None if there are none."""
    model, index = backbone.model, block_index(backbone.model, block)
    return singular_directions(model, index, rank) if index and has_directions(model, rank) else None


@torch.no_grad()
def measure_batch(backbone: Backbone, images: Tensor, directions: Tensor | None = None) -> dict[str, Tensor]:
    """Run the unmodified model once over one batch (B, 3, H, W) of any height and width.

    Args:
        backbone: from `load_backbone`.
        images: preprocessed.
        directions: from `directions_entering`; without them "direction" is not measured.

    Returns:
        "hidden": (B, blocks, N), L2 norm of the patch tokens after each block.
        every source: (B, N), in the last block. "attention" is the weight of the `[CLS]` row, mean over heads.
        "logits": (B, H, 1, T), the `[CLS]` row of the last block.
        "head_values": (B, H, N), L2 norm of the patches' values in each head.
        "truth": (B, N) bool, only for a planted backbone.
    """
    model, vit = backbone.model, adapt(backbone.model)
    last, blocks, prefix = vit.blocks[-1], range(len(vit.blocks)), vit.num_prefix_tokens
    with capture_truth(backbone.truth, model) as captured:
        inputs = block_inputs(model, images, blocks)
    outputs = [*(inputs[block].tokens for block in blocks[1:]), inputs[blocks[-1]].run(last.block)]
    qkv = last.qkv(inputs[blocks[-1]])
    measured = patch_statistics(qkv, prefix, directions)
    measured["hidden"] = torch.stack([patch_norms(tokens, prefix) for tokens in outputs], dim=1)
    measured["logits"] = qkv.cls_logits
    measured["head_values"] = qkv.heads("value")[:, :, prefix:].float().norm(dim=-1)
    if captured.mask is not None:
        measured["truth"] = captured.mask
    return measured
