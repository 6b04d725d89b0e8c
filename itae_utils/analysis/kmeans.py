"""K-means of features: exact and in bounded memory, or scikit-learn's as a reference."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.metrics import pairwise_distances_argmin
from torch import Tensor
from tqdm.auto import tqdm

from itae_utils.analysis.lloyd import inertias_of, lloyd, lloyd_in_parts
from itae_utils.analysis.plus_plus import inner_products, plus_plus
from itae_utils.analysis.rows import Parts, all_rows, as_matrix, read_rows, sample_rows
from itae_utils.analysis.threads import full_precision, one_thread
from itae_utils.environment import hides_progress
from itae_utils.errors import ItaeError, whole_number
from itae_utils.extraction.batches import is_out_of_memory
from itae_utils.machine import available_memory
from itae_utils.models.device import resolve_device

WORK_BYTES = 2**30  # memory beside the features: half for inner products, a quarter for scores, the rest in passing
SMALL = 2**24  # scores of all starts: in smaller problems torch's threads wait for each other more than they help
USUAL_ROUNDS = 5  # full rounds of products that a start costs, roughly: most rounds move few centres
EQUAL = 1e-9  # relative difference of inertias that may be rounding: the first of equal starts counts
FEWEST_SAMPLED = 10  # rows per cluster, for the first centres of features that do not fit in memory
# Of (k, n_init, seed). MTEB clusters image features with the second.
REFERENCES = {
    "scikit-learn": lambda k, n_init, seed: KMeans(k, n_init=n_init, random_state=seed, tol=0),
    "mini-batch": lambda k, n_init, seed: MiniBatchKMeans(k, n_init=n_init, random_state=seed, batch_size=500),
}
ALGORITHMS = ("exact", *REFERENCES)


def cluster(
    features: np.ndarray,
    k: int,
    *,
    seed: int = 0,
    n_init: int = 10,
    normalize: bool = True,
    algorithm: str = "exact",
    device: str = "auto",
    max_memory: int | None = None,
) -> tuple[np.ndarray, float]:
    """Run k-means on features (n, dim) of any float type, and return the best of `n_init` starts.

    Args:
        features: (n, dim); not modified.
        k: number of clusters.
        seed: of the starts. A start depends on the seed and its number alone, up to rounding.
        n_init: number of starts.
        normalize: whether rows are scaled to length 1 first; rows of zeros stay.
        algorithm: "exact" is greedy k-means++ and Lloyd's algorithm until no label changes (at most 300 rounds), see
            `lloyd`. "scikit-learn" runs its `KMeans` with tol=0, which finds the same minima, but more slowly.
            "mini-batch" runs its `MiniBatchKMeans` with batch_size=500, as MTEB does.
        device: for "exact"; "auto" is CUDA if available, else the CPU.
        max_memory: bytes that a float32 copy of the features may take; by default half of the machine's memory (no
            bound if that is unknown). "exact" takes about 1 GiB beside it at most.

    Returns:
        Labels (n,) in 0 … k - 1, and the inertia: the sum of squared distances to the cluster centres.

    Raises:
        ItaeError: features that are not a finite matrix, k below 2 or above n, n_init below 1, a copy above max_memory,
            or another value that is not valid.
    """
    labels, inertias = cluster_seeds(features, k, seeds=[seed], n_init=n_init, normalize=normalize, algorithm=algorithm,
                                     device=device, max_memory=max_memory)
    return labels[0], float(inertias[0])


def cluster_seeds(
    features: np.ndarray,
    k: int,
    *,
    seeds: int | Sequence[int] = 10,
    n_init: int = 10,
    normalize: bool = True,
    algorithm: str = "exact",
    device: str = "auto",
    max_memory: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Run `cluster` for every seed (a number means that many, from 0): labels (seeds, n) and inertias (seeds,)."""
    features, seeds = as_matrix(features), seed_list(seeds)
    if algorithm not in ALGORITHMS:
        raise ItaeError(f"algorithm={algorithm!r} is not known: use {', '.join(ALGORITHMS)}")
    _check_counts(k, n_init, len(features))
    _check_memory(features.shape, max_memory)
    held = all_rows(features, normalize)
    if algorithm != "exact":
        runs = [REFERENCES[algorithm](k, n_init, seed).fit(held) for seed in seeds]
        labels, inertias = np.stack([run.labels_ for run in runs]), np.array([run.inertia_ for run in runs])
    else:
        mean = held.mean(axis=0, dtype=np.float64)
        labels, inertias = _best_starts(held, mean, len(held), list, k, seeds, n_init, device)
    _warn_of_fewer(labels, k, held)
    return labels, inertias


