"""Local checkpoints for timm ViTs, in timm's layout, Meta's or that of `transformers`.

The ViT in a checkpoint is found by a tensor that every ViT has: what stands before its name is a prefix, such as
"teacher.backbone.", and all tensors without it are left out. Tensors of `transformers` are renamed to Meta's layout
here, and timm converts Meta's layout to its own. A checkpoint with missing or unexpected tensors is refused, so no
weight keeps its random initial value. What was decided is described in words.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from itae_utils.errors import ItaeError
from itae_utils.models.registry import timm_name_of
from itae_utils.models.weight_files import read_file, refused, some, weight_files

# A tensor of every ViT: CLIP's and the names of `transformers`, Meta's and timm's. The first group is the prefix.
ANCHOR = re.compile(r"((?:[^.]+\.)*?)(?:(?:visual\.)?(?<!embeddings\.)class_embedding|patch_embed\.proj\.weight|"
                    r"embeddings\.patch_embeddings\.projection\.weight)")
AVERAGED = re.compile(r"teacher|target")  # the network that self-distillation evaluates
EMA = re.compile(r"(^|[_.])(ema|momentum|averaged)([_.]|$)")
STUDENT = re.compile(r"student|online")
# Modules that training wraps around parts of a model, without tensors of their own.
WRAPPED = re.compile(r"(?<=\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
# Classifiers, projections, decoders and losses beside the ViT's modules, which the method does not use.
HEADS = re.compile(r"(\w*head\w*|fc|classifier|proj|proj(ect|ection|ector)\w*|predictor\w*|decoder\w*|pooler|"
                   r"prototypes|(dino|ibot|koleo)_\w+|\w*loss\w*|pre_logits|n_averaged|visual\.proj)(?=\.|$)")
REGISTERS = ("reg_token", "register_tokens", "storage_tokens")  # timm's name, DINOv2's, DINOv3's
DINOV2 = {(384, 12): "s", (768, 12): "b", (1024, 24): "l", (1536, 40): "g"}  # width and blocks of the sizes
CHUNKED = re.compile(r"\bblocks\.\d+\.\d+\.")
# Tensors of models that are no ViT of timm.
FOREIGN = {"vision_model.embeddings.": "CLIP or SigLIP of transformers", "conv_proj.weight": "torchvision's ViT",
           "embeddings.patch_embeddings.": "another model of transformers", "layer1.0.": "a ResNet",
           "stages.0.": "ConvNeXt", "param_groups": "an optimizer's state", "optimizer.state": "an optimizer's state",
           "lora_A": "a LoRA adapter, without its model"}
TRANSFORMERS_TYPES = ("dinov2", "dinov2_with_registers")
# Applied in this order. `transformers` 4 has attention.attention.query, 5 has attention.q_proj.
TRANSFORMERS_TO_META = [(re.compile(pattern), name) for pattern, name in [
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
    tensors = max((tensors for _, tensors in _state_dicts(read_file(path))), key=len, default=None)
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
    weights, choices = _vit_in(path, content)
    said += choices
    weights = {key: tensor.to(device) for key, tensor in weights.items()}
    with torch.device("meta"):
        model = timm.create_model(timm_name_of(name), **options)
    config = files[0].parent / "config.json"
    if "embeddings.patch_embeddings.projection.weight" in weights:
        _check_config(name, path, config, model)
        weights = _meta_layout(weights)
    elif path.is_dir() and config.is_file():
        architecture, ours = _config(path, config).get("architecture"), timm_name_of(name).partition(".")[0]
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


def _state_dicts(content: dict, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield every mapping that holds tensors, with the keys that lead to it."""
    if tensors := {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}:
        yield keys, tensors
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _state_dicts(value, (*keys, str(key)))


