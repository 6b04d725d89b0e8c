"""Raw pixels as features, and what features (n, dim) say without k-means: equality, change, and neighbours."""

from __future__ import annotations

import numpy as np
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize as unit_rows
from torch.utils.data import Dataset

from itae_utils.analysis.rows import as_matrix
from itae_utils.data.items import picture_of
from itae_utils.errors import ItaeError

LARGEST_SIDE = 32  # pixels; larger images make k-means slower, not better
NEIGHBOURS = 10
ROUNDING = 1e-5  # features that differ by less, relative to the largest, are equal


def pixel_features(dataset: Dataset, size: int) -> np.ndarray:
    """Return one row of pixel values in [0, 1] per image, resized to side × side pixels, side = min(size, 32).

    The array is float32, (n, side · side · 3); (n, side · side) if all images are grey, which gives the same clusters.

    Raises:
        ItaeError: a size below 1.
    """
    if size < 1:
        raise ItaeError(f"size={size} is not a number of pixels: use 1 or more")
    side = min(size, LARGEST_SIDE)
    pictures = (picture_of(dataset[index], index) for index in range(len(dataset)))
    pixels = np.stack([np.asarray(picture.resize((side, side)), dtype=np.float32) for picture in pictures]) / 255
    is_grey = (pixels == pixels[..., :1]).all()
    return (pixels[..., :1] if is_grey else pixels).reshape(len(pixels), -1)


def all_equal(features: np.ndarray, *, normalize: bool = True) -> bool:
    """Return whether all rows (n, dim) are equal up to rounding, scaled to length 1 first if `normalize`.

    scikit-learn's t-SNE of equal rows ends in a segmentation fault.
    """
    rows = as_matrix(features)
    rows = unit_rows(rows) if normalize else rows
    return bool(np.ptp(rows, axis=0).max() <= ROUNDING * np.abs(rows).max())


def cosine_distance(rows: np.ndarray, others: np.ndarray) -> float:
    """Return the mean of 1 − cos over corresponding rows of two (n, dim) arrays."""
    rows, others = as_matrix(rows), as_matrix(others)
    if rows.shape != others.shape:
        raise ItaeError(f"features of shapes {rows.shape} and {others.shape} can't be compared: give the same images")
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    cosines = (rows * others).sum(axis=1) / np.maximum(lengths, np.finfo(np.float32).tiny)
    return max(0.0, float(np.mean(1 - cosines)))


def neighbour_agreement(points: np.ndarray, targets: np.ndarray, neighbours: int = NEIGHBOURS) -> float:
    """Return the share of nearest neighbours with the same class as the point, averaged over all points (n, d)."""
    points, targets = as_matrix(points), np.asarray(targets)
    neighbours = min(neighbours, len(points) - 1)
    nearest = NearestNeighbors(n_neighbors=neighbours).fit(points).kneighbors(return_distance=False)
    return float((targets[nearest] == targets[:, None]).mean())
