"""Statistics, attention and artifacts of single images, which keep their shape (`itae inspect`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from itae_utils.analysis.words import statistic_name
from itae_utils.data.images import open_image, shown
from itae_utils.errors import ItaeError
from itae_utils.extraction.observation import measure_batch
from itae_utils.method.attention import attenuated_logits
from itae_utils.method.direction import directions_of
from itae_utils.method.setting import ITAE, WHERE, beyond
from itae_utils.method.statistics import cls_attention
from itae_utils.method.thresholds import fit_threshold
from itae_utils.models.backbones import Backbone, load_backbone

MOST_IMAGES = 50  # more rows are too many for one figure
LONGEST = 16  # long side over short side; a longer image is a line in the figure
MOST_PATCHES = 50_000  # of one image; attention takes time and memory by their square


@dataclass(frozen=True)
class InspectedImage:
    """One image as the model sees it; maps are (rows, columns) of its patch grid."""

    name: str  # of the file
    picture: np.ndarray  # (H, W, 3) in [0, 1]
    hidden: np.ndarray  # norm of the patch tokens after one block
    statistic: np.ndarray  # in the last block, see `ITAE.source`
    before: np.ndarray  # attention of `[CLS]` in the last block, mean over the heads
    after: np.ndarray | None  # the same with ITAE; None without θ
    artifacts: np.ndarray  # bool


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_images`."""

    images: list[InspectedImage]
    source: str  # the statistic that was compared with θ
    block: int  # number of the block, from 1, after which `InspectedImage.hidden` is measured
    threshold: str  # a sentence that states θ and its origin, or why there is no θ
    lines: list[str]  # a summary for the terminal: the size of each image, θ, and planted artifacts


def inspect_images(
    paths: Sequence[str | Path], *, backbone: str | Backbone = "demo", source: str = "key",
    threshold: float | str | None = None, tail: Literal["low", "high"] | None = None, rank: int = 1,
    attenuation: str = "min", on_error: Literal["raise", "skip"] = "raise", **options: object,
) -> Inspection:
    """Measure a statistic, `[CLS]` attention and artifacts of images, one at a time; `figures.inspection` draws them.

    Images keep their shape: the short side becomes the backbone's image size, the long side the nearest multiple of the
    patch.

    Args:
        paths: at most 50 image files.
        backbone: from `load_backbone`, or its name.
        source: the statistic that identifies artifacts, see `ITAE`.
        threshold: θ, or a rule that is applied to all patches of these images together: "auto" (also None; it needs
            2,000 patches), "share:2%" or "sd:3".
        tail: as for `ITAE`.
        rank: as for `ITAE`.
        attenuation: as for `ITAE`. "substitute" edits values, so it does not change the attention.
        on_error: "skip" leaves out images that cannot be read, and says so in `lines`.
        options: of `load_backbone`, such as checkpoint, image_size, device and precision, if `backbone` is a name.

    Raises:
        ItaeError: no images or more than 50, an unreadable image (named), one that is longer than 16 times its short
            side or has too many patches, or a bad setting, such as a source that the model does not have.
    """
    setting = ITAE(source=source, threshold="auto" if threshold is None else threshold, tail=tail, rank=rank,
                   attenuation=attenuation)
    if isinstance(paths, (str, Path)):
        paths = [paths]
    if not 1 <= len(paths) <= MOST_IMAGES:
        raise ItaeError(f"{len(paths)} images do not fit in one figure: give 1 to {MOST_IMAGES}")
    if options and not isinstance(backbone, str):
        raise ItaeError(f"{', '.join(options)} can't change a loaded backbone: give its name, or leave this out")
    sizes, skipped = _sizes([Path(path).expanduser() for path in paths], on_error)
    if isinstance(backbone, str):
        backbone = load_backbone(backbone, **options)
    shapes = {path: _shape(backbone, path, size) for path, size in sizes.items()}
    directions = directions_of(backbone.model, backbone.num_blocks - 1, setting)
    with torch.inference_mode(), backbone.autocast():
        # only one picture at a time is in memory in its full size
        tensors = [backbone.preprocessing.resized(open_image(path), shape) for path, shape in shapes.items()]
        seen = [measure_batch(backbone, tensor[None].to(backbone.device), directions) for tensor in tensors]
        theta, words = _threshold(setting, [measured[source].cpu().numpy() for measured in seen])
        setting = replace(setting, threshold=(theta,))
        block = _peak_block([measured["hidden"][0].cpu().numpy() for measured in seen])
        images = [_inspected(backbone, path.name, tensor, measured, block, setting)
                  for path, tensor, measured in zip(sizes, tensors, seen, strict=True)]
    planted = [f"{backbone.name}: {backbone.source}"] if backbone.truth is not None else []
    return Inspection(images, source, block + 1, words,
                      [*map(_describe, images, sizes.values()), words, *planted, *skipped])


