"""Measurements of the unmodified model: norms for fitting θ, and the attention of `[CLS]` before and after ITAE."""

from __future__ import annotations

import time
from contextlib import ExitStack
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
from itae_utils.method.anatomy import adapt, block_inputs
from itae_utils.method.artifacts import capture_truth, patch_norms, select_artifacts
from itae_utils.method.attention import attenuated_logits, check_setting, cls_attention, scaled_logits
from itae_utils.method.layers import QKV
from itae_utils.method.setting import ITAE, SOURCES
from itae_utils.method.thresholds import Thresholds
from itae_utils.models.backbones import Backbone
from itae_utils.store.store import Store, open_store
from itae_utils.store.variants import Place

SAMPLE = 512  # images that θ is fitted on


def sample_indices(size: int, sample: int, seed: int) -> np.ndarray:
    """Draw `sample` numbers from range(size), or all of them if the sample is larger; return them in ascending order.

    Raises:
        ItaeError: a sample of less than one, or a negative seed.
    """
    sample, seed = whole_number("sample", sample, 1), whole_number("seed", seed, 0)
    return np.sort(np.random.default_rng(seed).permutation(size)[:sample])


def fit_thresholds(backbone: Backbone, dataset: Dataset, *, sample: int = SAMPLE, seed: int = 0,
                   batch_size: int | Literal["auto"] = "auto", num_workers: int | Literal["auto"] = 0,
                   store: str | Path | Store | None = "auto") -> Thresholds:
    """Fit θ for every block and source on a sample of images, without labels, on the unmodified model.

    The norms are measured in one pass, stored and reused. Each fit is computed when it is first read.

    Args:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`.
        sample: number of images.
        seed: seed for drawing them.
        batch_size: images per batch; "auto" as in `extract_features`.
        num_workers: processes that load images, or "auto", as in `model_batches`.
        store: as in `extract_features`.

    Returns:
        `fits[block, source]`, a `ThresholdFit` each. `fits[-1, "key"].threshold` is θ for the last block's keys, or
        None if their norms do not have two modes.
    """
    dataset = checked_inputs(backbone, dataset, num_workers)
    return fitted_thresholds(Place(open_store(store), backbone, dataset), sample=sample, seed=seed,
                             batch_size=batch_size, num_workers=num_workers)


def fitted_thresholds(place: Place, *, sample: int = SAMPLE, seed: int = 0, batch_size: int | Literal["auto"] = "auto",
                      num_workers: int | Literal["auto"] = 0) -> Thresholds:
    """Return the fits of `fit_thresholds` for the backbone and the data set of a place."""
    start, backbone = time.perf_counter(), place.backbone
    sample, seed = whole_number("sample", sample, 1), whole_number("seed", seed, 0)
    batch_size = chosen_batch_size(batch_size, place)

    def measure() -> dict[str, np.ndarray]:
        with memory_errors(batch_size, backbone.device):
            norms = sampled_norms(backbone, place.dataset, sample=sample, seed=seed, batch_size=batch_size,
                                  num_workers=num_workers)
        return {f"{block} {source}": values for (block, source), values in norms.items()}

    found = place.remembered("norms", {"batch_size": batch_size, "sample": sample, "seed": seed}, measure)
    norms = {(int(block), source): values for name, values in found.items() for block, source in [name.split()]}
    return Thresholds(norms, seconds=time.perf_counter() - start)


def sampled_norms(backbone: Backbone, dataset: Dataset, *, sample: int, seed: int, batch_size: int | Literal["auto"],
                  num_workers: int | Literal["auto"] = 0) -> dict[tuple[int, str], np.ndarray]:
    """Measure ‖Q‖, ‖K‖ and ‖V‖ of every patch in every block, on a sample of images: {(block, source): (images, N)}."""
    vit, norms = adapt(backbone.model), {}
    *earlier, last = range(len(vit.blocks))

    def collect(block: int, qkv: QKV) -> None:
        for source in SOURCES:
            values = patch_norms(qkv[source], vit.num_prefix_tokens)
            norms.setdefault((block, source), []).append(values.cpu().numpy())

    with ExitStack() as stack:
        for block in earlier:
            stack.enter_context(vit.blocks[block].capture_qkv(partial(collect, block)))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(backbone.autocast())
        for images in model_batches(backbone, dataset, batch_size=batch_size, num_workers=num_workers,
                                    indices=sample_indices(len(dataset), sample, seed)):
            inputs = block_inputs(backbone.model, images, [last])[last]
            collect(last, vit.blocks[last].qkv(inputs))  # the pass stops before this block's own projection
    return {key: np.concatenate(values) for key, values in norms.items()}


