"""Images as plain numbers: the baseline without a model, and what a model's preprocessing leaves of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from itae_utils.errors import ItaeError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from torch.utils.data import Dataset

    from itae_utils.backbones import Backbone

LARGEST_SIDE = 32  # more pixels cost k-means time and tell it nothing about what is in a photograph


def pixel_features(dataset: Dataset, size: int) -> np.ndarray:
    """Every image, resized to `size` × `size` pixels (32 at the most), as one row of intensities in [0, 1].

    Returns:
        (n, side · side · 3) float32; only one channel where all images are grey, which k-means can't tell from three.

    Raises:
        ItaeError: a size below 1.
    """
    if size < 1:
        raise ItaeError(f"size={size} is not a number of pixels: use 1 or more")
    side = min(size, LARGEST_SIDE)
    pixels = np.stack([np.asarray(image.resize((side, side)), dtype=np.float32) for image, _ in dataset]) / 255
    is_grey = (pixels == pixels[..., :1]).all()
    return (pixels[..., :1] if is_grey else pixels).reshape(len(pixels), -1)


def picture(backbone: Backbone, image: Image) -> np.ndarray:
    """The image as the backbone gets it, after resizing and cropping, for looking at: (H, W, 3) in [0, 1]."""
    return undo_normalization(backbone, backbone.transform(image))


def undo_normalization(backbone: Backbone, tensor: Tensor) -> np.ndarray:
    """What a preprocessed image (3, H, W) looks like: (H, W, 3) in [0, 1]."""
    normalize = backbone.transform.transforms[-1]
    return np.clip(tensor.permute(1, 2, 0).numpy() * np.array(normalize.std) + np.array(normalize.mean), 0, 1)