def _sizes(paths: Sequence[Path], on_error: str) -> tuple[dict[Path, tuple[int, int]], list[str]]:
    """Return (width, height) of each image, and a line for each that is left out; raise an error before any work."""
    if on_error not in ("raise", "skip"):
        raise ItaeError(f"on_error={on_error!r} is not valid: use 'raise' or 'skip'")
    sizes, skipped = {}, []
    for path in paths:
        if not path.is_file():
            raise ItaeError(f"{shown(path)!r} is not a file: give image files")
        try:
            width, height = sizes[path] = open_image(path).size
        except ItaeError as error:
            if on_error == "raise":
                raise
            skipped.append(f"left out: {error}")
            continue
        if max(width, height) > LONGEST * min(width, height):
            raise ItaeError(f"{shown(path.name)} has {width} × {height} pixels, so its long side is more than "
                            f"{LONGEST} times its short side: crop it")
    if not sizes:
        raise ItaeError(f"none of the {len(paths)} images can be read: {skipped[0]}")
    return sizes, skipped


def _shape(backbone: Backbone, path: Path, size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width, both multiples of the patch, at which the model sees an image of (width, height)."""
    width, height = size
    scale, patches = backbone.image_size / min(size), backbone.model.patch_embed.patch_size
    rows, columns = (round(side * scale / patch) for side, patch in zip((height, width), patches, strict=True))
    if rows * columns > MOST_PATCHES:
        raise ItaeError(f"{shown(path.name)} would have {columns:,} × {rows:,} patches, more than {MOST_PATCHES:,}"
                        ": use a smaller image_size, or crop it")
    return rows * patches[0], columns * patches[1]


def _peak_block(hidden: Sequence[np.ndarray]) -> int:
    """Return the block after which the longest token is the largest multiple of the median one."""
    by_block = np.concatenate([norms.reshape(len(norms), -1) for norms in hidden], axis=1)
    return int((by_block.max(axis=1) / np.median(by_block, axis=1)).argmax())


def _threshold(setting: ITAE, values: Sequence[np.ndarray]) -> tuple[float | None, str]:
    """Return θ, and a sentence about its origin."""
    rule, name = setting.threshold, statistic_name(setting.source)
    fit = fit_threshold(np.concatenate([each.ravel() for each in values]), side=setting.side, source=setting.source)
    theta = fit.apply(rule)
    if theta is None:
        return None, f"no θ on the {name}: {fit.reason}"
    if rule == "auto":
        words = f"θ on the {name}: {fit.reason}"
    else:
        origin = f"follows from {rule}" if isinstance(rule, str) else "was given"
        words = (f"θ = {theta:.4g} on the {name} {origin}: {np.count_nonzero(fit.beyond(theta)):,} of "
                 f"{fit.values.size:,} patches lie {WHERE[setting.side]} it")
    if setting.attenuation == "substitute":
        words += "; substitute edits their values, and the attention stays as it is"
    return float(theta), words


def _inspected(
    backbone: Backbone, name: str, tensor: Tensor, measured: dict[str, Tensor], block: int, setting: ITAE
) -> InspectedImage:
    (theta,), statistic = setting.thresholds, measured[setting.source]
    artifacts = beyond(statistic, theta, setting.side)
    after = cls_attention(attenuated_logits(measured["logits"], artifacts, setting), statistic.shape[-1]).mean(dim=1)
    patch_height, patch_width = backbone.model.patch_embed.patch_size
    grid = (tensor.shape[1] // patch_height, tensor.shape[2] // patch_width)

    def on_grid(values: Tensor) -> np.ndarray:
        return values.cpu().numpy().reshape(grid)

    return InspectedImage(
        name=name,
        picture=backbone.preprocessing.undo(tensor),
        hidden=on_grid(measured["hidden"][0, block]),
        statistic=on_grid(statistic),
        before=on_grid(measured["attention"]),
        after=None if theta is None else on_grid(after),
        artifacts=on_grid(artifacts),
    )


def _describe(image: InspectedImage, size: tuple[int, int]) -> str:
    (rows, columns), (height, width, _) = image.hidden.shape, image.picture.shape
    words = (f"{shown(image.name)}: {size[0]} × {size[1]} shown to the model as {width} × {height}, "
             f"{columns} × {rows} patches")
    if image.after is None:
        return words
    return f"{words}, {np.count_nonzero(image.artifacts)} of them artifacts"