def cluster_parts(
    parts: Parts,
    k: int,
    *,
    seed: int = 0,
    n_init: int = 10,
    normalize: bool = True,
    device: str = "auto",
    max_memory: int | None = None,
) -> tuple[np.ndarray, float]:
    """Run `cluster` on features that are read part by part, as in `cluster_parts(lambda: features.parts("itae"), k)`.

    Features that fit in `max_memory` are read once more and clustered as by `cluster`. Larger ones are read once per
    round of Lloyd's algorithm; then the first centres are chosen from a uniform sample of the rows, as many as fit.

    Args:
        parts: called for every pass; gives the features in the same order each time, (m, dim) per part, of any float
            type. m may differ between parts.
        k: number of clusters.
        seed: of the starts.
        n_init: number of starts; they share the passes.
        normalize: whether rows are scaled to length 1 first; rows of zeros stay.
        device: as for `cluster`.
        max_memory: bytes that float32 features may take; by default half of the machine's memory.

    Returns:
        Labels (n,) in 0 … k - 1, in the order of the parts, and the inertia.

    Raises:
        ItaeError: parts that are not finite matrices of one width, or that don't start over when called again; a value
            that `cluster` refuses; too little memory for a sample of 10 rows per cluster.
    """
    if not callable(parts):
        raise ItaeError(f"parts of type {type(parts).__name__} can be read only once: give a function that starts them "
                        "over, as in cluster_parts(lambda: features.parts(name), k)")
    _check_counts(k, n_init)
    [seed] = seed_list([seed])
    sample, count, mean = sample_rows(read_rows(parts(), normalize), _bound(max_memory))
    _check_counts(k, n_init, count)
    if len(sample) < min(count, FEWEST_SAMPLED * k):
        raise ItaeError(f"max_memory={_bound(max_memory):,} holds only {len(sample):,} rows, too few to choose k={k} "
                        f"centres: allow {4 * FEWEST_SAMPLED * k * sample.shape[1]:,} bytes or more")
    labels, inertias = _best_starts(sample, mean, count, lambda: read_rows(parts(), normalize, count), k, [seed],
                                    n_init, device)
    if len(sample) == count:
        _warn_of_fewer(labels, k, sample)
    return labels[0], float(inertias[0])


def predict(
    fitted: np.ndarray, labels: np.ndarray, features: np.ndarray, *, normalize: bool = True
) -> np.ndarray:
    """Give each row of `features` to the cluster of other features whose mean is nearest: labels (seeds, n).

    Args:
        fitted: features (m, dim) that were clustered, such as those of a training split.
        labels: (seeds, m), from `cluster_seeds(fitted, …)`.
        features: (n, dim).
        normalize: whether rows of both are scaled to length 1 first, as for the labels.

    Raises:
        ItaeError: features that are not finite matrices of one width, or labels of other images.
    """
    fitted, features, labels = as_matrix(fitted), as_matrix(features), np.atleast_2d(labels)
    if fitted.shape != (labels.shape[1], features.shape[1]):
        raise ItaeError(f"labels {labels.shape} of features {fitted.shape} can't be given to features "
                        f"{features.shape}: use one label per image, and features of one width")
    fitted, features, found = all_rows(fitted, normalize), all_rows(features, normalize), []
    for run in labels:
        clusters = np.unique(run)
        means = np.stack([fitted[run == cluster].mean(axis=0, dtype=np.float64) for cluster in clusters])
        found.append(clusters[pairwise_distances_argmin(features, means)])
    return np.stack(found)


def seed_list(seeds: int | Sequence[int]) -> list[int]:
    """Return the seeds as a list; a number means that many, from 0.

    Raises:
        ItaeError: there is no seed, or one that is not a whole number from 0.
    """
    if isinstance(seeds, str) or not isinstance(seeds, (Sequence, np.ndarray)):
        seeds = range(whole_number("seeds", seeds, 1))
    if not len(seeds):
        raise ItaeError(f"seeds={seeds!r} gives no seed: use a number of 1 or more, or a list")
    return [whole_number("seeds", seed, 0) for seed in seeds]


