"""The method on one transformer block: which patches, what becomes of their logits, what `[CLS]` then reads.

Everything here works on stock models. `attend` holds the equations; `attenuate` brings them into a model's forward
pass. The one-pass extraction (`itae_utils.one_pass`) edits logits by the same `attenuated_logits`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from itae_utils.errors import ItaeError
from itae_utils.method.anatomy import anatomy, block_index, block_inputs, check_images
from itae_utils.method.artifacts import FiringRule, Watch, patch_norms, random_patches
from itae_utils.method.layers import Projections
from itae_utils.method.setting import ITAE, SOURCES

QUERY_CHUNK_BYTES = 64 * 2**20  # rows="all" needs real logits: at most this much of them at a time


def attenuated_logits(logits: Tensor, artifacts: Tensor, itae: ITAE) -> Tensor:
    """Edit the logits of `artifacts` in every query row; prefix tokens (`[CLS]`, registers) are never touched.

    `min`: (QKᵀ)'₀ₖ = min_{1≤j≤N} (QKᵀ)₀ⱼ for k in A, the minimum over all patches, artifacts included (paper,
    method section).

    Args:
        logits: (B, H, Q, T), scaled, after any q/k norm.
        artifacts: (B, N) bool, the same for all rows, or (B, Q, N), each row's own; the last N of the T tokens are the
            patches. Where one row of logits meets several of artifacts, it is edited in each of these ways.
        itae: only `attenuation` and `alpha` are read.
    """
    num_prefix_tokens = logits.shape[-1] - artifacts.shape[-1]
    patches = logits[..., num_prefix_tokens:]
    rows = artifacts if artifacts.ndim == 3 else artifacts[:, None]
    hit = torch.nn.functional.pad(rows[:, None], (num_prefix_tokens, 0))  # (B, 1, Q, T)
    match itae.attenuation:
        case "min":
            replaced = patches.amin(dim=-1, keepdim=True)
        case "mask":
            replaced = logits.new_tensor(-math.inf)
        case "mean":
            is_normal = ~hit[..., num_prefix_tokens:]
            normal = is_normal.sum(dim=-1, keepdim=True)
            replaced = torch.where(is_normal, patches, 0).sum(dim=-1, keepdim=True) / normal.clamp(min=1)
            hit = hit & (normal > 0)  # no normal patch, no mean: such an image is left as it is
        case "scale":
            replaced = logits + math.log(itae.alpha)
    return torch.where(hit, replaced, logits)


def attend(q: Tensor, k: Tensor, v: Tensor, artifacts: Tensor, itae: ITAE) -> Tensor:
    """Attention of some query rows with the artifacts attenuated: softmax(edited logits) · V.

    Args:
        q: (B, H, Q, d), the query rows, after any q-norm.
        k: (B, H, T, d), after any k-norm.
        v: (B, H, T, d).
        artifacts: (B, N) bool.
        itae: the setting.

    Returns:
        (B, H, Q, d).
    """
    return attenuated_logits(scaled_logits(q, k), artifacts, itae).softmax(dim=-1).to(v.dtype) @ v


def scaled_logits(q: Tensor, k: Tensor) -> Tensor:
    """QKᵀ/√d in float32: (B, H, Q, d), (B, H, T, d) -> (B, H, Q, T)."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).float()


def select_artifacts(
    norms: Tensor,
    threshold: float | None,
    itae: ITAE,
    *,
    block: int,
    first_image: int = 0,
    truth: Tensor | None = None,
) -> Tensor:
    """The patches a setting acts on in one block: (B, N) norms -> (B, N) bool.

    Args:
        norms: ‖P_i‖₂ of `itae.source`.
        threshold: θ of this block; None finds nothing.
        itae: `select` and `seed` are read.
        block: the block's number, which the random control's draw depends on.
        first_image: number of the batch's first image in its data set, likewise.
        truth: (B, N) bool, needed by select="oracle".
    """
    if itae.select == "oracle":
        if truth is None:
            raise ItaeError("select='oracle' needs the true artifacts, which only a planted backbone (demo) has")
        return truth
    found = torch.zeros_like(norms, dtype=torch.bool) if threshold is None else norms <= threshold
    if itae.select == "random":
        return random_patches(found.sum(dim=-1), norms.shape[-1], itae.seed, block, first_image)
    return found


def check_blocks(model: nn.Module, itae: ITAE, truth: FiringRule | Tensor | None = None) -> None:
    """Refuse more blocks than the model has, and an oracle in blocks before the artifacts appear."""
    depth = len(anatomy(model).layers)
    if itae.blocks > depth:
        raise ItaeError(f"blocks={itae.blocks} but the model has {depth}: use at most that many")
    if itae.select == "oracle" and isinstance(truth, FiringRule) and depth - itae.blocks <= truth.block:
        raise ItaeError(f"blocks={itae.blocks} with select='oracle' reaches back to block {depth - itae.blocks}, but "
                        f"the artifacts appear after block {truth.block}: use at most {depth - truth.block - 1}")


# Runs of `attenuate` now open on a model, innermost last: only that one acts.
_open: WeakKeyDictionary[nn.Module, list[object]] = WeakKeyDictionary()