def _vit_in(path: Path, content: dict) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of the ViT in a checkpoint without their prefix, and what was chosen and left out."""
    mappings = dict(_state_dicts(content))
    found = sorted(dict.fromkeys((keys, match[1]) for keys, tensors in mappings.items() for key in tensors
                                 if (match := ANCHOR.fullmatch(key))), key=_rank)
    if not found:
        _refuse_foreign(path, content, mappings)
        found = [(max(mappings, key=lambda keys: len(mappings[keys])), "")]  # timm knows some more layouts
    labels = [".".join([*keys, prefix]).rstrip(".") or "the model without a prefix" for keys, prefix in found]
    if len(found) > 1 and _rank(found[0]) == _rank(found[1]):
        raise refused(path, f"holds several ViTs, {some(labels)}", "save the state_dict() of one")
    keys, prefix = found[0]
    copies = tuple(other for each, other in found[1:] if each == keys and not prefix.startswith(other))
    weights, left = {}, {}  # a dict keeps the order
    for key, tensor in mappings[keys].items():
        inner = key.removeprefix(prefix)
        if copies and key.startswith(copies):
            continue
        if not key.startswith(prefix):
            left[_outermost(key, prefix)] = None
        elif CHUNKED.search(key):
            raise refused(path, f"holds {key!r}, from training in chunks of blocks (FSDP), which is not supported",
                             "give the file for evaluation, with blocks named blocks.0, blocks.1 …")
        elif "lora_" in key:
            raise refused(path, f"holds a LoRA that is not merged ({key})", "save it after merge_and_unload()")
        elif head := HEADS.match(inner):
            left[head[0]] = None
        elif key.endswith("weight") and (not tensor.is_floating_point() or tensor.itemsize < 2):
            raise refused(path, f"is quantised, {key} is {_dtype(tensor)}", "give the weights as float")
        else:
            weights[WRAPPED.sub("", inner)] = tensor
    kinds = sorted({_dtype(tensor) for tensor in weights.values()} - {"float32"})
    said = {f"{labels[0]} taken, {some(labels[1:])} left out": labels[1:], f"prefix {prefix!r} removed": prefix,
            f"{some(left)} left out": left, f"{some(kinds)} read as float32": kinds}
    return weights, [words for words, there in said.items() if there]


def _outermost(key: str, prefix: str) -> str:
    """Return the name of the outermost module that holds `key` and not the modules under `prefix`."""
    parts = key.split(".")
    names = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return next(name for name in names if not prefix.startswith(f"{name}."))


def _rank(place: tuple[tuple[str, ...], str]) -> tuple[int, bool]:
    """Return the rank of a ViT among those in a checkpoint, by its wrappers and its prefix; the lowest is taken."""
    wrappers, prefix = ".".join(place[0]), place[1]
    where = f"{wrappers}.{prefix}"
    if STUDENT.search(where):
        return 3, bool(prefix)
    if AVERAGED.search(where) or EMA.search(wrappers):  # as timm prefers state_dict_ema
        return 0, bool(prefix)
    return 2 if EMA.search(prefix) else 1, bool(prefix)


def _refuse_foreign(path: Path, content: dict, mappings: dict[tuple[str, ...], dict[str, Tensor]]) -> None:
    names = [*map(str, content), *(".".join([*keys, key]) for keys, tensors in mappings.items() for key in tensors)]
    if kind := next((kind for part, kind in FOREIGN.items() if any(part in name for name in names)), None):
        raise refused(path, f"holds {kind}", "give the weights of a ViT in timm's layout or Meta's, or a folder of "
                         "DINOv2 from transformers")
    if not mappings:
        raise refused(path, "holds no state dict of tensors",
                         "save a model's state_dict() instead, since code in a file is never run")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _config(path: Path, file: Path) -> dict:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refused(path, f"needs a config.json that can be read ({type(error).__name__})",
                         "give a folder with config.json and model.safetensors") from error
    return config if isinstance(config, dict) else {}


def _check_config(name: str, path: Path, file: Path, model: nn.Module) -> None:
    """Validate the settings of `transformers` in config.json that the tensors' shapes do not show."""
    if not file.is_file():
        raise refused(path, "has the tensors of transformers and no config.json beside it",
                         "give the folder, with config.json")
    config = _config(path, file)
    if config.get("model_type") not in TRANSFORMERS_TYPES:
        raise refused(path, f"is of the model type {config.get('model_type')!r} of transformers, not supported",
                         f"{' and '.join(TRANSFORMERS_TYPES)} are")
    needed = {"num_attention_heads": model.blocks[0].attn.num_heads, "layer_norm_eps": getattr(model.norm, "eps", None),
              "hidden_act": "gelu", "qkv_bias": True}
    for setting, value in needed.items():
        if config.get(setting, value) != value:
            raise refused(path, f"does not fit {name}", f"its config.json has {setting}={config[setting]!r}, and "
                             f"the model has {value!r}")


def _meta_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a DINOv2 from `transformers` 4 or 5 to Meta's names, and join its q, k, v."""
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in TRANSFORMERS_TO_META:
            name = pattern.sub(replacement, name)
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
