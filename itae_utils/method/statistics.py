"""What is measured of each patch to identify artifacts: norms, a direction, and the attention of `[CLS]`."""

from __future__ import annotations

import math
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from itae_utils.method.anatomy import adapt, block_index, block_inputs, patch_grid
from itae_utils.method.layers import QKV
from itae_utils.method.setting import PROJECTIONS, SOURCES


def patch_norms(x: Tensor, num_prefix_tokens: int) -> Tensor:
    """Return the L2 norm of every patch's whole vector, all heads together: (B, T, D) -> (B, N), float32."""
    return x[:, num_prefix_tokens:].float().norm(dim=-1)


@torch.no_grad()
def token_norms(model: nn.Module, images: Tensor) -> Tensor:
    """Return the L2 norm of every patch token after each block, on the patch grid.

    The tokens are taken before the final norm, because normalised outputs hide artifacts. `[CLS]` and register tokens
    are left out. No gradients are recorded.

    Returns:
        (B, blocks, rows, columns), float32.
    """
    vit, norms = adapt(model), []
    grid = patch_grid(model, images)

    def measure(_module: nn.Module, _args: tuple[Tensor], tokens: Tensor) -> None:
        norms.append(patch_norms(tokens, tokens.shape[1] - math.prod(grid)))

    with ExitStack() as stack:
        for adapter in vit.blocks:
            stack.callback(adapter.block.register_forward_hook(measure).remove)
        vit.run(images)
    return torch.stack(norms, dim=1).unflatten(-1, grid)


@torch.no_grad()
def qkv_norms(model: nn.Module, images: Tensor, block: int = -1) -> dict[str, Tensor]:
    """Return the L2 norms of every patch's query, key and value in one block, on the patch grid.

    All heads count together. The norms are measured on the outputs of the qkv projection, biases included, before any
    q/k norm or rotation (paper, method section: ‖P_i‖₂). No gradients are recorded.

    Returns:
        {"query" | "key" | "value": (B, rows, columns)}, float32.
    """
    vit, index = adapt(model), block_index(model, block)
    grid = patch_grid(model, images)
    qkv = vit.blocks[index].qkv(block_inputs(model, images, [index])[index])
    prefix = qkv.tokens.shape[1] - math.prod(grid)
    return {source: patch_norms(qkv[source], prefix).unflatten(1, grid) for source in PROJECTIONS}


def cls_attention(logits: Tensor, num_patches: int) -> Tensor:
    """Return the attention weights from `[CLS]` to the patches: logits (B, H, 1, T) -> (B, H, N)."""
    return logits.softmax(dim=-1)[:, :, 0, -num_patches:]


def patch_statistic(source: str, qkv: QKV, num_prefix_tokens: int, directions: Tensor | None = None,
                    logits: Tensor | None = None) -> Tensor:
    """Return a statistic of every patch in one block, (B, N) float32; see `ITAE.source`.

    Args:
        source: its name.
        qkv: of the block, with the tokens that enter it.
        num_prefix_tokens: number of tokens before the patches.
        directions: for "direction", from `singular_directions`.
        logits: the block's `QKV.cls_logits`, if they are known.
    """
    match source:
        case "token":
            return patch_norms(qkv.tokens, num_prefix_tokens)
        case "direction":
            tokens = qkv.tokens[:, num_prefix_tokens:].float()
            # Products of numbers, because autocast would round those of matrices.
            along = torch.stack([(tokens * each).sum(dim=-1) for each in directions.to(tokens).T]).norm(dim=0)
            return along / tokens.norm(dim=-1).clamp(min=torch.finfo(tokens.dtype).tiny)
        case "attention":
            logits = qkv.cls_logits if logits is None else logits
            return cls_attention(logits, logits.shape[-1] - num_prefix_tokens).mean(dim=1)
    return patch_norms(qkv[source], num_prefix_tokens)


def patch_statistics(qkv: QKV, num_prefix_tokens: int, directions: Tensor | None = None) -> dict[str, Tensor]:
    """Return every statistic of every patch in one block by name; no "direction" without directions."""
    return {source: patch_statistic(source, qkv, num_prefix_tokens, directions) for source in SOURCES
            if source != "direction" or directions is not None}
