"""The parts of a stock timm ViT that the method touches: what is supported, tokens at a block's door, q, k and v."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from itae_utils.errors import ItaeError

if TYPE_CHECKING:
    from torch import Tensor, nn

SOURCES = ("query", "key", "value")  # in the order in which a qkv projection holds them


class _DoorReached(Exception):
    """Raised at the last block of interest: everything after it is not needed."""


def check_supported(model: nn.Module) -> None:
    """Refuse a model the method is not defined for, naming what stands in the way.

    Raises:
        ItaeError: no `[CLS]` token, or a model, block, attention or projection class that isn't handled.
    """
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, VisionTransformer
    from torch import nn

    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise ItaeError(f"{name} is not handled: give a timm VisionTransformer (DINO, DINOv2, CLIP, DeiT-III, MAE …)")
    if model.cls_token is None:
        raise ItaeError(f"this {name} has no [CLS] token, whose attention the method edits: choose one that has")
    for index, block in enumerate(model.blocks):
        attention = getattr(block, "attn", None)
        if not isinstance(block, Block):
            raise ItaeError(f"block {index} is a {type(block).__name__}, which is not handled: timm's Block is")
        if not isinstance(attention, Attention):
            raise ItaeError(f"block {index} attends with {type(attention).__name__}, which is not handled: "
                            "timm.layers.Attention is")
        if not isinstance(attention.qkv, nn.Linear):
            raise ItaeError(f"block {index} projects q, k, v with {type(attention.qkv).__name__}: "
                            "merge adapters or dequantize to a plain Linear first")


def check_images(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """The patch grid (rows, columns) that `images` (B, 3, H, W) have in `model`.

    Raises:
        ItaeError: not a batch of images, or a side that is not a multiple of the patch.
    """
    if images.ndim != 4:
        raise ItaeError(f"images have shape {tuple(images.shape)}: a batch (B, 3, H, W) is needed")
    height, width = model.patch_embed.patch_size
    return patches_along(images.shape[-2], height), patches_along(images.shape[-1], width)


def patches_along(side: int, patch: int) -> int:
    """How many patches fit a side; an `ItaeError` names the nearest sizes where it is not a multiple of the patch."""
    if side < patch or side % patch:
        lower = max(1, side // patch) * patch
        raise ItaeError(f"image size {side} is not a multiple of the patch, {patch}: use {lower} or {lower + patch}")
    return side // patch


def block_index(model: nn.Module, block: int) -> int:
    """`block` counted from the front; negative numbers count from the end, as in a list."""
    depth = len(model.blocks)
    if not -depth <= block < depth:
        raise ItaeError(f"there is no block {block}: the model has {depth} (0 to {depth - 1}, or -{depth} to -1)")
    return block % depth


def tokens_entering(model: nn.Module, images: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
    """The tokens (B, T, C) that enter each of `blocks` (counted from the front); nothing after the last is computed.

    The model itself runs up to the door of that block, so its embedding, its norms and whatever it passes from block to
    block are its own.
    """
    caught: dict[int, Tensor] = {}
    last = max(blocks)

    def keep(index: int):
        def hook(_module, args):
            caught[index] = args[0]
            if index == last:
                raise _DoorReached

        return hook

    handles = [model.blocks[index].register_forward_pre_hook(keep(index)) for index in blocks]
    try:
        model.forward_features(images)
    except _DoorReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return caught


def split_heads(attention: nn.Module, projected: Tensor) -> Tensor:
    """The last dimension of `projected` (B, T, parts · H · d) cut into (parts, B, H, T, d)."""
    batch, tokens, _ = projected.shape
    return projected.view(batch, tokens, -1, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
