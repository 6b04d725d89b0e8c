"""What the explorer shows of features before and after ITAE: maps, clusters, nearest neighbours, and change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize as unit_rows

from itae_utils.analysis.clustering import FEWEST
from itae_utils.analysis.metrics import match_clusters
from itae_utils.analysis.remembered import clusters, tsne
from itae_utils.analysis.vectors import all_equal
from itae_utils.extraction.observation import sample_indices
from itae_utils.store.store import Store

NEIGHBOURS = 5
PERPLEXITY = 30  # of t-SNE, if there are images enough
MOST_IMAGES = 2000  # more points would hide each other, and their pictures would not fit into a page
MOST_IN_TSNE = 10_000  # two maps of so many images took 2 minutes on one core
PAIR = ("baseline", "itae")


@dataclass(frozen=True)
class FeatureMap:
    """m images of a data set before and after ITAE; a tuple holds the value of the baseline, then that of ITAE.

    Attributes:
        indices: (m,), the images' numbers in the data set.
        points: (m, 2) each, from `map_points`; None if there is nothing to map.
        clusters: (m,) each; those of ITAE have the numbers of the baseline's clusters that they share most images with.
        neighbours: (m, 5) each, places in `indices` of the nearest others by cosine, the nearest first.
        change: (m,), 1 − cosine between the two features.
    """

    indices: np.ndarray
    points: tuple[np.ndarray, np.ndarray] | None
    clusters: tuple[np.ndarray, np.ndarray]
    neighbours: tuple[np.ndarray, np.ndarray]
    change: np.ndarray

    @property
    def moved(self) -> np.ndarray:
        """Return which images changed their cluster, (m,) bool."""
        return self.clusters[0] != self.clusters[1]

    @property
    def kept(self) -> np.ndarray:
        """Return how many of their neighbours the images keep, (m,)."""
        return np.array([len(np.intersect1d(*each)) for each in zip(*self.neighbours, strict=True)])


def feature_map(features: Mapping[str, np.ndarray], k: int | None, *, sample: int, seed: int, kmeans_seed: int,
                n_init: int = 10, normalize: bool = True, algorithm: str = "exact",
                points: tuple[np.ndarray, np.ndarray] | None = None,
                store: str | Path | Store | None = "auto") -> FeatureMap:
    """Return the map of a sample of images; k-means runs on all of them.

    Args:
        features: "baseline" and "itae", (n, dim) each.
        k: number of clusters; None puts all images in one, as equal features do.
        sample: number of images on the map, at most 2,000.
        seed: for drawing them, and of t-SNE.
        kmeans_seed: of k-means.
        n_init: starts of k-means.
        normalize: whether rows are scaled to length 1 for k-means.
        algorithm: of k-means, as for `cluster_seeds`.
        points: of a map of the same images, which stay; by default t-SNE places them.
        store: as for `extract_features`.
    """
    whole = [features[name] for name in PAIR]
    indices = sample_indices(len(whole[0]), min(sample, MOST_IMAGES), seed)
    found = [np.zeros(len(rows), dtype=int) if k is None or all_equal(rows, normalize=normalize) else
             clusters(rows, k, seeds=[kmeans_seed], n_init=n_init, normalize=normalize, algorithm=algorithm,
                      store=store)[0][0] for rows in whole]
    chosen = [rows[indices] for rows in whole]
    unit = [unit_rows(rows) for rows in chosen]
    return FeatureMap(indices, points or map_points(*chosen, seed=seed, store=store),
                      (found[0][indices], _renumbered(*found)[indices]), tuple(map(_nearest, chosen)),
                      np.maximum(0, 1 - (unit[0] * unit[1]).sum(axis=1)))


def map_points(before: np.ndarray, after: np.ndarray, *, seed: int, store: str | Path | Store | None = "auto"
               ) -> tuple[np.ndarray, np.ndarray] | None:
    """Return t-SNE of the features (n, dim) of the baseline and of ITAE, (n, 2) each; the second starts at the first.

    t-SNE may shift a whole map, which means nothing: the second is shifted back by the median over the images. The
    result is None for fewer than 4 images, or if all have the same features. `seed` and `store` are as for `tsne`.
    """
    if len(before) < FEWEST or all_equal(before) or all_equal(after):
        return None
    settings = {"perplexity": min(PERPLEXITY, (len(before) - 1) / 3), "seed": seed, "store": store}
    start = tsne(before, **settings)
    if np.array_equal(before, after):
        return start, start
    end = tsne(after, start=start, **settings)
    return start, end - np.median(end - start, axis=0)


def _renumbered(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the clusters `after` with the numbers of their matches `before`; those without a match get new numbers."""
    match = match_clusters(before, after)
    free = iter(range(max(before.max(), after.max()) + 1, 10**9))
    numbers = {each: match[each] if each in match else next(free) for each in np.unique(after).tolist()}
    return np.array([numbers[each] for each in after.tolist()])


def _nearest(rows: np.ndarray) -> np.ndarray:
    count = min(NEIGHBOURS, len(rows) - 1)
    if not count:
        return np.empty((len(rows), 0), dtype=int)
    return NearestNeighbors(n_neighbors=count, metric="cosine").fit(rows).kneighbors(return_distance=False)


def describe_map(found: FeatureMap) -> str:
    """Return a sentence on how many images changed their cluster, and how many neighbours were kept."""
    return (f"Of the {len(found.indices):,} images on the map, {np.count_nonzero(found.moved):,} change their cluster "
            f"with ITAE: {describe_kept(found)}.")


def describe_kept(found: FeatureMap) -> str:
    """Return how many of its nearest neighbours an image keeps, in words."""
    return f"on average an image keeps {found.kept.mean():.1f} of its {found.neighbours[0].shape[1]} nearest neighbours"
