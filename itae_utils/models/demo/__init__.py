"""The embedded backbone: a tiny ViT trained on handwritten digits, with and without planted artifacts.

`demo-clean.safetensors` holds all weights, `demo.safetensors` the few that planting changed, and `demo.json` the rule
that identifies the artifacts of an image. `train.py` wrote all three.
"""

from __future__ import annotations

import json

from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from itae_utils.files import PACKAGE
from itae_utils.method.artifacts import FiringRule

FOLDER = PACKAGE / "models/demo"
IMAGE_SIZE = 28
CONFIG = {  # preprocessing, in timm's terms: black becomes -1, white 1
    "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}


def build_model(**options) -> nn.Module:
    """Build the demo's architecture: patch 4 on 28 × 28 pixels, width 64, 6 blocks, 2 heads; 306,432 parameters."""
    return VisionTransformer(img_size=IMAGE_SIZE, patch_size=4, embed_dim=64, depth=6, num_heads=2, num_classes=0,
                             global_pool="token", dynamic_img_size=True, **options)


def load_model(planted: bool) -> nn.Module:
    """Load the trained tiny ViT, with or without planted artifacts."""
    weights = load_file(FOLDER / "demo-clean.safetensors")
    if planted:
        weights |= load_file(FOLDER / "demo.safetensors")
    model = build_model()
    model.load_state_dict(weights)
    return model.eval()


def truth() -> FiringRule:
    """Return the rule that identifies the planted artifacts."""
    rule = json.loads((FOLDER / "demo.json").read_text())["artifacts_where_any_fires"]
    return FiringRule(rule["block"], tuple(rule["neurons"]), rule["above"])
