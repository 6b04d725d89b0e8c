"""A DINOv2 in the layout of `transformers`: its settings are validated, its tensors get Meta's names."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from itae_utils.models.weight_files import read_config, refused

TYPES = ("dinov2", "dinov2_with_registers")
# Applied in this order. `transformers` 4 has attention.attention.query, 5 has attention.q_proj.
TO_META = [(re.compile(pattern), name) for pattern, name in [
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
PARTS = {"attn.qkv": ("attn.query", "attn.key", "attn.value"), "mlp.w12": ("mlp.gate_proj", "mlp.up_proj")}


def check_config(name: str, path: Path, file: Path, model: nn.Module) -> None:
    """Validate the settings of `transformers` in config.json that the tensors' shapes do not show."""
    if not file.is_file():
        raise refused(path, "has the tensors of transformers and no config.json beside it",
                      "give the folder, with config.json")
    config = read_config(path, file)
    if config.get("model_type") not in TYPES:
        raise refused(path, f"is of the model type {config.get('model_type')!r} of transformers, not supported",
                      f"{' and '.join(TYPES)} are")
    needed = {"num_attention_heads": model.blocks[0].attn.num_heads, "layer_norm_eps": getattr(model.norm, "eps", None),
              "hidden_act": "gelu", "qkv_bias": True}
    for setting, value in needed.items():
        if config.get(setting, value) != value:
            raise refused(path, f"does not fit {name}", f"its config.json has {setting}={config[setting]!r}, and "
                          f"the model has {value!r}")


def meta_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a DINOv2 from `transformers` 4 or 5 to Meta's names, and join its q, k, v."""
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in TO_META:
            name = pattern.sub(replacement, name)
        renamed[name] = tensor
    for whole, parts in PARTS.items():
        for first in [name for name in renamed if f".{parts[0]}." in name]:
            names = [first.replace(parts[0], part) for part in parts]
            if all(name in renamed for name in names):  # if not, loading the model names the missing one
                renamed[first.replace(parts[0], whole)] = torch.cat([renamed.pop(name) for name in names])
    return renamed
