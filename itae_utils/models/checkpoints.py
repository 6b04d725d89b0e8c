"""Local checkpoints for timm ViTs, in timm's layout, Meta's or that of `transformers`.

Tensors of `transformers` are renamed to Meta's layout, and timm converts Meta's layout to its own. A checkpoint with
missing or unexpected tensors is refused, so no weight keeps its random initial value.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import textwrap
from pathlib import Path

import timm
import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from itae_utils.errors import ItaeError
from itae_utils.models.registry import timm_name_of
from itae_utils.models.state_dicts import state_dicts, vit_in
from itae_utils.models.transformers_layout import check_config, meta_layout
from itae_utils.models.weight_files import read_config, read_file, refused, some, weight_files

REGISTERS = ("reg_token", "register_tokens", "storage_tokens")  # timm's name, DINOv2's, DINOv3's
DINOV2 = {(384, 12): "s", (768, 12): "b", (1024, 24): "l", (1536, 40): "g"}  # width and blocks of the sizes

log = logging.getLogger("itae_utils")


def model_from_checkpoint(name: str, path: str | Path, **options: object) -> tuple[nn.Module, str]:
    """Return a timm model with local weights, and a description of them that says what was decided.

    The model's own image size is that of the weights' position embedding. Half precision becomes float32.

    Args:
        name: a backbone's name or timm's. It also defines the number of attention heads, which no tensor's shape shows.
        path: a file of weights, or a folder of the hub, of timm or of `transformers`; ~ is the home folder.
        options: for `timm.create_model`.

    Raises:
        ItaeError: the weights are unreadable, of another architecture, quantised, not finite or from sharded training,
            or tensors are missing or unexpected.
    """
    path = _path(path)
    weights, size, said = _fitted(name, path, options)
    model = _loaded(name, path, weights, **size, **options)
    if bad := [key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise refused(path, f"holds NaN or infinity in {some(bad)}", "give an earlier checkpoint of that training")
    log.info("checkpoint %s: %s", path, "; ".join(said) or "loaded as it is")
    source = f"local {'folder' if path.is_dir() else 'file'} {path.name}"
    return model, f"{source} ({'; '.join(said)})" if said else source


def check_checkpoint(name: str, path: str | Path, **options: object) -> None:
    """Validate names and shapes of a checkpoint's tensors against a backbone, without reading their values.

    Raises:
        ItaeError: as in `model_from_checkpoint`, but for values that are not finite.
    """
    path = _path(path)
    options = loading_options(name) | options
    weights, size, _ = _fitted(name, path, options, "meta")
    with torch.device("meta"):
        _loaded(name, path, weights, **size, **options)


def loading_options(name: str) -> dict[str, object]:
    """Return timm's options for a backbone that takes any image size and returns its [CLS] token."""
    options = {"num_classes": 0, "global_pool": "token", "dynamic_img_size": True}
    with torch.device("meta"):
        model = timm.create_model(timm_name_of(name), num_classes=0)
    if isinstance(model, Eva) and isinstance(model.norm, nn.Identity):
        options["use_fc_norm"] = True  # keeps the final norm where EVA's weights have it; token pooling would move it
    return options


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of published weights by name; never run pickled code."""
    tensors = max((tensors for _, tensors in state_dicts(read_file(path))), key=len, default=None)
    if tensors is None:
        raise refused(path, "holds no state dict of tensors", "delete it, so that it is downloaded again")
    return tensors


def _path(path: str | Path) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise ItaeError(f"checkpoint is {path!r}, not a path: give a file or folder of weights" if not path else
                        f"checkpoint is a {type(path).__name__}, not a path: give a file or folder of weights")
    return Path(os.path.expanduser(path))


def _fitted(
    name: str, path: Path, options: dict[str, object], device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, int], list[str]]:
    """Return the ViT's tensors with names that timm takes, its own image size as an option, and what was decided."""
    try:
        files, said = weight_files(path)
    except OSError as error:
        raise refused(path, "can't be read", error.strerror or type(error).__name__) from error
    content = {}
    for file in files:
        part = read_file(file)
        if doubles := content.keys() & part.keys():
            raise refused(file, f"repeats {some(sorted(doubles))} of another part", "give parts of one model")
        content |= part
    weights, choices = vit_in(path, content)
    said += choices
    weights = {key: tensor.to(device) for key, tensor in weights.items()}
    with torch.device("meta"):
        model = timm.create_model(timm_name_of(name), **options)
    config = files[0].parent / "config.json"
    if "embeddings.patch_embeddings.projection.weight" in weights:
        check_config(name, path, config, model)
        weights = meta_layout(weights)
    elif path.is_dir() and config.is_file():
        architecture, ours = read_config(path, config).get("architecture"), timm_name_of(name).partition(".")[0]
        if isinstance(architecture, str) and architecture.partition(".")[0] != ours:
            raise refused(path, f"is of the architecture {architecture!r}, not {ours!r}", "use that backbone, or "
                          f"give the file {files[0].name} in it if the two agree")
    if "register_tokens" in weights or "blocks.0.mlp.w12.weight" in weights:
        weights.setdefault("mask_token", weights.get("cls_token"))  # timm recognises Meta's layout by it, then drops it
    _check_architecture(name, path, weights, model)
    return weights, _native_size(path, weights, model), said


