"""Backbones by name: stock timm ViTs (also DINOv3 and EVA) with weights, preprocessing, device and precision."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
from PIL.Image import Image
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from itae_utils.errors import ItaeError, unknown_name
from itae_utils.method.anatomy import adapt, patches_along
from itae_utils.method.artifacts import FiringRule
from itae_utils.models import demo
from itae_utils.models.checkpoints import loading_options, model_from_checkpoint, read_checkpoint, tensors_named
from itae_utils.models.compiled import compile_blocks
from itae_utils.models.device import resolve_device
from itae_utils.models.hub import published_weights
from itae_utils.models.pos_embed import resolve_pos_embed, use_rule
from itae_utils.models.preprocessing import Preprocessing, make_transform, resolve_resize
from itae_utils.models.registry import BACKBONES, PRECISIONS, PREPROCESSING, timm_name_of
from itae_utils.models.weight_files import ENDINGS

Kind = Literal["published", "local", "random", "embedded"]
LAYER_SCALE = ("ls1.gamma", "ls2.gamma", ".gamma_1", ".gamma_2")  # in a VisionTransformer, in an Eva


@dataclass(frozen=True)
class Backbone:
    """A stock ViT with its preprocessing, device and precision. Other fields are as in `load_backbone`.

    Attributes:
        model: the timm module, in eval mode. Only `pos_embed` and `compiled` can change how it computes.
        transform: PIL image -> (3, S, S) float tensor, where S is `image_size`. `load_backbone` sets a `Preprocessing`.
        source: description of the weights and where they come from.
        kind: "published" weights are those that timm names on the hub, "local" ones were given as a checkpoint,
            "random" ones are untrained, "embedded" ones are part of this package.
        truth: rule that identifies the artifacts of a backbone with planted ones; None for all other backbones.
        weights_sha256: SHA-256 over the names, types and bytes of all weights, in order.
        resize: "pil" resizes and normalises a data set's images with `transform` when they are loaded, "device" in
            batches with `DevicePreprocessing`.
    """

    name: str
    model: nn.Module = field(repr=False)
    transform: Callable = field(repr=False)
    image_size: int
    preprocess: str
    device: torch.device
    precision: str
    source: str
    kind: Kind
    truth: FiringRule | None
    weights_sha256: str
    pos_embed: str = "timm"
    resize: str = "pil"
    compiled: bool = False

    @property
    def dim(self) -> int:
        """Return the width of a token."""
        return self.model.embed_dim

    @property
    def num_blocks(self) -> int:
        """Return the number of transformer blocks."""
        return len(self.model.blocks)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Return the rows and columns of patches in a square image of `image_size`."""
        rows, columns = self.model.patch_embed.patch_size
        return self.image_size // rows, self.image_size // columns

    @property
    def preprocessing(self) -> Preprocessing:
        """Return `transform`; raise an `ItaeError` if it is not a `Preprocessing`."""
        if not isinstance(self.transform, Preprocessing):
            raise ItaeError(f"transform is a {type(self.transform).__name__}: pictures and resize='device' need the "
                            "transform that load_backbone sets")
        return self.transform

    def picture(self, image: Image) -> np.ndarray:
        """Return the image as the model sees it, resized and cropped: (S, S, 3) in [0, 1]."""
        return self.preprocessing.undo(self.preprocessing(image))

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context in which to run the model: bfloat16 autocast, or a null context for fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def load_backbone(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    image_size: int | None = None,
    preprocess: Literal["resize", "meta-eval", "pad"] = "resize",
    pos_embed: Literal["auto", "meta", "transformers", "timm"] = "auto",
    device: str | torch.device = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    resize: Literal["auto", "pil", "device"] = "auto",
    compile: bool = False,
) -> Backbone:
    """Load a ViT by name, with `num_classes=0` and `global_pool="token"`, for any image size that its patch divides.

    Args:
        name: "demo", "demo-clean", a DINOv2 checkpoint ("dinov2_vits14" … "dinov2_vitg14_reg"), or any timm ViT name.
        checkpoint: local weights instead of a download: a file in timm's layout or Meta's, also from training with
            DINO, Lightning or timm, or a folder of the hub, of timm or of `transformers` (DINOv2). `source` of the
            result says which part was taken and what was left out.
        pretrained: False gives random weights of a fixed seed. Their LayerScale factors are 1: timm starts DINOv2's and
            DINOv3's at 1e-5, which gives all images the same feature up to rounding.
        image_size: pixels per side; None is 28 for the demo, 224 for DINOv2, and the model's own for others.
        preprocess: "resize" resizes the whole image to that size; "meta-eval" resizes the short side to 8/7 of it and
            crops the centre (256 and 224 at the usual size). "pad" keeps the aspect ratio: the long side is resized to
            that size, and the rest is padded with the mean colour. Padding makes patches of its own.
        pos_embed: rule that resizes the position embedding if the image size is not the model's own. "auto" is Meta's
            for DINOv2, whose checkpoints were published with it, and timm's for all others. "transformers" is that of
            this library since September 2024.
        device: a name of torch's, or a `torch.device`; "auto" is CUDA if available, else the CPU.
        precision: "auto" is fp32 on a CPU and bf16 on CUDA.
        resize: "pil" resizes and normalises a data set's images one by one on the CPU, "device" in batches; the two
            differ by at most 2 of 255 levels, and by 0.05 on average. "auto" is "device" on CUDA, else "pil".
        compile: run the blocks through torch.compile. This needs a compiler, takes time at the first batch, and can
            change the last bits of the features.

    Raises:
        ItaeError: an unknown name, a model that the method does not support, a size that the patch does not divide, or
            weights that are missing, do not fit or can't be downloaded.
    """
    for argument, value in {"pretrained": pretrained, "compile": compile}.items():
        if not isinstance(value, bool):
            raise ItaeError(f"{argument}={value!r} is not True or False")
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, (int, np.integer))):
        raise ItaeError(f"image_size={image_size!r} is not a whole number of pixels: images are square, give one side")
    if preprocess not in PREPROCESSING:
        raise ItaeError(f"preprocess={preprocess!r} is not known: use one of {', '.join(PREPROCESSING)}")
    device = resolve_device(device)
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision not in PRECISIONS:
        raise ItaeError(f"precision={precision!r} is not known: use auto, {' or '.join(PRECISIONS)}")

    timm_name = timm_name_of(name)
    pos_embed = resolve_pos_embed(pos_embed, timm_name)
    structure = stock_model(name)
    config = demo.CONFIG
    if timm_name is not None:
        config = resolve_data_config(pretrained_cfg=get_pretrained_cfg(timm_name).to_dict())
    if image_size is None:
        image_size = BACKBONES[name].image_size if name in BACKBONES else config["input_size"][-1]
    image_size = int(image_size)
    patches_along(image_size, structure.patch_embed.patch_size[0])  # a wrong size is refused before any download
    resize = resolve_resize(resize, device, config)
    with torch.random.fork_rng(devices=[]):  # a new model draws initial weights, even if others replace them
        if timm_name is None:
            model, source, kind = _load_demo(name, checkpoint, pretrained)
        else:
            model, source, kind = _load_timm(name, checkpoint, pretrained)
    if pos_embed != "timm":
        use_rule(model, pos_embed)
    if compile:
        compile_blocks(model)
    return Backbone(
        name=name, image_size=image_size, preprocess=preprocess, device=device, precision=precision,
        source=source, kind=kind, pos_embed=pos_embed, resize=resize, compiled=compile,
        model=model.eval().requires_grad_(False).to(device),
        transform=make_transform(image_size, preprocess, config),
        truth=demo.truth() if (name, kind) == ("demo", "embedded") else None,
        weights_sha256=weights_sha256(model),
    )


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 over the names, types and bytes of a model's weights, in order."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def reset_layer_scale(model: nn.Module) -> bool:
    """Set the factors of LayerScale to 1 in every block; return whether the model has any."""
    factors = [parameter for name, parameter in model.named_parameters() if name.endswith(LAYER_SCALE)]
    for factor in factors:
        nn.init.ones_(factor)
    return bool(factors)


