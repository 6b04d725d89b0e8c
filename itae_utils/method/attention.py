"""ITAE in one attention row: the equation, the edit of the logits, and `attenuate` for a whole model.

Let (QKᵀ)₀ⱼ be the logits of the `[CLS]` query, scaled by 1/√d, over the patches 1 ≤ j ≤ N, and A the artifacts, as
`select_artifacts` finds them. In every head the method sets

    (QKᵀ)'₀ₖ = min_{1≤j≤N} (QKᵀ)₀ⱼ   for k ∈ A

before the softmax (paper, method section). Everything after the logits runs unchanged, so the attention moves to the
normal patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from itae_utils.errors import ItaeError, whole_number
from itae_utils.method.anatomy import adapt, block_index, block_inputs, patch_grid, without_compiled_code
from itae_utils.method.artifacts import CapturedTruth, FiringRule, capture_truth, select_artifacts
from itae_utils.method.direction import check_directions, directions_of
from itae_utils.method.layers import QKV, BlockAdapter, scaled_logits
from itae_utils.method.setting import ITAE, PROJECTIONS
from itae_utils.method.statistics import cls_attention, patch_statistic

QUERY_CHUNK_BYTES = 64 * 2**20  # memory for logits with rows="all": queries are processed in chunks of this size


def attenuated_logits(logits: Tensor, artifacts: Tensor, itae: ITAE) -> Tensor:
    """Return the logits with those of the artifacts replaced in every row; prefix tokens are never edited.

    A row that has no normal patch is left as it is by "mean", "spread" and "clip". "substitute" edits no logits, but
    the values, see `substituted`.

    Args:
        logits: (B, H, Q, T), scaled, after any q/k norm. The last N of the T tokens are the patches.
        artifacts: bool; (B, N) is one set for all rows, (B, S, N) one set per row. If Q is 1, the single row is used
            with each of the S sets, and the result has S rows.
        itae: the setting; only `attenuation` and `alpha` are read.
    """
    num_prefix_tokens = logits.shape[-1] - artifacts.shape[-1]
    patches = logits[..., num_prefix_tokens:]
    artifacts = artifacts[:, None] if artifacts.ndim == 3 else artifacts[:, None, None]  # (B, 1, Q or 1, N)
    match itae.attenuation:
        case "min":
            new = patches.amin(dim=-1, keepdim=True)  # over all patches, artifacts included
        case "mask":
            new = -math.inf
        case "mean":
            normal = ~artifacts
            count = normal.sum(dim=-1, keepdim=True)
            new = torch.where(normal, patches, 0).sum(dim=-1, keepdim=True) / count.clamp(min=1)
            artifacts = artifacts & (count > 0)  # without a normal patch there is no mean: leave the row as it is
        case "scale":
            new = logits + math.log(itae.alpha)
        case "clip":
            highest = torch.where(artifacts, -math.inf, patches).amax(dim=-1, keepdim=True)
            new = torch.where(highest.isinf(), logits, logits.minimum(highest))
        case "spread":  # in terms of weights: each of n normal patches gains Σ_A w / n, and the row's sum stays
            count = (~artifacts).sum(dim=-1, keepdim=True)
            taken = torch.where(artifacts, patches, -math.inf).logsumexp(dim=-1, keepdim=True)
            given = torch.where(artifacts, -math.inf, patches.logaddexp(taken - count.log()))
            spread = torch.cat([logits[..., :num_prefix_tokens].expand(*given.shape[:-1], -1), given], dim=-1)
            return torch.where(artifacts.any(dim=-1, keepdim=True) & (count > 0), spread, logits)
        case "substitute":
            return logits.expand(-1, -1, max(logits.shape[2], artifacts.shape[2]), -1)
    return torch.where(nn.functional.pad(artifacts, (num_prefix_tokens, 0)), new, logits)


def substituted(weights: Tensor, artifacts: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention weights without those of the artifacts, and the sum of the latter in each row.

    For "substitute": the sum becomes the weight of the substitute's value.

    Args:
        weights: (B, H, Q, T).
        artifacts: (B, N) bool.

    Returns:
        Weights (B, H, Q, T), and sums (B, H, Q, 1).
    """
    mask = nn.functional.pad(artifacts, (weights.shape[-1] - artifacts.shape[-1], 0))[:, None, None]
    return weights.masked_fill(mask, 0), weights.where(mask, 0).sum(dim=-1, keepdim=True)


