"""Names of backbones and the choices for loading them. This module imports neither torch nor timm."""

from __future__ import annotations

from dataclasses import dataclass

from itae_utils.errors import ItaeError

PRECISIONS = ("fp32", "bf16")
DINOV2_IMAGE_SIZE = 224  # the checkpoints' own 518 costs 5 times as much; reports state the size used


@dataclass(frozen=True)
class BackboneEntry:
    """A backbone with a name of its own.

    Attributes:
        timm_name: None for the embedded backbones.
        parameters: in millions.
        patch: pixels per side.
        image_size: default pixels per side.
        size_mb: MB to download; 0 for embedded weights.
        origin: description of where the weights come from.
    """

    timm_name: str | None
    parameters: float
    patch: int
    image_size: int
    size_mb: int
    origin: str


EMBEDDED = "embedded tiny ViT, trained on digits without labels"
BACKBONES: dict[str, BackboneEntry] = {
    "demo": BackboneEntry(None, 0.3, 4, 28, 0, f"{EMBEDDED}; its artifacts are planted, not natural"),
    "demo-clean": BackboneEntry(None, 0.3, 4, 28, 0, EMBEDDED),
} | {
    f"dinov2_vit{size[0]}14{suffix}": BackboneEntry(
        f"vit_{size}_patch14_{prefix}dinov2.lvd142m", parameters, 14, DINOV2_IMAGE_SIZE, round(parameters * 4),
        f"{family}, Meta, through timm")
    for size, parameters in [("small", 22.1), ("base", 86.6), ("large", 304.4), ("giant", 1136.5)]
    for suffix, prefix, family in [("", "", "DINOv2"), ("_reg", "reg4_", "DINOv2 with 4 registers")]
}


def timm_name_of(name: str) -> str | None:
    """Return the timm name of a backbone; None for the embedded ones. Names outside `BACKBONES` are timm names.

    Raises:
        ItaeError: `name` is not a text.
    """
    if not isinstance(name, str):
        raise ItaeError(f"backbone is a {type(name).__name__}, not a name: give one of `itae backbones`, and your own "
                        "weights as checkpoint")
    return BACKBONES[name].timm_name if name in BACKBONES else name


PREPROCESSING = ("resize", "meta-eval", "pad")
RESIZES = ("pil", "device")
POS_EMBEDS = ("auto", "meta", "transformers", "timm")