@contextmanager
def attenuate(
    model: nn.Module,
    itae: ITAE,
    *,
    truth: FiringRule | Tensor | None = None,
    first_image: int = 0,
) -> Iterator[nn.Module]:
    """Apply the method to every forward pass of a stock model, in place, until the context is left.

    In each block the projections are kept, and the edited rows of the concatenated heads are replaced before they are
    projected. Attention itself stays fused; weights and code of the model are not touched.
    Images without artifacts keep the model's own result to the bit. Contexts nest: the innermost alone acts.

    Args:
        model: a timm VisionTransformer or Eva (EVA, DINOv3) with a `[CLS]` token, or a transformers Dinov2Model or
            Dinov2WithRegistersModel.
        itae: the setting, with numeric thresholds.
        truth: for select="oracle": a planted backbone's rule, or the true artifacts (B, N) of the one batch to come.
        first_image: number of the first image to come, on which the random control's draw depends.

    Raises:
        ItaeError: unsupported model, threshold "auto", more blocks than there are, "oracle" without `truth`.
    """
    body = anatomy(model)
    if not isinstance(itae, ITAE):
        raise ItaeError(f"itae={itae!r} is no setting: give an ITAE(…); without one the model is as it is")
    check_blocks(model, itae, truth)
    if itae.select == "oracle" and truth is None:
        raise ItaeError("select='oracle' needs truth=, the rule of a planted backbone (load_backbone('demo').truth)")
    thresholds = (None,) * itae.blocks if itae.select == "oracle" else itae.thresholds
    runs, run = _open.setdefault(model, []), object()
    with ExitStack() as stack:
        watch = stack.enter_context(truth.watch(model)) if isinstance(truth, FiringRule) else Watch(truth)
        for index, threshold in zip(range(len(body.layers))[-itae.blocks:], thresholds, strict=True):
            if threshold is None and itae.select != "oracle":
                continue
            editor = _RowEditor(index, body.num_prefix_tokens, threshold, itae, watch, first_image,
                                lambda: runs[-1] is run)
            layer = body.layers[index]
            stack.enter_context(layer.watch(editor.keep))
            stack.callback(layer.reads_heads.register_forward_pre_hook(editor.replace_rows).remove)
        runs.append(run)
        stack.callback(runs.remove, run)
        yield model


class _RowEditor:
    """The two hooks of one block, and what they pass to each other."""

    def __init__(self, index, num_prefix_tokens, threshold, itae, watch, next_image, is_innermost) -> None:
        self.index, self.num_prefix_tokens = index, num_prefix_tokens
        self.threshold, self.itae, self.watch = threshold, itae, watch
        self.next_image, self.is_innermost = next_image, is_innermost
        self.projected: Projections | None = None

    def keep(self, projected: Projections) -> None:
        self.projected = projected

    def replace_rows(self, _module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        heads, projected, self.projected = args[0], self.projected, None
        first_image, self.next_image = self.next_image, self.next_image + len(heads)
        if not self.is_innermost():
            return None
        norms = patch_norms(projected[self.itae.source], self.num_prefix_tokens)
        artifacts = select_artifacts(norms, self.threshold, self.itae, block=self.index, first_image=first_image,
                                     truth=self.watch.mask)
        q, k, v = (projected.heads(source) for source in SOURCES)
        return (self._edited(heads, q, k, v, artifacts),)

    def _edited(self, heads: Tensor, q: Tensor, k: Tensor, v: Tensor, artifacts: Tensor) -> Tensor:
        edited, has_artifacts = heads.clone(), artifacts.any(dim=-1)[:, None, None]
        for rows in self._row_chunks(k):
            new = attend(q[:, :, rows], k, v, artifacts, self.itae).transpose(1, 2).flatten(2).to(heads.dtype)
            edited[:, rows] = torch.where(has_artifacts, new, heads[:, rows])
        return edited

    def _row_chunks(self, k: Tensor) -> list[slice]:
        if self.itae.rows == "cls":
            return [slice(0, 1)]
        batch, num_heads, tokens, _ = k.shape
        step = max(1, QUERY_CHUNK_BYTES // (4 * batch * num_heads * tokens))
        return [slice(start, start + step) for start in range(0, tokens, step)]


def attention_map(
    model: nn.Module,
    images: Tensor,
    block: int = -1,
    *,
    itae: ITAE | None = None,
    heads: Literal["mean", "each"] = "mean",
    truth: FiringRule | None = None,
) -> Tensor:
    """Attention weights from `[CLS]` to every patch in one block, on the image grid, as the model or as ITAE has them.

    Works with fused attention on: the one row that is shown is computed here. Prefix tokens keep their share of the
    row, so the weights over the patches add up to less than 1.

    Args:
        model: as `attenuate` takes.
        images: (B, 3, H, W), preprocessed.
        block: which block; negative numbers count from the end.
        itae: the setting whose row is shown; None shows the model's own.
        heads: "mean" over the heads, or "each" head.
        truth: ground-truth rule, for select="oracle".

    Returns:
        (B, rows, columns) for "mean", (B, H, rows, columns) for "each"; float32.
    """
    body, index = anatomy(model), block_index(model, block)
    grid = check_images(model, images)
    with ExitStack() as stack:
        watch = stack.enter_context(truth.watch(model)) if truth is not None else Watch()
        if itae is not None:
            stack.enter_context(attenuate(model, itae, truth=truth))
        entering = block_inputs(model, images, [index])[index]
    projected = body.layers[index].project_input(entering)
    logits = scaled_logits(projected.heads("query")[:, :, :1], projected.heads("key"))
    first = len(body.layers) - (itae.blocks if itae is not None else 0)
    if index >= first:
        threshold = None if itae.select == "oracle" else itae.thresholds[index - first]
        norms = patch_norms(projected[itae.source], body.num_prefix_tokens)
        artifacts = select_artifacts(norms, threshold, itae, block=index, truth=watch.mask)
        logits = attenuated_logits(logits, artifacts, itae)
    weights = logits.softmax(dim=-1)[:, :, 0, body.num_prefix_tokens:].unflatten(-1, grid)
    return weights.mean(dim=1) if heads == "mean" else weights
