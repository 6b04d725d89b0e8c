"""What one look at many images shows: norms in every block, and the attention of `[CLS]` before and after ITAE."""

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

from itae_utils.errors import ItaeError
from itae_utils.extraction.batches import chosen_batch_size, model_batches
from itae_utils.method.anatomy import anatomy, block_inputs
from itae_utils.method.artifacts import patch_norms
from itae_utils.method.attention import attenuated_logits, check_blocks, scaled_logits, select_artifacts
from itae_utils.method.layers import Projections
from itae_utils.method.setting import ITAE, SOURCES
from itae_utils.method.thresholds import Thresholds, fit_threshold
from itae_utils.models.backbones import Backbone
from itae_utils.store.store import Store, open_store
from itae_utils.store.variants import entry_key

SAMPLE = 512                # images that θ is fitted on


def sample_indices(size: int, sample: int, seed: int) -> np.ndarray:
    """`sample` numbers out of range(size), drawn by `seed`, in ascending order; all of them when there are no more."""
    return np.sort(np.random.default_rng(seed).permutation(size)[:sample])


def fit_thresholds(backbone: Backbone, dataset: Dataset, *, sample: int = SAMPLE, seed: int = 0,
                   batch_size: int | Literal["auto"] = "auto", num_workers: int | Literal["auto"] = 0,
                   store: str | Path | Store | None = "auto") -> Thresholds:
    """Fit θ for every block and source on a sample of images, without labels, on the unmodified model.

    One pass up to the last block's qkv projection; its norms are kept in the store, and found there the next time.

    Args:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`.
        sample: how many images, drawn by `seed`.
        seed: of the sample.
        batch_size: images at a time; "auto" as in `extract_features`.
        num_workers: processes that load images, or "auto", as in `model_batches`.
        store: as for `extract_features`.

    Returns:
        `fits[block, source]`, a `ThresholdFit` each; `fits[-1, "key"].threshold` is the last block's, None where there
        are no two modes.
    """
    start = time.perf_counter()
    batch_size = chosen_batch_size(batch_size, backbone, dataset, store)

    def measure() -> dict[str, np.ndarray]:
        norms = sampled_norms(backbone, dataset, sample=sample, seed=seed, batch_size=batch_size,
                              num_workers=num_workers)
        return {f"{block} {source}": values for (block, source), values in norms.items()}

    place = open_store(store)
    key = None if place is None else entry_key(backbone, dataset, batch_size)
    found = measure() if key is None else place.remembered("norms", {**key, "sample": sample, "seed": seed}, measure)
    norms = {(int(block), source): values for name, values in found.items() for block, source in [name.split()]}
    fits = {key: fit_threshold(values) for key, values in norms.items()}
    return Thresholds(fits, backbone.num_blocks, time.perf_counter() - start)


def sampled_norms(backbone: Backbone, dataset: Dataset, *, sample: int, seed: int, batch_size: int | Literal["auto"],
                  num_workers: int | Literal["auto"] = 0) -> dict[tuple[int, str], np.ndarray]:
    """‖Q‖, ‖K‖ and ‖V‖ of every patch of a sample of images, in every block: {(block, source): (images, N)}."""
    body, collected = anatomy(backbone.model), {}
    *earlier, last = range(len(body.layers))

    def collect(index: int, projected: Projections) -> None:
        for source in SOURCES:
            norms = patch_norms(projected[source], body.num_prefix_tokens)
            collected.setdefault((index, source), []).append(norms.cpu().numpy())

    with ExitStack() as stack:
        for index in earlier:
            stack.enter_context(body.layers[index].watch(partial(collect, index)))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(backbone.autocast())
        for images in model_batches(backbone, dataset, batch_size=batch_size, num_workers=num_workers,
                                    indices=sample_indices(len(dataset), sample, seed)):
            entering = block_inputs(backbone.model, images, [last])[last]
            collect(last, body.layers[last].project_input(entering))  # its own attention is never reached
    return {key: np.concatenate(values) for key, values in collected.items()}


@dataclass(frozen=True)
class Observation:
    """Per image and patch, for `indices` of a data set; N patches in reading order of `patch_grid`.

    Attributes:
        indices: (n,) numbers of the images in the data set.
        patch_grid: rows and columns.
        hidden_norms: (n, blocks, N), L2 norm of the patch token after each block, before the final norm.
        norms: "query", "key", "value" -> (n, N), L2 norm in the last block, all heads together.
        attention: (n, N), weight from `[CLS]` in the last block, mean over heads, in the model as it is.
        attention_after: the same under the setting that was given; equal to `attention` when none was.
        artifacts: (n, N) bool, what the setting acts on.
        truth: (n, N) bool, the true artifacts of a planted backbone; else None.
    """

    indices: np.ndarray
    patch_grid: tuple[int, int]
    hidden_norms: np.ndarray
    norms: dict[str, np.ndarray]
    attention: np.ndarray
    attention_after: np.ndarray
    artifacts: np.ndarray
    truth: np.ndarray | None


