"""What the method needs of a model: is it handled, its blocks opened up, its patch grid, what enters a block."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from timm.layers import Attention
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from itae_utils.errors import ItaeError
from itae_utils.method.layers import BlockInput, Dinov2Layer, EvaLayer, Layer, VitLayer


class _DoorReached(Exception):
    """Raised at the last block of interest: everything after it is not needed."""


@dataclass(frozen=True)
class Anatomy:
    """What the method needs to know of a model.

    Attributes:
        layers: its blocks, opened up.
        num_prefix_tokens: `[CLS]` and whatever stands between it and the patches.
        patch_size: height and width in pixels.
        run: a forward pass over images (B, 3, H, W), through all blocks.
    """

    layers: list[Layer]
    num_prefix_tokens: int
    patch_size: tuple[int, int]
    run: Callable[[Tensor], object]


@dataclass(frozen=True)
class _Family:
    """Classes that go together: a model's, its blocks', and their attention's, with the adapter for the blocks."""

    model: type
    block: type
    attention: type
    layer: type[Layer]


def _families() -> list[_Family]:
    families = [_Family(VisionTransformer, Block, Attention, VitLayer), _Family(Eva, EvaBlock, EvaAttention, EvaLayer)]
    for name, prefix in [("dinov2", "Dinov2"), ("dinov2_with_registers", "Dinov2WithRegisters")]:
        module = sys.modules.get(f"transformers.models.{name}.modeling_{name}")
        if module is not None:  # else nobody can have such a model, and `transformers` need not be installed
            classes = [getattr(module, prefix + part) for part in ("Model", "Layer", "Attention")]
            families.append(_Family(*classes, Dinov2Layer))
    return families


def check_supported(model: nn.Module) -> None:
    """Refuse a model the method is not defined for, naming what stands in the way.

    Raises:
        ItaeError: no `[CLS]` token, or a model, block, attention or projection class that isn't handled.
    """
    anatomy(model)


def anatomy(model: nn.Module) -> Anatomy:
    """Open up a timm VisionTransformer or Eva, or a `transformers` Dinov2Model (with or without registers).

    Raises:
        ItaeError: as `check_supported`.
    """
    name = type(model).__name__
    family = next((family for family in _families() if isinstance(model, family.model)), None)
    if family is None and hasattr(model, "model"):
        raise ItaeError(f"{name} is no model but has one: give its .model")
    if family is None:
        raise ItaeError(f"{name} is not handled: give a timm VisionTransformer (DINO, DINOv2, CLIP, DeiT-III, MAE …) "
                        "or Eva (DINOv3, EVA), or a transformers Dinov2Model")
    if family.layer is Dinov2Layer:
        registers, patch = getattr(model.config, "num_register_tokens", 0), model.config.patch_size
        return Anatomy(_open(model.encoder.layer, "attention", family), 1 + registers, (patch, patch), model)
    if model.cls_token is None:
        raise ItaeError(f"this {name} has no [CLS] token, whose attention the method edits: choose one that has")
    return Anatomy(_open(model.blocks, "attn", family), model.num_prefix_tokens, model.patch_embed.patch_size,
                   model.forward_features)


def _open(blocks: Sequence[nn.Module], attends: str, family: _Family) -> list[Layer]:
    layers = []
    for index, block in enumerate(blocks):
        if not isinstance(block, family.block):
            raise ItaeError(f"block {index} is a {type(block).__name__}, which is not handled: "
                            f"{family.block.__name__} is")
        attention = getattr(block, attends)
        if not isinstance(attention, family.attention):
            raise ItaeError(f"block {index} attends with {type(attention).__name__}, which is not handled: "
                            f"{family.attention.__name__} is")
        layers.append(family.layer(block))
        for projection in layers[-1].projections_of:
            if not isinstance(projection, nn.Linear):
                raise ItaeError(f"block {index} projects q, k, v with {type(projection).__name__}: "
                                "merge adapters or dequantize to a plain Linear first")
    return layers


def check_images(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """The patch grid (rows, columns) that `images` (B, 3, H, W) have in `model`.

    Raises:
        ItaeError: not a batch of images, or a side that is not a multiple of the patch.
    """
    if images.ndim != 4:
        raise ItaeError(f"images have shape {tuple(images.shape)}: a batch (B, 3, H, W) is needed")
    height, width = anatomy(model).patch_size
    return patches_along(images.shape[-2], height), patches_along(images.shape[-1], width)


def patches_along(side: int, patch: int) -> int:
    """How many patches fit a side; an `ItaeError` names the nearest sizes where it is not a multiple of the patch."""
    if side < patch or side % patch:
        lower = max(1, side // patch) * patch
        raise ItaeError(f"image size {side} is not a multiple of the patch, {patch}: use {lower} or {lower + patch}")
    return side // patch


def block_index(model: nn.Module, block: int) -> int:
    """`block` counted from the front; negative numbers count from the end, as in a list."""
    depth = len(anatomy(model).layers)
    if not -depth <= block < depth:
        raise ItaeError(f"there is no block {block}: the model has {depth} (0 to {depth - 1}, or -{depth} to -1)")
    return block % depth


def block_inputs(model: nn.Module, images: Tensor, blocks: Sequence[int]) -> dict[int, BlockInput]:
    """What enters each of `blocks` (counted from the front); nothing after the last is computed.

    The model itself runs up to the door of that block, so its embedding, its norms and whatever it passes from block to
    block are its own.
    """
    caught: dict[int, BlockInput] = {}
    last, body = max(blocks), anatomy(model)

    def keep(index: int):
        def hook(_module, args, options):
            caught[index] = BlockInput(args[0], options)
            if index == last:
                raise _DoorReached

        return hook

    handles = [body.layers[index].block.register_forward_pre_hook(keep(index), with_kwargs=True) for index in blocks]
    try:
        body.run(images)
    except _DoorReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return caught


def tokens_entering(model: nn.Module, images: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
    """The tokens alone, (B, T, C), of `block_inputs`."""
    return {index: entering.tokens for index, entering in block_inputs(model, images, blocks).items()}
