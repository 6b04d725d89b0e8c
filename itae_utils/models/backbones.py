"""Backbones by name: stock timm ViTs (DINOv3 and EVA too) with their weights, preprocessing, device and precision."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
from PIL.Image import Image
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg
from timm.models.eva import Eva
from torch import Tensor, nn

from itae_utils.errors import ItaeError, unknown_name
from itae_utils.method.anatomy import check_supported, patches_along
from itae_utils.method.artifacts import FiringRule
from itae_utils.models import demo
from itae_utils.models.checkpoints import model_from_checkpoint, read_checkpoint, tensors_named
from itae_utils.models.compiled import compile_blocks
from itae_utils.models.hub import published_weights
from itae_utils.models.pos_embed import resolve_pos_embed, use_meta_rule
from itae_utils.models.preprocessing import make_transform, resolve_resize
from itae_utils.models.registry import BACKBONES, PRECISIONS, PREPROCESSING


@dataclass(frozen=True)
class Backbone:
    """A stock ViT, ready to use.

    Attributes:
        name: what was asked for.
        model: the timm module, in eval mode, untouched but for the resize of its position embedding (`pos_embed`)
            and for `compiled`.
        transform: PIL image -> (3, H, W) float tensor.
        image_size: side in pixels that `transform` makes.
        preprocess: "resize" or "meta-eval".
        device: where the model is.
        precision: "fp32" or "bf16".
        source: where the weights come from, in words.
        truth: the rule that tells the true artifacts, for a planted backbone; else None.
        weights_sha256: over the names, types and bytes of all weights, in order.
        pos_embed: whose rule resizes the position embedding to other input sizes: "timm" or "meta".
        resize: where a data set's images are resized and normalised: "pil", by `transform` where they are loaded, or
            "device", in batches (`itae_utils.preprocessing.DevicePreprocessing`).
        compiled: the model's blocks run through torch.compile.
    """

    name: str
    model: nn.Module = field(repr=False)
    transform: Callable = field(repr=False)
    image_size: int
    preprocess: str
    device: torch.device
    precision: str
    source: str
    truth: FiringRule | None
    weights_sha256: str
    pos_embed: str = "timm"
    resize: str = "pil"
    compiled: bool = False

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.model.embed_dim

    @property
    def num_blocks(self) -> int:
        """Depth."""
        return len(self.model.blocks)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patches in a column and in a row of a square image of `image_size`."""
        rows, columns = self.model.patch_embed.patch_size
        return self.image_size // rows, self.image_size // columns

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which to run the model: bfloat16 autocast, or nothing for fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def load_backbone(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    image_size: int | None = None,
    preprocess: Literal["resize", "meta-eval"] = "resize",
    pos_embed: Literal["auto", "meta", "timm"] = "auto",
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    resize: Literal["auto", "pil", "device"] = "auto",
    compile: bool = False,
) -> Backbone:
    """Load a ViT by name, with `num_classes=0`, `global_pool="token"` and any image size its patch divides.

    Args:
        name: "demo", "demo-clean", a DINOv2 checkpoint ("dinov2_vits14" … "dinov2_vitg14_reg"), or any timm ViT name.
        checkpoint: local weights instead of the download: a .safetensors or .pth file in timm's layout or Meta's, or a
            folder of `transformers` (config.json and model.safetensors).
        pretrained: False gives random weights of a fixed seed.
        image_size: pixels a side; None is 28 for the demo, 224 for DINOv2, else the model's own.
        preprocess: "resize" brings the whole image to the size; "meta-eval" resizes the short side to 8/7 of it and
            crops the centre (256 and 224 at the usual size).
        pos_embed: whose rule resizes the position embedding where the image size is not the model's own. "auto" is
            Meta's for DINOv2, as its checkpoints were published, and timm's for all others.
        device: "auto" takes CUDA where there is one.
        precision: "auto" is fp32 on a CPU, bf16 on CUDA.
        resize: where a data set's images are resized and normalised: "pil", on the CPU one by one, or "device", in
            batches, at most 2 of 255 levels from that and 0.05 on average. "auto" is "device" on CUDA, else "pil".
        compile: run the blocks through torch.compile, which costs its time at the first batch and needs a compiler. It
            can change the last bits of the features.

    Raises:
        ItaeError: unknown name, a model the method can't handle, a size the patch doesn't divide, weights that are
            missing, don't fit or can't be downloaded.
    """
    if preprocess not in PREPROCESSING:
        raise ItaeError(f"preprocess={preprocess!r} is not known: use one of {', '.join(PREPROCESSING)}")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision not in PRECISIONS:
        raise ItaeError(f"precision={precision!r} is not known: use auto, {' or '.join(PRECISIONS)}")

    timm_name = BACKBONES[name].timm_name if name in BACKBONES else name
    pos_embed = resolve_pos_embed(pos_embed, timm_name)
    build = _build_demo if timm_name is None else _build_timm
    model, config, source, truth = build(name, checkpoint, pretrained)
    check_supported(model)
    if image_size is None:
        image_size = BACKBONES[name].image_size if name in BACKBONES else config["input_size"][-1]
    patches_along(image_size, model.patch_embed.patch_size[0])
    resize = resolve_resize(resize, device, config)
    if pos_embed == "meta":
        use_meta_rule(model)
    if compile:
        compile_blocks(model)
    return Backbone(
        name=name,
        model=model.eval().requires_grad_(False).to(device),
        transform=make_transform(image_size, preprocess, config),
        image_size=image_size,
        preprocess=preprocess,
        device=device,
        precision=precision,
        source=source,
        truth=truth,
        weights_sha256=weights_sha256(model),
        pos_embed=pos_embed,
        resize=resize,
        compiled=compile,
    )


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the names, types and bytes of a model's weights, in order."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _build_demo(name: str, checkpoint: str | Path | None, pretrained: bool):
    if checkpoint is not None:
        raise ItaeError(f"{name} carries its weights: checkpoint={str(checkpoint)!r} goes with a timm name")
    if not pretrained:
        return _seeded(demo.build_model), demo.CONFIG, "the demo's architecture with random weights", None
    planted = name == "demo"
    return demo.load_model(planted), demo.CONFIG, BACKBONES[name].origin, demo.truth() if planted else None


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def stock_model(name: str) -> nn.Module:
    """The timm model behind a backbone's name, without weights.

    Raises:
        ItaeError: a name or tag that timm doesn't know, a model the method can't handle.
    """
    timm_name = BACKBONES[name].timm_name if name in BACKBONES else name
    try:
        known = timm.is_model(timm_name) and get_pretrained_cfg(timm_name)
    except RuntimeError:  # the tag behind the name is none
        known = None
    if not known:
        raise unknown_name("backbone", name, [*BACKBONES, *timm.list_models(["vit*", "eva*"])], "`itae backbones`")
    with torch.device("meta"):
        model = timm.create_model(timm_name, num_classes=0)
    check_supported(model)
    return model


