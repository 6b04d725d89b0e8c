"""A close look at single images in their own shape: norms, attention and artifacts (`itae inspect`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from itae_utils.data.folders import open_image
from itae_utils.errors import ItaeError
from itae_utils.extraction.observation import cls_attention, measure
from itae_utils.method.attention import attenuated_logits
from itae_utils.method.setting import ITAE
from itae_utils.method.thresholds import fit_threshold
from itae_utils.models.backbones import Backbone, load_backbone, undo_normalization

MOST_IMAGES = 50  # more rows can't be told apart in one figure


@dataclass(frozen=True)
class Look:
    """One image as the model sees it; maps are (rows, columns) of its patch grid.

    Attributes:
        name: of the file.
        picture: (H, W, 3) in [0, 1].
        hidden: norm of the patch tokens after one block.
        norms: norm of the source in the last block.
        before: attention of `[CLS]` in the last block, mean over the heads.
        after: the same with ITAE; None where there is no θ.
        artifacts: bool.
    """

    name: str
    picture: np.ndarray
    hidden: np.ndarray
    norms: np.ndarray
    before: np.ndarray
    after: np.ndarray | None
    artifacts: np.ndarray


@dataclass(frozen=True)
class Inspection:
    """What a close look at some images found.

    Attributes:
        looks: one for each image.
        source: whose norms were compared with θ.
        block: the block, counted from 1, after which `Look.hidden` is measured.
        threshold: where θ comes from, or why there is none.
        lines: the same in lines of text, with what each image was resized to.
    """

    looks: list[Look]
    source: str
    block: int
    threshold: str
    lines: list[str]


def inspect_images(
    paths: Sequence[str | Path],
    *,
    backbone: str | Backbone = "demo",
    source: str = "key",
    threshold: float | str | None = None,
) -> Inspection:
    """Measure norms, `[CLS]` attention and artifacts of single images, in one pass each; `figures.inspection` draws it.

    Images keep their shape: the short side becomes the backbone's image size, the long side the nearest multiple of the
    patch.

    Args:
        paths: image files, 50 at the most.
        backbone: from `load_backbone`, or a name for it.
        source: whose norm tells artifacts: "query", "key" or "value".
        threshold: θ; None or "auto" fits it to all patches of the given images together, where they are enough.

    Raises:
        ItaeError: no images or too many, an unreadable one (named), a bad setting.
    """
    setting = ITAE(source=source, threshold="auto" if threshold is None else threshold)
    _check(paths)
    pictures = [open_image(Path(path)) for path in paths]
    if isinstance(backbone, str):
        backbone = load_backbone(backbone)
    tensors = [_resized(backbone, image) for image in pictures]
    with torch.inference_mode(), backbone.autocast():
        seen = [measure(backbone, tensor[None].to(backbone.device)) for tensor in tensors]
        theta, words = _threshold(setting, [measured[source].cpu().numpy() for measured in seen])
        setting = replace(setting, threshold=(theta,))
        block = _telling_block([measured["hidden"][0].cpu().numpy() for measured in seen])
        looks = [_look(backbone, Path(path).name, tensor, measured, block, setting)
                 for path, tensor, measured in zip(paths, tensors, seen, strict=True)]
    planted = [f"{backbone.name}: {backbone.source}"] if backbone.truth is not None else []
    return Inspection(looks, source, block + 1, words, [*map(_describe, looks, pictures), words, *planted])


def _check(paths: Sequence[str | Path]) -> None:
    if not 1 <= len(paths) <= MOST_IMAGES:
        raise ItaeError(f"{len(paths)} images don't make a figure: give 1 to {MOST_IMAGES}")
    for path in paths:
        if not Path(path).is_file():
            raise ItaeError(f"{str(path)!r} is not a file: give image files")


def _resized(backbone: Backbone, image: Image) -> Tensor:
    """The image, preprocessed in its own shape: (3, H, W), both multiples of the patch."""
    resize, *_, to_tensor, to_float, normalize = backbone.transform.transforms
    patches = backbone.model.patch_embed.patch_size
    scale = backbone.image_size / min(image.size)
    height, width = (round(side * scale / patch) * patch
                     for side, patch in zip((image.height, image.width), patches, strict=True))
    resized = functional.resize(image, [height, width], resize.interpolation, antialias=True)
    return normalize(to_float(to_tensor(resized)))


def _telling_block(hidden: Sequence[np.ndarray]) -> int:
    """The block after which the longest token is longest against the median one."""
    by_block = np.concatenate([norms.reshape(len(norms), -1) for norms in hidden], axis=1)
    return int((by_block.max(axis=1) / np.median(by_block, axis=1)).argmax())


def _threshold(setting: ITAE, norms: Sequence[np.ndarray]) -> tuple[float | None, str]:
    """θ and where it comes from, in words."""
    pooled = np.concatenate([values.ravel() for values in norms])
    if setting.threshold == "auto":
        fit = fit_threshold(pooled)
        if fit.threshold is None:
            return None, f"no θ on the norm of the {setting.source}: {fit.reason}"
        return fit.threshold, f"θ on the norm of the {setting.source}: {fit.reason}"
    theta = float(setting.threshold)
    return theta, (f"θ = {theta:.4g} on the norm of the {setting.source} was given: "
                   f"{np.count_nonzero(pooled <= theta):,} of {pooled.size:,} patches lie at or below it")


def _look(
    backbone: Backbone, name: str, tensor: Tensor, measured: dict[str, Tensor], block: int, setting: ITAE
) -> Look:
    theta, norms = setting.thresholds[0], measured[setting.source]
    artifacts = torch.zeros_like(norms, dtype=torch.bool) if theta is None else norms <= theta
    after = cls_attention(attenuated_logits(measured["logits"], artifacts, setting), norms.shape[-1])
    patches = backbone.model.patch_embed.patch_size
    grid = tuple(side // patch for side, patch in zip(tensor.shape[1:], patches, strict=True))

    def on_grid(values: Tensor) -> np.ndarray:
        return values.cpu().numpy().reshape(grid)

    return Look(
        name=name,
        picture=undo_normalization(backbone, tensor),
        hidden=on_grid(measured["hidden"][0, block]),
        norms=on_grid(norms),
        before=on_grid(measured["attention"]),
        after=None if theta is None else on_grid(after),
        artifacts=on_grid(artifacts),
    )


def _describe(look: Look, original: Image) -> str:
    (rows, columns), (height, width, _) = look.hidden.shape, look.picture.shape
    words = (f"{look.name}: {original.width} × {original.height} shown to the model as {width} × {height}, "
             f"{columns} × {rows} patches")
    if look.after is None:
        return words
    return f"{words}, {np.count_nonzero(look.artifacts)} of them artifacts"