def _load_demo(name: str, checkpoint: str | Path | None, pretrained: bool) -> tuple[nn.Module, str, Kind]:
    if checkpoint is not None:
        raise ItaeError(f"{name} has its own weights: use a timm name with checkpoint={str(checkpoint)!r}")
    if not pretrained:
        return _untrained(demo.build_model, "the demo's architecture")
    return demo.load_model(planted=name == "demo"), BACKBONES[name].origin, "embedded"


def _untrained(build: Callable[[], nn.Module], architecture: str) -> tuple[nn.Module, str, Kind]:
    torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs, too
    model = build()
    weights = "random weights, LayerScale 1" if reset_layer_scale(model) else "random weights"
    return model, f"{architecture} with {weights}", "random"


def stock_model(name: str) -> nn.Module:
    """Return a backbone's model on the meta device, without weights; raise an error if it is unknown or unsupported."""
    timm_name = timm_name_of(name)
    if timm_name is None:
        with torch.device("meta"):
            return demo.build_model()
    if not _in_timm(timm_name):
        raise _unknown(name)
    with torch.device("meta"):
        model = timm.create_model(timm_name, num_classes=0)
    adapt(model)  # raises an error if the model is not supported
    return model


def _in_timm(name: str) -> bool:
    try:
        return timm.is_model(name) and get_pretrained_cfg(name) is not None
    except RuntimeError:  # timm's answer to an unknown tag
        return False


def _unknown(name: str) -> ItaeError:
    """Return the error for an unknown name, which suggests ours for those of the hub and for other spellings."""
    if os.path.exists(name) or name.endswith(ENDINGS):
        return ItaeError(f"backbone {name!r} is a file or folder, not a name: give it as checkpoint, and the name "
                         "of its architecture as the backbone")
    plain = name.rpartition("/")[2].casefold().replace("-", "_")
    if found := re.fullmatch(r"dinov2_(with_registers_)?(small|base|large|giant)(_reg)?", plain):
        plain = f"dinov2_vit{found[2][0]}14{'_reg' if found[1] or found[3] else ''}"
    if plain in BACKBONES or _in_timm(plain):
        return ItaeError(f"unknown backbone {name!r}: use {plain}")
    return unknown_name("backbone", name, [*BACKBONES, *timm.list_models(["vit*", "eva*"])],
                        "`itae backbones` lists ours, timm.list_models() those of timm")


def _load_timm(name: str, checkpoint: str | Path | None, pretrained: bool) -> tuple[nn.Module, str, Kind]:
    timm_name = timm_name_of(name)
    options = loading_options(name)
    if checkpoint is not None:
        return *model_from_checkpoint(name, checkpoint, **options), "local"
    if not pretrained:
        return _untrained(partial(timm.create_model, timm_name, **options), timm_name)
    source = BACKBONES[name].origin if name in BACKBONES else f"{timm_name}, through timm"
    overlay = {"state_dict": read_checkpoint(published_weights(timm_name))}
    try:
        model = timm.create_model(timm_name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except (RuntimeError, KeyError, OSError, AttributeError) as error:
        raise ItaeError(f"the weights for {name} from {source} can't be loaded: {tensors_named(error)}") from error
    return model, source, "published"
