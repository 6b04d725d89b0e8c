"""Backbones that have a name here, and the words that loading one may take; nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("fp32", "bf16")
DINOV2_IMAGE_SIZE = 224  # the checkpoints' own 518 costs 5 times as much; stated wherever it is used


@dataclass(frozen=True)
class BackboneEntry:
    """A backbone that can be named.

    Attributes:
        timm_name: the timm model behind it; None for the embedded ones.
        parameters: millions.
        patch: pixels a side.
        image_size: default image side in pixels.
        size_mb: download in MB; 0 for what is embedded.
        origin: where the weights come from, in words.
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


PLANTED = "trained on digits without labels, then artifacts were planted in it: they are not natural ones"
BACKBONES: dict[str, BackboneEntry] = {
    "demo": BackboneEntry(None, 0.3, 4, 28, 0, f"embedded tiny ViT, {PLANTED}"),
    "demo-clean": BackboneEntry(None, 0.3, 4, 28, 0, "embedded tiny ViT, trained on digits without labels"),
} | {
    f"dinov2_vit{size[0]}14{'_reg' if registers else ''}": _dinov2(size, registers, parameters)
    for size, parameters in [("small", 22.1), ("base", 86.6), ("large", 304.4), ("giant", 1136.5)]
    for registers in (False, True)
}

PREPROCESSING = ("resize", "meta-eval")
RESIZES = ("pil", "device")

POS_EMBEDS = ("auto", "meta", "timm")