def _loaded(name: str, path: Path, weights: dict[str, Tensor], **options: object) -> nn.Module:
    """Return timm's model with the weights; on the meta device, only names and shapes are compared."""
    overlay = {"state_dict": weights, "num_classes": 0, "classifier": None}  # a classifier makes timm ignore gaps
    try:
        with contextlib.redirect_stdout(None):  # timm prints a line for each bias that DINOv3 leaves out
            return timm.create_model(timm_name_of(name), pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except (RuntimeError, KeyError, AttributeError, ValueError) as error:
        raise refused(path, f"does not fit {name}", tensors_named(error)) from error


def tensors_named(error: Exception) -> str:
    """Return torch's list of missing, unexpected and misshapen tensors in one line of at most about 600 characters."""
    lines = str(error).strip().splitlines()
    lines = lines[1:] or lines  # the first line names the model class
    text = "; ".join(textwrap.shorten(line, 200, placeholder=" …") for line in lines[:3])
    return f"{text} and {len(lines) - 3} more" if len(lines) > 3 else text


def _architecture(weights: dict[str, Tensor]) -> str | None:
    """Describe a ViT by width, depth, patch and registers; return None if its tensors have other names."""
    blocks = {int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))}
    patch_embed = weights.get("patch_embed.proj.weight")
    if not blocks or patch_embed is None or patch_embed.ndim != 4:
        return None
    registers = next((weights[name] for name in REGISTERS if name in weights), None)
    unusual = {", no [CLS] token": "cls_token" not in weights, ", a distillation token": "dist_token" in weights,
               f", {patch_embed.shape[1]} colour channel": patch_embed.shape[1] != 3}
    registers = 0 if registers is None else registers.shape[1]
    return (_words(patch_embed.shape[0], max(blocks) + 1, patch_embed.shape[-1], registers)
            + "".join(each for each, there in unusual.items() if there))


def _words(width: int, blocks: int, patch: int, registers: int) -> str:
    return f"width {width}, {blocks} blocks, patch {patch}, {registers} registers"


def _check_architecture(name: str, path: Path, weights: dict[str, Tensor], model: nn.Module) -> None:
    found, needed = _architecture(weights), _architecture(model.state_dict())
    if not found or found == needed:
        return
    for (width, blocks), size in DINOV2.items():
        for registers, suffix in {0: "", 4: "_reg"}.items():
            if "blocks.0.ls1.gamma" in weights and found == _words(width, blocks, 14, registers):
                raise refused(path, f"fits dinov2_vit{size}14{suffix}, not {name}",
                              f"it holds a ViT of {found}, and {name} has {needed}")
    raise refused(path, f"holds a ViT of another architecture than {name}",
                  f"{found}, and {name} has {needed}: use the backbone that it was trained as")


def _native_size(path: Path, weights: dict[str, Tensor], model: nn.Module) -> dict[str, int]:
    """Return timm's option `img_size` for the weights' position embedding, so that timm does not resize it."""
    if "pos_embed" not in weights or model.pos_embed is None:
        return {}
    num_prefix = 1 if "mask_token" in weights else 0 if model.no_embed_class else model.num_prefix_tokens
    patches = weights["pos_embed"].shape[1] - num_prefix
    side = math.isqrt(max(patches, 0))
    if side * side != patches:
        raise refused(path, f"has a position embedding of {patches} patches, not of a square image",
                      "give weights that were trained at a square size")
    return {"img_size": side * model.patch_embed.patch_size[0]}
