"""K-means in bounded memory: whole on one float32 copy of the features, or in mini-batches over parts of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.preprocessing import normalize as unit_rows

from itae_utils.errors import ItaeError

BATCH = 1024  # images a step of `cluster_parts`
BLOCK = 16 * BATCH  # images it holds at a time and shuffles, and its sample; also how much `cluster` copies at a time


def cluster(
    features: np.ndarray,
    k: int,
    *,
    seed: int = 0,
    n_init: int = 10,
    normalize: bool = True,
    max_memory: int | None = None,
) -> tuple[np.ndarray, float]:
    """K-means (scikit-learn's, k-means++ starts, the best of `n_init`) on features (n, dim) of any float type.

    Each start goes on until no label changes, or for 300 rounds. Beside the features themselves one float32 copy of
    n × dim is held, and little else where dim is large.

    Args:
        features: (n, dim); they stay as they are.
        k: number of clusters.
        seed: of the starts.
        n_init: number of starts.
        normalize: whether rows are scaled to length 1 first; rows of zeros stay.
        max_memory: bytes that the copy may take; by default half of the machine's memory (no bound where the system
            doesn't tell it).

    Returns:
        Labels (n,) in 0 … k - 1, and the inertia: the sum of squared distances to the cluster centres.

    Raises:
        ItaeError: features that aren't a finite matrix, k below 2 or above n, n_init below 1, a copy above max_memory.
    """
    labels, inertias = cluster_seeds(
        features, k, seeds=[seed], n_init=n_init, normalize=normalize, max_memory=max_memory
    )
    return labels[0], float(inertias[0])


def cluster_seeds(
    features: np.ndarray,
    k: int,
    *,
    seeds: int | Sequence[int] = 10,
    n_init: int = 10,
    normalize: bool = True,
    max_memory: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`cluster` for every seed (a number means that many, from 0) on one copy: labels (seeds, n), inertias (seeds,)."""
    features, seeds = np.asarray(features), seed_list(seeds)
    if features.ndim != 2:
        raise ItaeError(f"features of shape {features.shape} can't be clustered: a matrix (images, dim) is needed")
    _check_memory(features.shape, max_memory)
    _check_counts(k, n_init, len(features))
    held, runs = np.empty(features.shape, dtype=np.float32), []
    for seed in seeds:
        # Set anew: KMeans centres its data in place, and adding the mean back leaves rounding for the next seed.
        for first in range(0, len(held), BLOCK):
            rows = slice(first, first + BLOCK)
            held[rows] = features[rows]
            _prepare(held[rows], first, normalize)
        # For any other tolerance KMeans calls np.var, which holds one more copy, to stop a few labels early.
        runs.append(KMeans(k, n_init=n_init, random_state=seed, tol=0, copy_x=False).fit(held))
    return np.stack([run.labels_ for run in runs]), np.array([run.inertia_ for run in runs])


def cluster_parts(
    parts: Callable[[], Iterable[np.ndarray]],
    k: int,
    *,
    seed: int = 0,
    n_init: int = 3,
    normalize: bool = True,
    passes: int = 5,
) -> tuple[np.ndarray, float]:
    """K-means on features too large for memory, as in `cluster_parts(lambda: features.parts("itae"), k)`.

    This is an approximation (scikit-learn's MiniBatchKMeans): it ends near a minimum, not in one. Expect the clusters
    of `cluster` where they are clear, and a somewhat larger inertia where they overlap; more passes bring it closer.
    Each start is k-means on a uniform sample of the images, so images sorted by class do no harm. The result depends on
    the seed and on the order of the images, not on how they are cut into parts. Held are one part and a few times
    16,384 images (32 · k if that is more); the parts are read `passes` + 2 times.

    Args:
        parts: called for every pass, gives the features in the same order each time, (m, dim) a part, of any float
            type; m may differ between parts.
        k: number of clusters.
        seed: of the sample, the starts and the order of images within 16,384.
        n_init: number of starts; they share the passes, and the one of lowest inertia is kept.
        normalize: whether rows are scaled to length 1 first; rows of zeros stay.
        passes: over all images, before the one that gives the labels.

    Returns:
        Labels (n,) in 0 … k - 1, in the order of the parts, and the inertia; a cluster may be left empty.

    Raises:
        ItaeError: parts that aren't finite matrices of one width, or that don't start over when called again; k below 2
            or above n, n_init or passes below 1.
    """
    if not callable(parts):
        raise ItaeError(f"parts of type {type(parts).__name__} can be read only once: give a function that starts them "
                        "over, as in cluster_parts(lambda: features.parts(name), k)")
    if passes < 1:
        raise ItaeError(f"passes={passes} is too few passes over the parts: use 1 or more")
    _check_counts(k, n_init)
    rng, block = np.random.default_rng(seed), max(BLOCK, 32 * k)
    sample, count = _sample(_blocks(parts(), block, normalize), rng)
    _check_counts(k, n_init, count)
    models = [_start(sample, k, int(start)) for start in rng.integers(2**31, size=n_init)]
    for _ in range(passes):
        for _, rows in _blocks(parts(), block, normalize):
            order = rng.permutation(len(rows))
            for first in range(0, len(rows), BATCH):
                batch = rows[order[first : first + BATCH]]
                for model in models:
                    model.partial_fit(batch)
    labels, inertias = _label(_blocks(parts(), block, normalize), models, count)
    best = inertias.argmin()
    return labels[best], float(inertias[best])


def seed_list(seeds: int | Sequence[int]) -> list[int]:
    """The seeds that are meant: a number means that many, from 0.

    Raises:
        ItaeError: none are.
    """
    chosen = list(range(seeds)) if isinstance(seeds, Integral) else list(seeds)
    if not chosen:
        raise ItaeError(f"seeds={seeds!r} names no seed: give a number of 1 or more, or a list")
    return chosen


def _start(sample: np.ndarray, k: int, seed: int):
    """A MiniBatchKMeans that has the sample's clusters behind it, as centres and as their weights.

    Without that weight the first image near a centre would replace it. Small clusters stay as they are: scikit-learn
    would else move centres that one batch doesn't touch, most of them where images are sorted by class.
    """
    centres = KMeans(k, n_init=1, random_state=seed).fit(sample).cluster_centers_
    model = MiniBatchKMeans(k, init=centres, n_init=1, reassignment_ratio=0, compute_labels=False, random_state=seed)
    return model.partial_fit(sample)


def _label(blocks: Iterable[tuple[int, np.ndarray]], models: Sequence, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (models, count) and inertias (models,) of all rows; `count` is how many there were before."""
    labels, inertias, seen = np.empty((len(models), count), dtype=np.int32), np.zeros(len(models)), 0
    for first, rows in blocks:
        seen = first + len(rows)
        if seen > count:
            break
        for run, model in enumerate(models):
            nearest, squares = pairwise_distances_argmin_min(rows, model.cluster_centers_, metric="sqeuclidean")
            labels[run, first:seen] = nearest
            inertias[run] += squares.sum(dtype=np.float64)
    if seen != count:
        raise ItaeError(f"parts() doesn't give the same {count:,} images each time it is called: let it start over, as "
                        "lambda: features.parts(name) does")
    return labels, inertias


def _sample(blocks: Iterable[tuple[int, np.ndarray]], rng: np.random.Generator) -> tuple[np.ndarray | None, int]:
    """As many rows as the first block has, each row of all blocks equally likely; and how many there are."""
    sample, count = None, 0
    for first, rows in blocks:
        count = first + len(rows)
        if sample is None:
            sample = rows.copy()
        else:
            # a reservoir: row i takes a random one of i + 1 places, of which the sample has the first
            slots = rng.integers(1 + np.arange(first, count))
            kept = slots < len(sample)
            sample[slots[kept]] = rows[kept]
    return sample, count


def _blocks(parts: Iterable[np.ndarray], size: int, normalize: bool) -> Iterator[tuple[int, np.ndarray]]:
    """The number of its first row, and `size` rows (the last time fewer), however the parts are cut.

    The array is the same each time, with other rows in it.
    """
    block, first, filled = None, 0, 0
    for part in parts:
        rest = np.asarray(part)
        if rest.ndim != 2 or (block is not None and rest.shape[1] != block.shape[1]):
            width = "dim" if block is None else block.shape[1]
            raise ItaeError(f"a part of shape {rest.shape} can't be clustered: each must be a matrix (images, {width})")
        if block is None:
            block = np.empty((size, rest.shape[1]), dtype=np.float32)
        while len(rest):
            rows, rest = rest[: size - filled], rest[size - filled :]
            block[filled : filled + len(rows)] = rows
            filled += len(rows)
            if filled == size:
                _prepare(block, first, normalize)
                yield first, block
                first, filled = first + size, 0
    if filled:
        _prepare(block[:filled], first, normalize)
        yield first, block[:filled]


def _prepare(rows: np.ndarray, first: int, normalize: bool) -> None:
    """Refuse rows that aren't finite, counting from `first`, and scale them to length 1 in place if asked."""
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise ItaeError(f"features of image {first + bad[0]:,} aren't finite in float32: mend the extraction")
    if normalize:
        unit_rows(rows, copy=False)


def _check_memory(shape: tuple[int, ...], max_memory: int | None) -> None:
    needed, bound = 4 * shape[0] * shape[1], max_memory
    if bound is None:
        if not hasattr(os, "sysconf"):
            return
        bound = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if needed > bound:
        whose = "half of this machine's memory" if max_memory is None else "max_memory"
        raise ItaeError(f"k-means on features {shape[0]:,} × {shape[1]:,} takes {needed:,} bytes, more than {whose}, "
                        f"{bound:,}: use cluster_parts(lambda: features.parts(name), k), MiniBatchKMeans over the "
                        "store's parts, or raise max_memory")


def _check_counts(k: int, n_init: int, images: int | None = None) -> None:
    if n_init < 1:
        raise ItaeError(f"n_init={n_init} is too few k-means starts: use 1 or more")
    if k < 2:
        raise ItaeError(f"k={k} is too few clusters: use 2 or more")
    if images is not None and k > images:
        raise ItaeError(f"k={k} is more clusters than there are images, {images:,}: use fewer, or more images")
