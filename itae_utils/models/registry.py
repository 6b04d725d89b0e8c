"""Names of backbones and the choices for loading them. This module imports neither torch nor timm."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("fp32", "bf16")
DINOV2_IMAGE_SIZE = 224  # the checkpoints' own 518 costs 5 times as much; reports state the size used


@dataclass(frozen=True)
class BackboneEntry:
    """A backbone with a name of its own.

    Attributes:
        timm_name: name of the timm model; None for the embedded backbones.
        parameters: number of parameters in millions.
        patch: pixels per side of a patch.
        image_size: default pixels per side of an image.
        size_mb: download in MB; 0 for embedded weights.
        origin: description of where the weights come from.
    """

    timm_name: str | None
    parameters: float
    patch: int
    image_size: int
    size_mb: int
    origin: str


def _dinov2(size: str, registers: bool, parameters: float) -> BackboneEntry:
    name = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m"
    words = "DINOv2 with 4 registers" if registers else "DINOv2"
    return BackboneEntry(name, parameters, 14, DINOV2_IMAGE_SIZE, round(parameters * 4), f"{words}, Meta, through timm")


PLANTED = "trained on digits without labels; its artifacts are planted, not natural"
BACKBONES: dict[str, BackboneEntry] = {
    "demo": BackboneEntry(None, 0.3, 4, 28, 0, f"embedded tiny ViT, {PLANTED}"),
    "demo-clean": BackboneEntry(None, 0.3, 4, 28, 0, "embedded tiny ViT, trained on digits without labels"),
} | {
    f"dinov2_vit{size[0]}14{'_reg' if registers else ''}": _dinov2(size, registers, parameters)
    for size, parameters in [("small", 22.1), ("base", 86.6), ("large", 304.4), ("giant", 1136.5)]
    for registers in (False, True)
}


def timm_name_of(name: str) -> str | None:
    """Return the timm name of a backbone; None for the embedded ones. Names outside `BACKBONES` are timm names."""
    return BACKBONES[name].timm_name if name in BACKBONES else name


PREPROCESSING = ("resize", "meta-eval")
RESIZES = ("pil", "device")
POS_EMBEDS = ("auto", "meta", "timm")