def observe(
    backbone: Backbone,
    dataset: Dataset,
    itae: ITAE | None = None,
    *,
    sample: int | None = None,
    seed: int = 0,
    batch_size: int | Literal["auto"] = "auto",
    num_workers: int | Literal["auto"] = 0,
    store: str | Path | Store | None = "auto",
) -> Observation:
    """Run the unmodified model once over the images and keep what tells artifacts.

    Args:
        backbone: from `load_backbone`.
        dataset: from `load_dataset`.
        itae: setting of the last block, with a numeric threshold (or None in its place: nothing is attenuated).
        sample: look at this many images only, drawn by `seed`; None looks at all.
        seed: of the sample.
        batch_size: images at a time; "auto" as in `extract_features`.
        num_workers: processes that load images, or "auto", as in `model_batches`.
        store: as for `extract_features`; only an automatic batch size is looked up there.
    """
    batch_size = chosen_batch_size(batch_size, backbone, dataset, store)
    if itae is not None:
        check_blocks(backbone.model, itae, backbone.truth)
        if itae.blocks > 1:
            raise ItaeError(f"blocks={itae.blocks}: what is observed is the last block, give a setting with blocks=1")
    indices = sample_indices(len(dataset), len(dataset) if sample is None else sample, seed)
    pieces: dict[str, list[np.ndarray]] = {}
    with torch.inference_mode(), backbone.autocast():
        first = 0
        for images in model_batches(backbone, dataset, batch_size=batch_size, num_workers=num_workers, indices=indices):
            for name, values in _observe_batch(backbone, images, itae, first).items():
                pieces.setdefault(name, []).append(values.cpu().numpy())
            first += len(images)
    whole = {name: np.concatenate(values) for name, values in pieces.items()}
    return Observation(
        indices=indices,
        patch_grid=backbone.patch_grid,
        hidden_norms=whole["hidden"],
        norms={source: whole[source] for source in SOURCES},
        attention=whole["attention"],
        attention_after=whole["attention_after"],
        artifacts=whole["artifacts"],
        truth=whole.get("truth"),
    )


def _observe_batch(backbone: Backbone, images: Tensor, itae: ITAE | None, first_image: int) -> dict[str, Tensor]:
    seen = measure(backbone, images)
    logits, attention = seen.pop("logits"), seen["attention"]
    seen["artifacts"], seen["attention_after"] = torch.zeros_like(attention, dtype=torch.bool), attention
    if itae is not None:
        threshold = None if itae.select == "oracle" else itae.thresholds[0]
        seen["artifacts"] = select_artifacts(seen[itae.source], threshold, itae, block=backbone.num_blocks - 1,
                                             first_image=first_image, truth=seen.get("truth"))
        seen["attention_after"] = cls_attention(attenuated_logits(logits, seen["artifacts"], itae),
                                                attention.shape[-1])
    return seen


def measure(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    """Run the unmodified model once over one batch (B, 3, H, W), of any height and width.

    Returns:
        "hidden": (B, blocks, N), L2 norm of the patch tokens after each block; "query", "key", "value": (B, N), L2 norm
        in the last block; "logits": (B, H, 1, T), the `[CLS]` row of the last block; "attention": (B, N), its weights,
        mean over heads; "truth": (B, N) bool, for a planted backbone.
    """
    model, body = backbone.model, anatomy(backbone.model)
    prefix, last, doors = body.num_prefix_tokens, body.layers[-1], range(len(body.layers))
    seen: dict[str, Tensor] = {}
    if backbone.truth is None:
        entering = block_inputs(model, images, doors)
    else:
        with backbone.truth.watch(model) as watch:
            entering = block_inputs(model, images, doors)
        seen["truth"] = watch.mask
    after_each = [*[entering[door].tokens for door in doors[1:]], entering[doors[-1]].through(last.block)]
    seen["hidden"] = torch.stack([patch_norms(hidden, prefix) for hidden in after_each], dim=1)
    projected = last.project_input(entering[doors[-1]])
    seen |= {source: patch_norms(projected[source], prefix) for source in SOURCES}
    seen["logits"] = scaled_logits(projected.heads("query")[:, :, :1], projected.heads("key"))
    seen["attention"] = cls_attention(seen["logits"], seen["key"].shape[-1])
    return seen


def cls_attention(logits: Tensor, num_patches: int) -> Tensor:
    """Attention weights of `[CLS]` on the patches, mean over heads: (B, H, 1, T) logits -> (B, N)."""
    return logits.softmax(dim=-1)[:, :, 0, -num_patches:].mean(dim=1)