@contextmanager
def attenuate(model: nn.Module, itae: ITAE, *, truth: FiringRule | Tensor | None = None,
              first_image: int = 0) -> Iterator[nn.Module]:
    """Apply the method to every forward pass of a stock model until the context is left.

    In each edited block, the attention output of the `[CLS]` query (with rows="all", of every query) is recomputed with
    the edited logits and replaced before the output projection. The model's own attention stays fused, and its weights
    and code are not changed. Images without artifacts keep the model's result to the bit. Gradients are recorded as
    usual. Contexts can be nested: only the innermost acts. While a context is open, torch.compile's code is not used.
    Copies that are made of the model run without the method.

    Args:
        model: a timm VisionTransformer or Eva (EVA, DINOv3) with a `[CLS]` token, or a transformers Dinov2Model or
            Dinov2WithRegistersModel.
        itae: the setting, with numeric thresholds; for "substitute", one that `fit_setting` returned.
        truth: needed by select="oracle": the rule of a planted backbone, or the true artifacts (B, N) of the next
            batch.
        first_image: index, in the data set, of the first image of the next batch; later images are numbered
            consecutively. The random control depends on these indices.

    Yields:
        The model.

    Raises:
        ItaeError: an unsupported model, `itae` is not a setting or not fitted, more blocks than the model has, or
            an oracle without `truth` or before the artifacts appear.
    """
    vit, first_image = adapt(model), whole_number("first_image", first_image, 0)
    check_setting(model, itae, truth)
    contexts = _open_contexts.setdefault(model, [])
    with ExitStack() as context:
        context.enter_context(without_compiled_code())
        captured = context.enter_context(capture_truth(truth, model))
        edited = range(len(vit.blocks))[-itae.blocks:]
        for index, threshold, substitute in zip(edited, itae.thresholds, check_substitutes(itae), strict=True):
            if threshold is None and itae.select != "oracle":
                continue
            editor = _RowEditor(itae, threshold, substitute, index, model, vit.num_prefix_tokens,
                                directions_of(model, index, itae), captured, first_image,
                                is_active=lambda: contexts[-1] is context)
            context.enter_context(vit.blocks[index].edit_heads(editor))
        contexts.append(context)
        context.callback(contexts.remove, context)
        yield model


def check_setting(model: nn.Module, itae: ITAE, truth: FiringRule | Tensor | None = None) -> None:
    """Check that `itae` is a setting, that the model has the blocks that it edits, and that an oracle has its truth.

    Raises:
        ItaeError: not a setting, more blocks than the model has, or an oracle without `truth` or before the artifacts
            appear.
    """
    if not isinstance(itae, ITAE):
        raise ItaeError(f"itae={itae!r} is not a setting: pass ITAE(…), or use the model without one")
    depth = len(adapt(model).blocks)
    if itae.blocks > depth:
        raise ItaeError(f"blocks={itae.blocks} but the model has {depth}: use at most {depth}")
    if itae.source == "direction" and itae.select != "oracle":
        check_directions(model, depth - itae.blocks, itae.rank)
    if itae.select != "oracle":
        return
    if not isinstance(truth, FiringRule) and not (isinstance(truth, Tensor) and truth.dtype == torch.bool):
        raise ItaeError("select='oracle' needs the true artifacts, truth=: the rule of a planted backbone "
                        "(load_backbone('demo').truth) or a boolean tensor (B, N)")
    if isinstance(truth, FiringRule) and depth - itae.blocks <= truth.block:
        raise ItaeError(f"blocks={itae.blocks} with select='oracle' reaches back to block {depth - itae.blocks}, but "
                        f"the artifacts appear after block {truth.block}: use at most {depth - truth.block - 1}")


def check_substitutes(itae: ITAE) -> tuple[tuple[float, ...] | None, ...]:
    """Return the substitute of each edited block, in block order; None for one that needs none.

    Raises:
        ItaeError: the setting still lacks them.
    """
    if itae.needs_substitutes:
        raise ItaeError("attenuation='substitute' lacks the mean value of the artifacts: "
                        "use the setting that fit_setting(backbone, dataset, setting) returns")
    return itae.substitutes or (None,) * itae.blocks


def is_attenuated(model: nn.Module) -> bool:
    """Return whether a context of `attenuate` is open on this model."""
    return bool(_open_contexts.get(model))


_open_contexts: WeakKeyDictionary[nn.Module, list[ExitStack]] = WeakKeyDictionary()  # of each model, innermost last