def _build_timm(name: str, checkpoint: str | Path | None, pretrained: bool):
    timm_name = BACKBONES[name].timm_name if name in BACKBONES else name
    options = {"num_classes": 0, "global_pool": "token", "dynamic_img_size": True}
    stock = stock_model(name)  # its class is known without weights: refused before a download
    if isinstance(stock, Eva) and isinstance(stock.norm, torch.nn.Identity):
        options["use_fc_norm"] = True  # where EVA's weights have the final norm: pooling by token would move it
    if checkpoint is not None:
        model = model_from_checkpoint(timm_name, checkpoint, **options)
        kind = "folder" if Path(checkpoint).is_dir() else "file"
        return model, _config(timm_name), f"local {kind} {Path(checkpoint).name}", None
    if not pretrained:
        model = _seeded(lambda: timm.create_model(timm_name, **options))
        return model, _config(timm_name), f"{timm_name} with random weights", None
    source = BACKBONES[name].origin if name in BACKBONES else f"{timm_name}, through timm"
    overlay = {"state_dict": read_checkpoint(published_weights(timm_name))}
    try:
        model = timm.create_model(timm_name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except (RuntimeError, KeyError, OSError, AttributeError) as error:
        raise ItaeError(f"the weights for {name} from {source} can't be loaded: {tensors_named(error)}") from error
    return model, _config(timm_name), source, None


def _config(timm_name: str) -> dict:
    return resolve_data_config(pretrained_cfg=get_pretrained_cfg(timm_name).to_dict())


def picture(backbone: Backbone, image: Image) -> np.ndarray:
    """The image as the backbone gets it, after resizing and cropping, for looking at: (H, W, 3) in [0, 1]."""
    return undo_normalization(backbone, backbone.transform(image))


def undo_normalization(backbone: Backbone, tensor: Tensor) -> np.ndarray:
    """What a preprocessed image (3, H, W) looks like: (H, W, 3) in [0, 1]."""
    normalize = backbone.transform.transforms[-1]
    return np.clip(tensor.permute(1, 2, 0).numpy() * np.array(normalize.std) + np.array(normalize.mean), 0, 1)
