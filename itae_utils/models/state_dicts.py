"""Find the ViT in what training saves.

It is found by a tensor that every ViT has: what stands before its name is a prefix, such as "teacher.backbone.", and
all tensors without it are left out. What was decided is described in words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from itae_utils.models.weight_files import refused, some

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
CHUNKED = re.compile(r"\bblocks\.\d+\.\d+\.")
# Tensors of models that are no ViT of timm.
FOREIGN = {"vision_model.embeddings.": "CLIP or SigLIP of transformers", "conv_proj.weight": "torchvision's ViT",
           "embeddings.patch_embeddings.": "another model of transformers", "layer1.0.": "a ResNet",
           "stages.0.": "ConvNeXt", "param_groups": "an optimizer's state", "optimizer.state": "an optimizer's state",
           "lora_A": "a LoRA adapter, without its model"}


def state_dicts(content: dict, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield every mapping that holds tensors, with the keys that lead to it."""
    if tensors := {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}:
        yield keys, tensors
    for key, value in content.items():
        if isinstance(value, dict):
            yield from state_dicts(value, (*keys, str(key)))


def vit_in(path: Path, content: dict) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of the ViT in a checkpoint without their prefix, and what was chosen and left out."""
    mappings = dict(state_dicts(content))
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
    others = f", {some(labels[1:])} left out" if labels[1:] else ""
    said = {f"{labels[0]} taken{others}": keys or others, f"prefix {prefix!r} removed": prefix,
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
