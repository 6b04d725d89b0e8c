"""A close look at single images in their own shape: norms, attention and artifacts in one figure (`itae inspect`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from itae_utils.errors import ItaeError
from itae_utils.results import make_folder, replacing

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from itae_utils.attention import ITAE
    from itae_utils.backbones import Backbone

FORMATS = ("png", "pdf", "svg", "jpg")
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


def inspect_images(
    paths: Sequence[str | Path],
    *,
    backbone: str | Backbone = "demo",
    source: str = "key",
    threshold: float | str | None = None,
    output: str | Path = "inspect.png",
) -> list[str]:
    """Draw norms, `[CLS]` attention and artifacts of single images into one figure, a row an image.

    Images keep their shape: the short side becomes the backbone's image size, the long side the nearest multiple of the
    patch.

    Args:
        paths: image files, 50 at the most.
        backbone: from `load_backbone`, or a name for it.
        source: whose norm tells artifacts: "query", "key" or "value".
        threshold: θ; None or "auto" fits it to all patches of the given images together, where they are enough.
        output: the figure, .png, .pdf, .svg or .jpg; written in one step.

    Returns:
        Lines to print: what each image was resized to, where θ comes from or why there is none, what was written.

    Raises:
        ItaeError: no images or too many, an unreadable one (named), a bad setting, an output that can't be written.
    """
    import torch

    from itae_utils import figures
    from itae_utils.attention import ITAE
    from itae_utils.backbones import load_backbone
    from itae_utils.datasets import open_image

    output = Path(output)
    setting = ITAE(source=source, threshold="auto" if threshold is None else threshold)
    _check(paths, output)
    pictures = [open_image(Path(path)) for path in paths]
    if isinstance(backbone, str):
        backbone = load_backbone(backbone)
    tensors = [_resized(backbone, image) for image in pictures]
    with torch.inference_mode(), backbone.autocast():
        norms = [_norms(backbone, tensor, source) for tensor in tensors]
        theta, words = _threshold(setting, [look_norms for _, look_norms in norms])
        setting = replace(setting, threshold=(theta,))
        block = _telling_block([hidden for hidden, _ in norms])
        looks = [_look(backbone, Path(path).name, tensor, hidden[block], look_norms, setting)
                 for path, tensor, (hidden, look_norms) in zip(paths, tensors, norms, strict=True)]
    make_folder(output.parent)
    with replacing(output) as part:
        figures.inspection(looks, source, block + 1, words).savefig(part, format=output.suffix[1:].lower())
    planted = [f"{backbone.name}: {backbone.source}"] if backbone.truth is not None else []
    return [*map(_describe, looks, pictures), words, *planted, f"{output} written"]


def _check(paths: Sequence[str | Path], output: Path) -> None:
    if output.suffix[1:].lower() not in FORMATS:
        raise ItaeError(f"output {str(output)!r} must end in {', '.join(f'.{name}' for name in FORMATS)}")
    if output.is_dir():
        raise ItaeError(f"output {str(output)!r} is a folder: name a file")
    if not 1 <= len(paths) <= MOST_IMAGES:
        raise ItaeError(f"{len(paths)} images don't make a figure: give 1 to {MOST_IMAGES}")
    for path in paths:
        if not Path(path).is_file():
            raise ItaeError(f"{str(path)!r} is not a file: give image files")


def _resized(backbone: Backbone, image: Image) -> Tensor:
    """The image, preprocessed in its own shape: (3, H, W), both multiples of the patch."""
    from torchvision.transforms.v2 import functional

    resize, *_, to_tensor, to_float, normalize = backbone.transform.transforms
    patches = backbone.model.patch_embed.patch_size
    scale = backbone.image_size / min(image.size)
    height, width = (round(side * scale / patch) * patch
                     for side, patch in zip((image.height, image.width), patches, strict=True))
    resized = functional.resize(image, [height, width], resize.interpolation, antialias=True)
    return normalize(to_float(to_tensor(resized)))


def _norms(backbone: Backbone, tensor: Tensor, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Hidden norms (blocks, rows, columns), and those of the source in the last block (rows, columns)."""
    from itae_utils.artifacts import qkv_norms, token_norms

    batch = tensor[None].to(backbone.device)
    return (token_norms(backbone.model, batch)[0].cpu().numpy(),
            qkv_norms(backbone.model, batch)[source][0].cpu().numpy())


def _telling_block(hidden: Sequence[np.ndarray]) -> int:
    """The block after which the longest token is longest against the median one."""
    by_block = np.concatenate([norms.reshape(len(norms), -1) for norms in hidden], axis=1)
    return int((by_block.max(axis=1) / np.median(by_block, axis=1)).argmax())


def _threshold(setting: ITAE, norms: Sequence[np.ndarray]) -> tuple[float | None, str]:
    """θ and where it comes from, in words."""
    from itae_utils.thresholds import fit_threshold

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
    backbone: Backbone, name: str, tensor: Tensor, hidden: np.ndarray, norms: np.ndarray, setting: ITAE
) -> Look:
    from itae_utils.attention import attention_map
    from itae_utils.pixels import undo_normalization

    theta, batch = setting.thresholds[0], tensor[None].to(backbone.device)
    weights = [attention_map(backbone.model, batch, itae=itae)[0].cpu().numpy()
               for itae in ([None] if theta is None else [None, setting])]
    return Look(
        name=name,
        picture=undo_normalization(backbone, tensor),
        hidden=hidden,
        norms=norms,
        before=weights[0],
        after=None if theta is None else weights[1],
        artifacts=np.zeros(norms.shape, dtype=bool) if theta is None else norms <= theta,
    )


def _describe(look: Look, original: Image) -> str:
    (rows, columns), (height, width, _) = look.hidden.shape, look.picture.shape
    words = (f"{look.name}: {original.width} × {original.height} shown to the model as {width} × {height}, "
             f"{columns} × {rows} patches")
    if look.after is None:
        return words
    return f"{words}, {np.count_nonzero(look.artifacts)} of them artifacts"
