"""Position embeddings at other sizes than the model's own: Meta's rule for DINOv2, on a stock timm ViT.

Away from 518 pixels the libraries differ. Meta's models without registers were published with an embedding resized by
the *factor* (rows + 0.1) / 37, without antialiasing; those with registers with one resized to the *size*, antialiased.
timm resizes as the latter for both. The features differ visibly, so the checkpoints get the rule they came with.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate

from itae_utils.errors import ItaeError
from itae_utils.models.registry import POS_EMBEDS

OFFSET = 0.1  # Meta's, added to the number of patches along each side


def resolve_pos_embed(pos_embed: str, timm_name: str | None) -> str:
    """Say "meta" or "timm" for what was asked: "auto" is Meta's rule for DINOv2, timm's for everything else.

    Raises:
        ItaeError: no such rule.
    """
    if pos_embed not in POS_EMBEDS:
        raise ItaeError(f"pos_embed={pos_embed!r} is not known: use one of {', '.join(POS_EMBEDS)}")
    if pos_embed == "auto":
        return "meta" if timm_name is not None and "dinov2" in timm_name else "timm"
    return pos_embed


def use_meta_rule(model: nn.Module) -> None:
    """From now on `model`, a timm VisionTransformer, resizes its position embedding by Meta's rule, at any input size.

    Weights, modules and all other methods stay as they are; at its own size nothing changes.

    Raises:
        ItaeError: a model without a square, learnt position embedding for its patches.
    """
    rows, columns = model.patch_embed.grid_size
    if not isinstance(model, VisionTransformer) or model.pos_embed is None or rows != columns:
        raise ItaeError(f"pos_embed='meta' needs a VisionTransformer with a square position embedding, which this "
                        f"{type(model).__name__} has not: use pos_embed='timm'")
    model._pos_embed = partial(_pos_embed, model)  # not a closure: copies and pickles of the model keep their own


def _pos_embed(model: nn.Module, patches: Tensor) -> Tensor:
    """The method `_pos_embed` of timm's VisionTransformer for `patches` (B, rows, columns, C), but for the resize."""
    position = meta_resized(model, *patches.shape[1:3])
    tokens = patches.flatten(1, 2)
    prefix = [token.expand(len(tokens), -1, -1) for token in (model.cls_token, model.reg_token) if token is not None]
    if model.no_embed_class:
        tokens = torch.cat([*prefix, tokens + position], dim=1)
    else:
        tokens = torch.cat([*prefix, tokens], dim=1) + position
    return model.pos_drop(tokens)


def meta_resized(model: nn.Module, rows: int, columns: int) -> Tensor:
    """The position embedding (1, T, C) of `model` for a grid of rows × columns patches, by Meta's rule."""
    side, _ = model.patch_embed.grid_size
    if (rows, columns) == (side, side):
        return model.pos_embed
    num_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    prefix, grid = model.pos_embed[:, :num_prefix], model.pos_embed[:, num_prefix:]
    if model.reg_token is None:
        options = {"scale_factor": ((rows + OFFSET) / side, (columns + OFFSET) / side), "antialias": False}
    else:
        options = {"size": (rows, columns), "antialias": True}
    image = grid.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = interpolate(image, mode="bicubic", **options).permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([prefix, resized.to(grid.dtype)], dim=1)