@dataclass(frozen=True)
class Observation:
    """Measurements of n images with N patches each; patches are in reading order of `patch_grid`.

    Attributes:
        indices: (n,), the images' numbers in the data set.
        patch_grid: rows and columns.
        hidden_norms: (n, blocks, N), L2 norm of the patch tokens after each block, before the final norm.
        norms: {"query" | "key" | "value": (n, N)}, L2 norm in the last block, all heads together.
        attention: (n, N), attention weight from `[CLS]` in the last block of the unmodified model, mean over heads.
        attention_after: the same under the setting; equal to `attention` without a setting.
        artifacts: (n, N) bool, the patches that the setting edits.
        truth: (n, N) bool, the true artifacts of a planted backbone; None for any other.
    """

    indices: np.ndarray
    patch_grid: tuple[int, int]
    hidden_norms: np.ndarray
    norms: dict[str, np.ndarray]
    attention: np.ndarray
    attention_after: np.ndarray
    artifacts: np.ndarray
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
    batch_size = chosen_batch_size(batch_size, Place(open_store(store), backbone, dataset))
    if itae is not None:
        check_setting(backbone.model, itae, backbone.truth)
        if itae.blocks > 1:
            raise ItaeError(f"blocks={itae.blocks}: only the last block is observed, pass a setting with blocks=1")
    indices = sample_indices(len(dataset), len(dataset) if sample is None else sample, seed)
    batches: dict[str, list[np.ndarray]] = {}
    with memory_errors(batch_size, backbone.device), torch.inference_mode(), backbone.autocast():
        done = 0
        for images in model_batches(backbone, dataset, batch_size=batch_size, num_workers=num_workers, indices=indices):
            image_numbers = tuple(indices[done:done + len(images)].tolist())
            for name, values in _observe_batch(backbone, images, itae, image_numbers).items():
                batches.setdefault(name, []).append(values.cpu().numpy())
            done += len(images)
    measured = {name: np.concatenate(values) for name, values in batches.items()}
    return Observation(indices=indices, patch_grid=backbone.patch_grid, hidden_norms=measured["hidden"],
                       norms={source: measured[source] for source in SOURCES}, attention=measured["attention"],
                       attention_after=measured["attention_after"], artifacts=measured["artifacts"],
                       truth=measured.get("truth"))


def _observe_batch(backbone: Backbone, images: Tensor, itae: ITAE | None,
                   image_numbers: tuple[int, ...]) -> dict[str, Tensor]:
    measured = measure_batch(backbone, images)
    logits, attention = measured.pop("logits"), measured["attention"]
    measured["artifacts"], measured["attention_after"] = torch.zeros_like(attention, dtype=torch.bool), attention
    if itae is not None:
        artifacts = select_artifacts(measured[itae.source], itae.thresholds[-1], itae, block=backbone.num_blocks - 1,
                                     image_numbers=image_numbers, truth=measured.get("truth"))
        after = cls_attention(attenuated_logits(logits, artifacts, itae), artifacts.shape[-1])
        measured |= {"artifacts": artifacts, "attention_after": after.mean(dim=1)}
    return measured


@torch.no_grad()
def measure_batch(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    """Run the unmodified model once over one batch (B, 3, H, W) of any height and width.

    Returns:
        "hidden": (B, blocks, N), L2 norm of the patch tokens after each block.
        "query", "key", "value": (B, N), L2 norm in the last block.
        "logits": (B, H, 1, T), the `[CLS]` row of the last block.
        "attention": (B, N), its attention weights on the patches, mean over heads.
        "truth": (B, N) bool, only for a planted backbone.
    """
    model, vit = backbone.model, adapt(backbone.model)
    last, blocks, prefix = vit.blocks[-1], range(len(vit.blocks)), vit.num_prefix_tokens
    with capture_truth(backbone.truth, model) as captured:
        inputs = block_inputs(model, images, blocks)
    outputs = [*(inputs[block].tokens for block in blocks[1:]), inputs[blocks[-1]].run(last.block)]
    qkv = last.qkv(inputs[blocks[-1]])
    measured = {source: patch_norms(qkv[source], prefix) for source in SOURCES}
    measured["hidden"] = torch.stack([patch_norms(tokens, prefix) for tokens in outputs], dim=1)
    measured["logits"] = scaled_logits(qkv.heads("query")[:, :, :1], qkv.heads("key"))
    measured["attention"] = cls_attention(measured["logits"], measured["key"].shape[-1]).mean(dim=1)
    if captured.mask is not None:
        measured["truth"] = captured.mask
    return measured