@dataclass
class _RowEditor:
    """Replaces the edited rows of one block's concatenated heads; called once per forward pass."""

    itae: ITAE
    threshold: float | None        # of this block
    substitute: tuple[float, ...] | None
    block: int                     # its index
    model: nn.Module
    num_prefix_tokens: int         # at first; a timm model counts them itself, and may get more by `apply_registers`
    directions: Tensor | None
    truth: CapturedTruth
    next_image: int                # index of the next image in the data set
    is_active: Callable[[], bool]  # whether this editor's context is the innermost

    def __call__(self, qkv: QKV, x: Tensor) -> Tensor:
        """Return `x`, the concatenated heads (B, T, H · d), with the edited rows replaced."""
        image_numbers = range(self.next_image, self.next_image + len(x))
        self.next_image = image_numbers.stop
        if not self.is_active():
            return x
        prefix = getattr(self.model, "num_prefix_tokens", self.num_prefix_tokens)
        values = patch_statistic(self.itae.source, qkv, prefix, self.directions)
        artifacts = select_artifacts(values, self.threshold, self.itae, block=self.block, image_numbers=image_numbers,
                                     truth=self.truth.mask)
        q, k, v = (qkv.heads(name) for name in PROJECTIONS)
        if self.substitute is not None:
            mask = nn.functional.pad(artifacts, (v.shape[2] - artifacts.shape[-1], 0))[:, None, :, None]
            v = torch.where(mask, _substitute_value(qkv.block, self.substitute, v), v)
        edited, has_artifacts = x.clone(), artifacts.any(dim=-1)[:, None, None]
        for rows in self._row_chunks(k):
            logits = attenuated_logits(scaled_logits(q[:, :, rows], k), artifacts, self.itae)
            new = (logits.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2).flatten(2).to(x.dtype)
            del logits  # free this chunk before the next one is computed
            edited[:, rows] = torch.where(has_artifacts, new, x[:, rows])
        return edited

    def _row_chunks(self, k: Tensor) -> list[slice]:
        if self.itae.rows == "cls":
            return [slice(0, 1)]
        B, H, T, _ = k.shape
        step = max(1, QUERY_CHUNK_BYTES // (4 * B * H * T))
        return [slice(start, start + step) for start in range(0, T, step)]


@lru_cache(maxsize=256)  # the copy to a device is made once
def constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor, which may also be used where gradients are recorded."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)


def _substitute_value(block: BlockAdapter, substitute: tuple[float, ...], like: Tensor) -> Tensor:
    """Return the value of a normed token (C,) in every head, (H, 1, d)."""
    token = constant(substitute, like.dtype, like.device)
    return block.project(token, "value").unflatten(-1, (block.num_heads, 1, block.head_dim))


@torch.no_grad()
def attention_map(model: nn.Module, images: Tensor, block: int = -1, *, itae: ITAE | None = None,
                  heads: Literal["mean", "each"] = "mean", truth: FiringRule | None = None) -> Tensor:
    """Return the attention weights from `[CLS]` to every patch in one block, on the patch grid.

    Fused attention can stay on, because the `[CLS]` row is computed here. Prefix tokens keep their share of the row, so
    the weights over the patches add up to less than 1. No gradients are recorded.

    Args:
        model: as for `attenuate`.
        images: (B, 3, H, W), preprocessed.
        block: index of the block; negative numbers count from the end.
        itae: a setting to apply; None shows the model's own attention.
        heads: "mean" averages over the heads, "each" returns every head.
        truth: the rule of a planted backbone, needed by select="oracle".

    Returns:
        (B, rows, columns) for "mean", (B, H, rows, columns) for "each"; float32.

    Raises:
        ItaeError: the errors of `attenuate`, a block that does not exist, an unknown `heads`, or a wrong image size.
    """
    if heads not in ("mean", "each"):
        raise ItaeError(f"heads={heads!r} is not known: use 'mean' or 'each'")
    vit, index = adapt(model), block_index(model, block)
    grid = patch_grid(model, images)
    with ExitStack() as stack:
        captured = stack.enter_context(capture_truth(truth, model))
        if itae is not None:
            stack.enter_context(attenuate(model, itae, truth=truth))
        inputs = block_inputs(model, images, [index])[index]
    qkv = vit.blocks[index].qkv(inputs)
    logits, first_edited = qkv.cls_logits, len(vit.blocks) - (0 if itae is None else itae.blocks)
    if index >= first_edited:
        prefix = inputs.tokens.shape[1] - math.prod(grid)
        values = patch_statistic(itae.source, qkv, prefix, directions_of(model, index, itae))
        artifacts = select_artifacts(values, itae.thresholds[index - first_edited], itae, block=index,
                                     image_numbers=range(len(images)), truth=captured.mask)
        logits = attenuated_logits(logits, artifacts, itae)
    attn = cls_attention(logits, math.prod(grid)).unflatten(-1, grid)
    return attn.mean(dim=1) if heads == "mean" else attn
