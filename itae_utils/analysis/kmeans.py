"""K-means in bounded memory: on one float32 copy of the features, or in mini-batches over parts of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.preprocessing import normalize as unit_rows

from itae_utils.errors import ItaeError
from itae_utils.machine import available_memory

BATCH = 1024  # images per step of `cluster_parts`
BLOCK = 16 * BATCH  # images that it holds and shuffles at a time, and its sample; `cluster` copies as many at a time


def cluster(
    features: np.ndarray,
    k: int,
    *,
    seed: int = 0,
    n_init: int = 10,
    normalize: bool = True,
    max_memory: int | None = None,
) -> tuple[np.ndarray, float]:
    """Run k-means (scikit-learn's, the best of `n_init` k-means++ starts) on features (n, dim) of any float type.

    Each start runs until no label changes, for at most 300 rounds. Memory: one float32 copy of the features, n × dim,
    and little else if dim is large.

    Args:
        features: (n, dim); not modified.
        k: number of clusters.
        seed: of the starts.
        n_init: number of starts.
        normalize: whether rows are scaled to length 1 first; rows of zeros stay.
        max_memory: bytes that the copy may take; by default half of the machine's memory (no bound if that is unknown).

    Returns:
        Labels (n,) in 0 … k - 1, and the inertia: the sum of squared distances to the cluster centres.

    Raises:
        ItaeError: features that are not a finite matrix, k below 2 or above n, n_init below 1, a copy above max_memory.
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
    """Run `cluster` for every seed (a number means that many, from 0): labels (seeds, n) and inertias (seeds,)."""
    features, seeds = np.asarray(features), seed_list(seeds)
    if features.ndim != 2:
        raise ItaeError(f"features of shape {features.shape} can't be clustered: give a matrix (images, dim)")
    _check_memory(features.shape, max_memory)
    _check_counts(k, n_init, len(features))
    held, runs = np.empty(features.shape, dtype=np.float32), []
    for seed in seeds:
        # Copied again for every seed: KMeans centres its data in place, and adding the mean back leaves rounding.
        for first in range(0, len(held), BLOCK):
            rows = slice(first, first + BLOCK)
            held[rows] = features[rows]
            _prepare(held[rows], first, normalize)
        # For any other tolerance KMeans calls np.var, which makes one more copy, to stop a few labels early.
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
    """Run k-means on features too large for memory, as in `cluster_parts(lambda: features.parts("itae"), k)`.

    This is an approximation (scikit-learn's MiniBatchKMeans) that ends near a minimum. Clear clusters are those of
    `cluster`; overlapping clusters have a slightly larger inertia, which more passes reduce. Each start is k-means on a
    uniform sample of the images, so images may be sorted by class. The result depends on the seed and on the order of
    the images, not on the cuts between parts. Memory: one part and a few times 16,384 images (32 · k if that is more).
    The parts are read `passes` + 2 times.

    Args:
        parts: called for every pass; gives the features in the same order each time, (m, dim) per part, of any float
            type. m may differ between parts.
        k: number of clusters.
        seed: of the sample, the starts and the order of images within 16,384.
        n_init: number of starts; they share the passes, and the one with the lowest inertia is returned.
        normalize: whether rows are scaled to length 1 first; rows of zeros stay.
        passes: over all images, before the pass that computes the labels.

    Returns:
        Labels (n,) in 0 … k - 1, in the order of the parts, and the inertia; a cluster may be empty.

    Raises:
        ItaeError: parts that are not finite matrices of one width, or that don't start over when called again; k below
            2 or above n, n_init or passes below 1.
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
    """Return the seeds as a list; a number means that many, from 0.

    Raises:
        ItaeError: the list is empty.
    """
    chosen = list(range(seeds)) if isinstance(seeds, Integral) else list(seeds)
    if not chosen:
        raise ItaeError(f"seeds={seeds!r} gives no seed: use a number of 1 or more, or a list")
    return chosen


def _start(sample: np.ndarray, k: int, seed: int):
    """Return a MiniBatchKMeans that starts from the sample's clusters, their centres and their weights.

    Without the weights the first image near a centre would replace it. Reassignment is off: scikit-learn would move the
    centres of clusters without images in a batch, which are most of them if images are sorted by class.
    """
    centres = KMeans(k, n_init=1, random_state=seed).fit(sample).cluster_centers_
    model = MiniBatchKMeans(k, init=centres, n_init=1, reassignment_ratio=0, compute_labels=False, random_state=seed)
    return model.partial_fit(sample)


def _label(blocks: Iterable[tuple[int, np.ndarray]], models: Sequence, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (models, count) and inertias (models,) of all rows, of which `count` are expected."""
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
        raise ItaeError(f"parts() does not give the same {count:,} images each time: let it start over, as "
                        "lambda: features.parts(name) does")
    return labels, inertias


def _sample(blocks: Iterable[tuple[int, np.ndarray]], rng: np.random.Generator) -> tuple[np.ndarray | None, int]:
    """Return a uniform sample of all rows, as many as the first block has, and the number of all rows."""
    sample, count = None, 0
    for first, rows in blocks:
        count = first + len(rows)
        if sample is None:
            sample = rows.copy()
        else:
            # reservoir sampling: row i takes a random one of i + 1 places, of which the sample holds the first
            slots = rng.integers(1 + np.arange(first, count))
            kept = slots < len(sample)
            sample[slots[kept]] = rows[kept]
    return sample, count


def _blocks(parts: Iterable[np.ndarray], size: int, normalize: bool) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of the first row, and `size` rows (the last time fewer), from parts of any length.

    The same array is yielded each time, filled with new rows.
    """
    block, first, filled = None, 0, 0
    for part in parts:
        rest = np.asarray(part)
        if rest.ndim != 2 or (block is not None and rest.shape[1] != block.shape[1]):
            width = "dim" if block is None else block.shape[1]
            raise ItaeError(f"a part of shape {rest.shape} can't be clustered: give matrices (images, {width})")
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
    """Scale rows to length 1 in place if asked; refuse rows that are not finite, numbered from `first`."""
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise ItaeError(f"features of image {first + bad[0]:,} are not finite in float32: extract them again")
    if normalize:
        unit_rows(rows, copy=False)


def _check_memory(shape: tuple[int, ...], max_memory: int | None) -> None:
    needed, bound = 4 * shape[0] * shape[1], max_memory
    if bound is None:
        memory = available_memory()
        if memory is None:
            return
        bound = memory // 2
    if needed > bound:
        whose = "half of this machine's memory" if max_memory is None else "max_memory"
        raise ItaeError(f"k-means on features {shape[0]:,} × {shape[1]:,} takes {needed:,} bytes, more than {whose}, "
                        f"{bound:,}: use cluster_parts(lambda: features.parts(name), k), MiniBatchKMeans over the "
                        "store's parts, or raise max_memory")


def _check_counts(k: int, n_init: int, images: int | None = None) -> None:
    if n_init < 1:
        raise ItaeError(f"n_init={n_init} is too few: use 1 or more k-means starts")
    if k < 2:
        raise ItaeError(f"k={k} is too few: use 2 or more clusters")
    if images is not None and k > images:
        raise ItaeError(f"k={k} is more than the number of images, {images:,}: use fewer clusters, or more images")
