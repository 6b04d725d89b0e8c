"""Norms, attention and artifacts of single images, which keep their shape (`itae inspect`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from itae_utils.data.folders import open_image
from itae_utils.errors import ItaeError
from itae_utils.extraction.observation import measure_batch
from itae_utils.method.attention import attenuated_logits, cls_attention
from itae_utils.method.setting import ITAE
from itae_utils.method.thresholds import fit_threshold
from itae_utils.models.backbones import Backbone, load_backbone

MOST_IMAGES = 50  # more rows are too small to read in one figure


@dataclass(frozen=True)
class InspectedImage:
    """One image as the model sees it; maps are (rows, columns) of its patch grid."""

    name: str  # of the file
    picture: np.ndarray  # (H, W, 3) in [0, 1]
    hidden: np.ndarray  # norm of the patch tokens after one block
    norms: np.ndarray  # norm of the source in the last block
    before: np.ndarray  # attention of `[CLS]` in the last block, mean over the heads
    after: np.ndarray | None  # the same with ITAE; None without θ
    artifacts: np.ndarray  # bool


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_images`."""

    images: list[InspectedImage]
    source: str  # whose norms were compared with θ
    block: int  # number of the block, from 1, after which `InspectedImage.hidden` is measured
    threshold: str  # a sentence that states θ and its origin, or why there is no θ
    lines: list[str]  # a summary for the terminal: the size of each image, θ, and planted artifacts


def inspect_images(
    paths: Sequence[str | Path], *, backbone: str | Backbone = "demo", source: str = "key",
    threshold: float | str | None = None,
) -> Inspection:
    """Measure norms, `[CLS]` attention and artifacts of images, one at a time; `figures.inspection` draws the result.

    Images keep their shape: the short side becomes the backbone's image size, the long side the nearest multiple of the
    patch.

    Args:
        paths: at most 50 image files.
        backbone: from `load_backbone`, or its name.
        source: whose norm identifies artifacts: "query", "key" or "value".
        threshold: θ; None or "auto" fits it to all patches of these images together, if there are enough.

    Raises:
        ItaeError: no images or more than 50, an unreadable image (named), or a bad setting.
    """
    setting = ITAE(source=source, threshold="auto" if threshold is None else threshold)
    if not 1 <= len(paths) <= MOST_IMAGES:
        raise ItaeError(f"{len(paths)} images do not fit in one figure: give 1 to {MOST_IMAGES}")
    for path in paths:
        if not Path(path).is_file():
            raise ItaeError(f"{str(path)!r} is not a file: give image files")
    pictures = [open_image(Path(path)) for path in paths]
    if isinstance(backbone, str):
        backbone = load_backbone(backbone)
    tensors = [_resized(backbone, image) for image in pictures]
    with torch.inference_mode(), backbone.autocast():
        seen = [measure_batch(backbone, tensor[None].to(backbone.device)) for tensor in tensors]
        theta, words = _threshold(setting, [measured[source].cpu().numpy() for measured in seen])
        setting = replace(setting, threshold=(theta,))
        block = _peak_block([measured["hidden"][0].cpu().numpy() for measured in seen])
        images = [_inspected(backbone, Path(path).name, tensor, measured, block, setting)
                  for path, tensor, measured in zip(paths, tensors, seen, strict=True)]
    planted = [f"{backbone.name}: {backbone.source}"] if backbone.truth is not None else []
    return Inspection(images, source, block + 1, words, [*map(_describe, images, pictures), words, *planted])


def _resized(backbone: Backbone, image: Image) -> Tensor:
    """Return the image, preprocessed in its own shape: (3, H, W), both multiples of the patch."""
    scale, patches = backbone.image_size / min(image.size), backbone.model.patch_embed.patch_size
    sides = [round(side * scale / patch) * patch
             for side, patch in zip((image.height, image.width), patches, strict=True)]
    return backbone.preprocessing.resized(image, tuple(sides))


def _peak_block(hidden: Sequence[np.ndarray]) -> int:
    """Return the block after which the longest token is the largest multiple of the median one."""
    by_block = np.concatenate([norms.reshape(len(norms), -1) for norms in hidden], axis=1)
    return int((by_block.max(axis=1) / np.median(by_block, axis=1)).argmax())


def _threshold(setting: ITAE, norms: Sequence[np.ndarray]) -> tuple[float | None, str]:
    """Return θ, and a sentence about its origin."""
    pooled = np.concatenate([values.ravel() for values in norms])
    if setting.threshold == "auto":
        fit = fit_threshold(pooled)
        if fit.threshold is None:
            return None, f"no θ on the norm of the {setting.source}: {fit.reason}"
        return fit.threshold, f"θ on the norm of the {setting.source}: {fit.reason}"
    theta = float(setting.threshold)
    return theta, (f"θ = {theta:.4g} on the norm of the {setting.source} was given: "
                   f"{np.count_nonzero(pooled <= theta):,} of {pooled.size:,} patches lie at or below it")


def _inspected(
    backbone: Backbone, name: str, tensor: Tensor, measured: dict[str, Tensor], block: int, setting: ITAE
) -> InspectedImage:
    (theta,), norms = setting.thresholds, measured[setting.source]
    artifacts = torch.zeros_like(norms, dtype=torch.bool) if theta is None else norms <= theta
    after = cls_attention(attenuated_logits(measured["logits"], artifacts, setting), norms.shape[-1]).mean(dim=1)
    patch_height, patch_width = backbone.model.patch_embed.patch_size
    grid = (tensor.shape[1] // patch_height, tensor.shape[2] // patch_width)

    def on_grid(values: Tensor) -> np.ndarray:
        return values.cpu().numpy().reshape(grid)

    return InspectedImage(
        name=name,
        picture=backbone.preprocessing.undo(tensor),
        hidden=on_grid(measured["hidden"][0, block]),
        norms=on_grid(norms),
        before=on_grid(measured["attention"]),
        after=None if theta is None else on_grid(after),
        artifacts=on_grid(artifacts),
    )


def _describe(image: InspectedImage, original: Image) -> str:
    (rows, columns), (height, width, _) = image.hidden.shape, image.picture.shape
    words = (f"{image.name}: {original.width} × {original.height} shown to the model as {width} × {height}, "
             f"{columns} × {rows} patches")
    if image.after is None:
        return words
    return f"{words}, {np.count_nonzero(image.artifacts)} of them artifacts"
