"""The parts of a model that the method needs: its blocks, its patch grid, and the tokens that enter a block."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from timm.layers import Attention
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from itae_utils.errors import ItaeError
from itae_utils.method.layers import BlockAdapter, BlockInput, Dinov2Adapter, EvaAdapter, VitAdapter


@dataclass(frozen=True)
class ModelAdapter:
    """Adapter for a model: the method reads these parts and no others."""

    blocks: list[BlockAdapter]
    num_prefix_tokens: int               # the tokens before the patches, `[CLS]` and registers
    patch_size: tuple[int, int]          # height and width in pixels
    forward: Callable[[Tensor], object]  # runs images (B, 3, H, W) through all blocks


def _families() -> list[tuple[type, type, type, type[BlockAdapter]]]:
    """Return the classes of every supported model, its blocks and their attention, with the adapter for the blocks."""
    families = [(VisionTransformer, Block, Attention, VitAdapter), (Eva, EvaBlock, EvaAttention, EvaAdapter)]
    for name, prefix in [("dinov2", "Dinov2"), ("dinov2_with_registers", "Dinov2WithRegisters")]:
        # If the module is not imported, nobody has such a model. So `transformers` need not be installed.
        module = sys.modules.get(f"transformers.models.{name}.modeling_{name}")
        if module is not None:
            classes = [getattr(module, prefix + part) for part in ("Model", "Layer", "Attention")]
            families.append((*classes, Dinov2Adapter))
    return families


def adapt(model: nn.Module) -> ModelAdapter:
    """Return the adapter for a timm VisionTransformer or Eva, or a `transformers` Dinov2Model.

    Raises:
        ItaeError: no `[CLS]` token, or an unsupported class of model, block, attention or projection.
    """
    name = type(model).__name__
    classes = next((classes for model_class, *classes in _families() if isinstance(model, model_class)), None)
    if classes is None and hasattr(model, "model"):
        raise ItaeError(f"{name} is not a model but has one: pass its .model")
    if classes is None:
        raise ItaeError(f"{name} is not supported: use a timm VisionTransformer (DINO, DINOv2, CLIP, DeiT-III, MAE …) "
                        "or Eva (DINOv3, EVA), or a transformers Dinov2Model")
    if classes[-1] is Dinov2Adapter:
        registers, patch = getattr(model.config, "num_register_tokens", 0), model.config.patch_size
        blocks = _adapt_blocks(model.encoder.layer, "attention", *classes)
        return ModelAdapter(blocks, 1 + registers, (patch, patch), model)
    if model.cls_token is None:
        raise ItaeError(f"this {name} has no [CLS] token, whose attention the method edits: use a model that has one")
    blocks = _adapt_blocks(model.blocks, "attn", *classes)
    return ModelAdapter(blocks, model.num_prefix_tokens, model.patch_embed.patch_size, model.forward_features)


def _adapt_blocks(blocks: Sequence[nn.Module], attention_name: str, block_class: type, attention_class: type,
                  adapter: type[BlockAdapter]) -> list[BlockAdapter]:
    adapters = []
    for index, block in enumerate(blocks):
        _check_class(f"block {index}", block, block_class)
        _check_class(f"the attention of block {index}", getattr(block, attention_name), attention_class)
        adapters.append(adapter(block))
        for projection in adapters[-1].projections:
            if not isinstance(projection, nn.Linear):
                raise ItaeError(f"block {index} projects q, k, v with {type(projection).__name__}: merge LoRA weights "
                                "or dequantize to a plain Linear first")
    return adapters


def _check_class(name: str, module: nn.Module, supported: type) -> None:
    if not isinstance(module, supported):
        raise ItaeError(f"{name} is of class {type(module).__name__}, which is not supported: use a model with "
                        f"{supported.__name__}")


def patch_grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Return the patch grid (rows, columns) of `images` (B, 3, H, W) in `model`.

    Raises:
        ItaeError: `images` is not a batch, or a side is not a multiple of the patch size.
    """
    if images.ndim != 4:
        raise ItaeError(f"images have shape {tuple(images.shape)}: pass a batch (B, 3, H, W)")
    height, width = adapt(model).patch_size
    return patches_along(images.shape[-2], height), patches_along(images.shape[-1], width)


def patches_along(side: int, patch: int) -> int:
    """Return the number of patches along a side.

    Raises:
        ItaeError: the side is not a multiple of the patch size; the message names the nearest sizes.
    """
    if side < patch or side % patch:
        lower = max(1, side // patch) * patch
        raise ItaeError(f"image size {side} is not a multiple of the patch size {patch}: "
                        f"use {lower} or {lower + patch}")
    return side // patch


def block_index(model: nn.Module, block: int) -> int:
    """Return the index of a block counted from the front; negative numbers count from the end.

    Raises:
        ItaeError: the model has no such block.
    """
    depth = len(adapt(model).blocks)
    if not -depth <= block < depth:
        raise ItaeError(f"there is no block {block}: the model has {depth} (0 to {depth - 1}, or -{depth} to -1)")
    return block % depth


class _StopForward(Exception):
    """Ends a forward pass at the last block whose input is needed."""


def block_inputs(model: nn.Module, images: Tensor, blocks: Sequence[int]) -> dict[int, BlockInput]:
    """Return the inputs of `blocks` (counted from the front) in a forward pass over `images` (B, 3, H, W).

    The model itself runs, and stops at the last of these blocks.
    """
    vit, last = adapt(model), max(blocks)
    inputs: dict[int, BlockInput] = {}

    def capture(index: int, _module: nn.Module, args: tuple[Tensor], kwargs: dict[str, object]) -> None:
        inputs[index] = BlockInput(args[0], kwargs)
        if index == last:
            raise _StopForward

    handles = [vit.blocks[index].block.register_forward_pre_hook(partial(capture, index), with_kwargs=True)
               for index in blocks]
    try:
        vit.forward(images)
    except _StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def tokens_entering(model: nn.Module, images: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
    """Return the tokens (B, T, C) that enter each of `blocks` in a forward pass, by block."""
    return {index: inputs.tokens for index, inputs in block_inputs(model, images, blocks).items()}