def _best_starts(
    sample: np.ndarray, mean: np.ndarray, n: int, parts: Parts, k: int, seeds: Sequence[int], n_init: int, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels (seeds, n) and inertias (seeds,) of the best of `n_init` starts for each seed.

    Args:
        sample: rows that first centres are chosen from; changed.
        mean: of all rows. K-means does not depend on it, but rounding errors are smallest about it.
        n: number of all rows. If `sample` has as many, it holds them all.
        parts: gives copies of all rows; used only if `sample` does not hold them all.
        k: number of clusters.
        seeds: of the starts.
        n_init: starts per seed.
        device: as for `cluster`.
    """
    device = resolve_device(device)
    largest = max(sample.max(), -sample.min(), np.finfo(np.float32).tiny)
    scale = 2.0 ** -math.frexp(largest)[1]  # a power of 2 changes no digits; squares neither overflow nor vanish
    mean = torch.from_numpy(mean.astype(np.float32))

    def ready(rows: np.ndarray) -> Tensor:  # in place: the rows are copies
        return torch.from_numpy(rows).sub_(mean).mul_(scale).to(device)

    labels, inertias = np.empty((len(seeds), n), dtype=np.int32), np.full(len(seeds), np.inf)
    starts = [(place, start) for place in range(len(seeds)) for start in range(n_init)]
    hidden = hides_progress() or None  # None: shown on a terminal only
    try:
        with (full_precision(), one_thread(len(sample) * k * len(starts) < SMALL),
              tqdm(total=len(starts), unit="start", desc="k-means", delay=2, disable=hidden, leave=False) as progress):
            points = ready(sample)
            are_all = len(points) == n
            trials = 2 + int(math.log(k))  # scikit-learn's number
            at_once = starts_at_once(*points.shape, k, trials)
            worth = are_worth_it(len(points), len(starts), k, trials)
            products = inner_products(points) if worth else None
            for first in range(0, len(starts), max(1, at_once)):
                group = starts[first : first + max(1, at_once)]
                draws = np.stack([np.random.default_rng([seeds[place], start]).random((k, trials))
                                  for place, start in group])
                centres = points[plus_plus(points, torch.from_numpy(draws).to(device), products)]
                passes = (lambda: [points]) if are_all else lambda: map(ready, parts())
                if are_all and at_once:
                    found = lloyd(points, centres, products, progress.update)
                else:
                    found = lloyd_in_parts(passes, n, centres, progress.update)
                sums = inertias_of(passes, found, k).cpu().numpy() / scale**2
                for (place, _), run, inertia in zip(group, found.cpu().numpy(), sums, strict=True):
                    if inertia < inertias[place] * (1 - EQUAL):
                        labels[place], inertias[place] = run, inertia
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        needed = (4 * sample.size + WORK_BYTES) / 1e9
        raise ItaeError(f"k-means of {n:,} × {sample.shape[1]:,} features with k={k} does not fit in the memory of "
                        f"{device}, it takes up to {needed:.1f} GB: use device='cpu', or cluster_parts with a smaller "
                        "max_memory") from error
    return labels, np.maximum(inertias, 0)


def starts_at_once(n: int, dim: int, k: int, trials: int) -> int:
    """Return how many starts `plus_plus` and `lloyd` can hold at once; 0 if a single one takes too much memory."""
    return int(WORK_BYTES // 4 // (4 * n * max(k, 3 * trials) + 16 * k * dim))


def are_worth_it(n: int, starts: int, k: int, trials: int) -> bool:
    """Return whether `inner_products` of n points fit in memory, and save more products than they cost."""
    return 4 * n * n <= WORK_BYTES // 2 and n < 2 * starts * k * (trials + USUAL_ROUNDS)


def _bound(max_memory: int | None) -> float:
    """Return `max_memory`, or half of the machine's memory, in bytes."""
    memory = 2 * max_memory if max_memory is not None else available_memory()
    return math.inf if memory is None else memory // 2


def _check_memory(shape: tuple[int, ...], max_memory: int | None) -> None:
    needed, bound = 4 * shape[0] * shape[1], _bound(max_memory)
    if needed > bound:
        whose = "half of this machine's memory" if max_memory is None else "max_memory"
        raise ItaeError(f"k-means on features {shape[0]:,} × {shape[1]:,} takes {needed:,} bytes, more than {whose}, "
                        f"{bound:,}: use cluster_parts(lambda: features.parts(name), k), or raise max_memory")


def _check_counts(k: int, n_init: int, images: int | None = None) -> None:
    whole_number("k", k, 2)
    whole_number("n_init", n_init, 1)
    if images is not None and k > images:
        raise ItaeError(f"k={k} is more than the number of images, {images:,}: use fewer clusters, or more images")


def _warn_of_fewer(labels: np.ndarray, k: int, rows: np.ndarray) -> None:
    """Warn if a run found fewer than k clusters: there are fewer distinct rows."""
    fewest = min(len(np.unique(run)) for run in labels)
    if fewest < k:
        warnings.warn(f"k={k} is more than the {len(np.unique(rows, axis=0)):,} distinct rows of features: only "
                      f"{fewest:,} clusters were found", stacklevel=3)

