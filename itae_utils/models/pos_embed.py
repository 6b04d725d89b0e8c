"""Other rules than timm's for resizing DINOv2's position embedding, on a stock timm ViT.

The rules differ at image sizes other than 518 pixels, for models without registers. Meta resizes their embedding by the
*factor* (rows + 0.1) / 37, without antialiasing. So did the library `transformers` until its pull request 33226 of
September 2024; since then it resizes to the *size*, without antialiasing. timm resizes to the size, with antialiasing.
For models with registers, all three resize to the size, with antialiasing. The features differ clearly, so each
checkpoint gets the rule it was published with.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate

from itae_utils.errors import ItaeError
from itae_utils.models.registry import POS_EMBEDS

OFFSET = 0.1  # Meta adds this to the number of patches along each side


def resolve_pos_embed(pos_embed: str, timm_name: str | None) -> str:
    """Return "meta", "transformers" or "timm"; "auto" is Meta's rule for DINOv2 and timm's for all other models."""
    if pos_embed not in POS_EMBEDS:
        raise ItaeError(f"pos_embed={pos_embed!r} is not known: use one of {', '.join(POS_EMBEDS)}")
    if pos_embed == "auto":
        return "meta" if timm_name is not None and "dinov2" in timm_name else "timm"
    return pos_embed


def use_rule(model: nn.Module, rule: str) -> None:
    """Make a timm VisionTransformer resize its position embedding by the rule "meta" or "transformers", in place.

    Only the method `_pos_embed` is replaced, and at the model's own image size the result is unchanged.

    Raises:
        ItaeError: the model has no square, learnt position embedding for its patches.
    """
    rows, columns = model.patch_embed.grid_size
    if not isinstance(model, VisionTransformer) or model.pos_embed is None or rows != columns:
        raise ItaeError(f"pos_embed={rule!r} needs a VisionTransformer with a square position embedding, and this "
                        f"{type(model).__name__} has none: use pos_embed='timm'")
    model._pos_embed = partial(_pos_embed, model, rule)  # a copy's partial holds the copy, a closure would not


def _pos_embed(model: nn.Module, rule: str, patches: Tensor) -> Tensor:
    """Replace timm's `_pos_embed` for `patches` (B, rows, columns, C); only the resize of the embedding differs."""
    position = resized(model, *patches.shape[1:3], rule)
    tokens = patches.flatten(1, 2)
    prefix = [token.expand(len(tokens), -1, -1) for token in (model.cls_token, model.reg_token) if token is not None]
    if model.no_embed_class:
        tokens = torch.cat([*prefix, tokens + position], dim=1)
    else:
        tokens = torch.cat([*prefix, tokens], dim=1) + position
    return model.pos_drop(tokens)


def resized(model: nn.Module, rows: int, columns: int, rule: str) -> Tensor:
    """Return the position embedding (1, T, C) of `model` for rows × columns patches, resized by a rule."""
    side, _ = model.patch_embed.grid_size
    if (rows, columns) == (side, side):
        return model.pos_embed
    num_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    prefix, grid = model.pos_embed[:, :num_prefix], model.pos_embed[:, num_prefix:]
    options = {"size": (rows, columns), "antialias": model.reg_token is not None}
    if rule == "meta" and model.reg_token is None:
        options = {"scale_factor": ((rows + OFFSET) / side, (columns + OFFSET) / side)}
    image = grid.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    position = interpolate(image, mode="bicubic", **options).permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([prefix, position.to(grid.dtype)], dim=1)
