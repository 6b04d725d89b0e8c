"""The parts of a model that the method needs: its blocks, its patch grid, and the tokens that enter a block."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Integral

import torch
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
    model: nn.Module
    forward: Callable[[Tensor], object]  # runs images (B, 3, H, W) through all blocks

    def run(self, images: Tensor) -> None:
        """Run images (B, 3, H, W) through all blocks, and through the hooks on them."""
        in_place = any(module._compiled_call_impl is not None for module in self.model.modules())
        with without_compiled_code() if in_place else nullcontext():
            self.forward(images)


_eager = ExitStack()
_eager_contexts: list[None] = []  # one for each that is open; they may close in any order


@contextmanager
def without_compiled_code() -> Iterator[None]:
    """While open, torch.compile's code is not used, which ignores hooks that are added after it was made."""
    if not _eager_contexts:
        _eager.enter_context(torch.compiler.set_stance("force_eager"))
    _eager_contexts.append(None)
    try:
        yield
    finally:
        _eager_contexts.pop()
        if not _eager_contexts:
            _eager.close()


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
    classes = next((classes for model_class, *classes in _families() if isinstance(model, model_class)), None)
    if classes is None:
        raise _unsupported(model)
    if classes[-1] is Dinov2Adapter:
        registers, patch = getattr(model.config, "num_register_tokens", 0), model.config.patch_size
        blocks = _adapt_blocks(model.encoder.layer, "attention", *classes)
        return ModelAdapter(blocks, 1 + registers, (patch, patch), model, model)
    if model.cls_token is None:
        raise ItaeError(f"this {type(model).__name__} has no [CLS] token, whose attention the method edits: use a "
                        "model that has one")
    blocks = _adapt_blocks(model.blocks, "attn", *classes)
    return ModelAdapter(blocks, model.num_prefix_tokens, model.patch_embed.patch_size, model, model.forward_features)


def _unsupported(model: object) -> ItaeError:
    """Return the error for a model of another class; it names the models inside a wrapper, such as `.module`."""
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if not isinstance(model, nn.Module):
        inside = ["model"] if hasattr(model, "model") else []
    else:
        supported = tuple(model_class for model_class, *_ in _families())
        found = {path: module for path, module in model.named_modules() if isinstance(module, supported)}
        inside = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
        if inside:
            adapt(found[inside[0]])  # raises an error if the model inside is of no use either
    if inside:
        places = " or ".join(re.sub(r"\.(\d+)\b", r"[\1]", f".{path}") for path in inside)
        return ItaeError(f"{kind} is not a model but has one: pass its {places}")
    return ItaeError(f"{kind} is not supported: use a timm VisionTransformer (DINO, DINOv2, CLIP, DeiT-III, MAE …) "
                     "or Eva (DINOv3, EVA), or a transformers Dinov2Model")


def _adapt_blocks(blocks: Sequence[nn.Module], attention_name: str, block_class: type, attention_class: type,
                  adapter: type[BlockAdapter]) -> list[BlockAdapter]:
    adapters = []
    for index, block in enumerate(blocks):
        _check_class(f"block {index}", block, block_class)
        _check_class(f"the attention of block {index}", getattr(block, attention_name), attention_class)
        adapters.append(adapter(block))
        for projection in adapters[-1].projections:
            _check_not_compiled(f"the projection of block {index}", projection)
            if not isinstance(projection, nn.Linear):
                raise ItaeError(f"block {index} projects q, k, v with {type(projection).__name__}: merge LoRA weights "
                                "(merge_and_unload()) or dequantize to a plain Linear first")
    return adapters


def _check_class(name: str, module: nn.Module, supported: type) -> None:
    _check_not_compiled(name, module)
    if not isinstance(module, supported):
        raise ItaeError(f"{name} is of class {type(module).__name__}, which is not supported: use a model with "
                        f"{supported.__name__}")


def _check_not_compiled(name: str, module: nn.Module) -> None:
    if hasattr(module, "_orig_mod"):
        raise ItaeError(f"{name} was replaced by torch.compile(…): use the model without it, or load_backbone(name, "
                        "compile=True)")


def patch_grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Return the patch grid (rows, columns) of `images` (B, 3, H, W) in `model`.

    Raises:
        ItaeError: `images` is not a batch of preprocessed images on the model's device, or a side is not a multiple of
            the patch size.
    """
    _check_images(model, images)
    height, width = adapt(model).patch_size
    return patches_along(images.shape[-2], height), patches_along(images.shape[-1], width)


def _check_images(model: nn.Module, images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise ItaeError(f"images are a {type(images).__name__}: pass a float tensor (B, 3, H, W), such as "
                        "torch.stack([backbone.transform(image)])")
    weight = next(module for module in model.modules() if isinstance(module, nn.Conv2d)).weight  # of the patches
    channels = weight.shape[1]
    if images.ndim != 4 or images.shape[1] != channels:
        raise ItaeError(f"images have shape {tuple(images.shape)}: pass a batch (B, {channels}, H, W), channels first")
    if not images.is_floating_point():
        raise ItaeError(f"images are {images.dtype}: pass preprocessed floats, such as backbone.transform(image)")
    if images.device != weight.device:
        raise ItaeError(f"images are on {images.device}: the model is on {weight.device}, use images.to(…)")
    if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
        raise ItaeError(f"images are {images.dtype}: the model is {weight.dtype}, use images.to(…)")


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
    if isinstance(block, bool) or not isinstance(block, Integral) or not -depth <= block < depth:
        raise ItaeError(f"there is no block {block!r}: the model has {depth} (0 to {depth - 1}, or -{depth} to -1)")
    return block % depth


class _StopForward(Exception):
    """Ends a forward pass at the last block whose input is needed."""


def block_inputs(model: nn.Module, images: Tensor, blocks: Sequence[int], kept: Collection[int] | None = None
                 ) -> dict[int, BlockInput]:
    """Return the inputs of `blocks` (counted from the front) in a forward pass over `images` (B, 3, H, W).

    The model itself runs, and stops at the last of these blocks. Other inputs than those `kept` lack their tokens.
    """
    vit, last = adapt(model), max(blocks)
    inputs: dict[int, BlockInput] = {}

    def capture(index: int, _module: nn.Module, args: tuple[Tensor], kwargs: dict[str, object]) -> None:
        inputs[index] = BlockInput(args[0] if kept is None or index in kept else None, kwargs)
        if index == last:
            raise _StopForward

    handles = [vit.blocks[index].block.register_forward_pre_hook(partial(capture, index), with_kwargs=True)
               for index in blocks]
    try:
        vit.run(images)
    except _StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if last not in inputs:
        raise ItaeError("the model ran code that ignores hooks: leave torch.compile away, or use load_backbone(name, "
                        "compile=True)")
    return inputs


def tokens_entering(model: nn.Module, images: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
    """Return the tokens (B, T, C) that enter each of `blocks` in a forward pass, by block."""
    return {index: inputs.tokens for index, inputs in block_inputs(model, images, blocks).items()}
