"""Local checkpoints for timm ViTs: Meta's files, timm's files and folders of `transformers`, read as plain tensors.

Tensors of `transformers` are renamed to Meta's layout here, and timm converts Meta's layout to its own. A checkpoint
with missing or unexpected tensors is refused, so no weight keeps its random initial value.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from itae_utils.errors import ItaeError

HEADS = ("head.", "head_dist.", "visual.proj")  # classifiers and projections, which the method does not use
DATA_PARALLEL = "module."  # prefix of every name in torch's DataParallel
REGISTERS = ("reg_token", "register_tokens", "storage_tokens")  # timm's name, DINOv2's, DINOv3's
CHUNKED = re.compile(r"\bblocks\.\d+\.\d+\.")
TRANSFORMERS_TYPES = ("dinov2", "dinov2_with_registers")
# Applied in this order. `transformers` 4 has attention.attention.query, 5 has attention.q_proj.
TRANSFORMERS_TO_META = [(re.compile(pattern), name) for pattern, name in [
    (r"^(dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.w3."),
]]
TRANSFORMERS_PARTS = {"attn.qkv": ("attn.query", "attn.key", "attn.value"), "mlp.w12": ("mlp.gate_proj", "mlp.up_proj")}


def model_from_checkpoint(timm_name: str, path: str | Path, **options: object) -> nn.Module:
    """Return a timm model with local weights; its own image size is that of their position embedding.

    Args:
        timm_name: the architecture. It also defines the number of attention heads, which no tensor's shape shows.
        path: a .safetensors or .pth file in Meta's layout or timm's, or a folder saved by `transformers`.
        options: for `timm.create_model`.

    Raises:
        ItaeError: the weights are unreadable, of another architecture or from sharded training, or tensors are missing
            or unexpected.
    """
    with torch.device("meta"):
        model = timm.create_model(timm_name, **options)

    def refuse(why: str) -> ItaeError:
        return ItaeError(f"checkpoint {str(path)!r} can't be loaded into {timm_name}: {why}")

    weights = read_checkpoint(path)
    if chunked := next((name for name in weights if CHUNKED.search(name)), None):
        raise refuse(f"{chunked!r} comes from training in chunks of blocks (FSDP), which is not supported: "
                     "give the file for evaluation, with blocks named blocks.0, blocks.1 …")
    if Path(path).is_dir():
        _check_config(Path(path), model, refuse)
        weights = _meta_layout(weights)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(HEADS)}
    if "register_tokens" in weights or "blocks.0.mlp.w12.weight" in weights:
        weights.setdefault("mask_token", weights.get("cls_token"))  # timm recognises Meta's layout by it, then drops it
    found, needed = _architecture(weights), _architecture(model.state_dict())
    if found and found != needed:
        raise refuse(f"it holds a ViT of {found}, and the model has {needed}")
    overlay = {"state_dict": weights, "num_classes": 0, "classifier": None}  # a classifier makes timm ignore gaps
    try:
        return timm.create_model(timm_name, pretrained=True, pretrained_cfg_overlay=overlay,
                                 **_native_size(weights, model), **options)
    except (RuntimeError, KeyError, AttributeError, ValueError) as error:
        raise refuse(tensors_named(error)) from error


def tensors_named(error: Exception) -> str:
    """Return torch's list of missing, unexpected and misshapen tensors in one line of at most about 600 characters."""
    lines = str(error).strip().splitlines()
    lines = lines[1:] or lines  # the first line names the model class
    text = "; ".join(textwrap.shorten(line, 200, placeholder=" …") for line in lines[:3])
    return f"{text} and {len(lines) - 3} more" if len(lines) > 3 else text


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file, a .pth file of plain tensors or a folder; never run pickled code."""
    path = Path(path)
    files = sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ItaeError(f"checkpoint folder {str(path)!r} holds no model.safetensors: save the model in that form")
    if not files[0].is_file():
        raise ItaeError(f"checkpoint {str(path)!r} is not a file: give a .safetensors or .pth file, "
                        "or a folder with config.json and model.safetensors")
    weights = {}
    for file in files:
        try:
            read = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        except Exception as error:
            raise ItaeError(f"checkpoint {str(file)!r} is not readable as plain tensors ({type(error).__name__}): save "
                            "a model's state_dict() instead, since code in a file is never run") from error
        for wrapper in ("state_dict", "model", "teacher"):
            if isinstance(read, dict) and isinstance(read.get(wrapper), dict):
                read = read[wrapper]
        if not isinstance(read, dict) or not read or not all(isinstance(each, torch.Tensor) for each in read.values()):
            raise ItaeError(f"checkpoint {str(file)!r} holds no state dict of tensors: save a model's state_dict()")
        weights |= read
    if all(name.startswith(DATA_PARALLEL) for name in weights):
        weights = {name.removeprefix(DATA_PARALLEL): tensor for name, tensor in weights.items()}
    return weights


def _check_config(folder: Path, model: nn.Module, refuse: Callable[[str], ItaeError]) -> None:
    """Validate the settings in config.json that the tensors' shapes do not show."""
    try:
        config = json.loads((folder / "config.json").read_text())
        model_type = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise refuse(f"its config.json can't be read ({type(error).__name__})") from error
    if model_type not in TRANSFORMERS_TYPES:
        known = " and ".join(TRANSFORMERS_TYPES)
        raise refuse(f"folders of the model type {model_type!r} are not supported: {known} are")
    needed = {"num_attention_heads": model.blocks[0].attn.num_heads, "layer_norm_eps": model.norm.eps,
              "hidden_act": "gelu", "qkv_bias": True}
    for name, value in needed.items():
        if config.get(name, value) != value:
            raise refuse(f"its config.json has {name}={config[name]!r}, and the model has {value!r}")


def _meta_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a DINOv2 from `transformers` 4 or 5 to Meta's names, and join its q, k, v."""
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in TRANSFORMERS_TO_META:
            name = pattern.sub(replacement, name)
        if not name.startswith("classifier."):
            renamed[name] = tensor
    for whole, parts in TRANSFORMERS_PARTS.items():
        for first in [name for name in renamed if f".{parts[0]}." in name]:
            names = [first.replace(parts[0], part) for part in parts]
            if all(name in renamed for name in names):  # if not, loading the model names the missing one
                renamed[first.replace(parts[0], whole)] = torch.cat([renamed.pop(name) for name in names])
    return renamed


def _architecture(weights: dict[str, Tensor]) -> str | None:
    """Describe a ViT by width, depth, patch and registers; return None if its tensors have other names."""
    blocks = {int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))}
    patch_embed = weights.get("patch_embed.proj.weight")
    if not blocks or patch_embed is None or patch_embed.ndim != 4:
        return None
    registers = next((weights[name] for name in REGISTERS if name in weights), None)
    return (f"width {patch_embed.shape[0]}, {max(blocks) + 1} blocks, patch {patch_embed.shape[-1]}, "
            f"{0 if registers is None else registers.shape[1]} registers")


def _native_size(weights: dict[str, Tensor], model: nn.Module) -> dict[str, int]:
    """Return timm's option `img_size` for the weights' position embedding, so that timm does not resize it."""
    if getattr(model, "no_embed_class", None) is None or "pos_embed" not in weights:
        return {}
    num_prefix = 1 if "mask_token" in weights else 0 if model.no_embed_class else model.num_prefix_tokens
    patches = weights["pos_embed"].shape[1] - num_prefix
    side = math.isqrt(patches)
    return {"img_size": side * model.patch_embed.patch_size[0]} if side * side == patches else {}
