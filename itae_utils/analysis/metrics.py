"""Clustering scores: ACC, NMI and ARI of k-means over seeds, and the bootstrap interval of a difference between two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from itae_utils.analysis.kmeans import cluster_seeds, seed_list
from itae_utils.analysis.rows import as_matrix
from itae_utils.errors import ItaeError

METRICS = ("acc", "nmi", "ari")
TINY = 1e-12  # entropies below this are rounding errors of 0


def evaluate_clustering(
    features: np.ndarray, targets: np.ndarray, *, k: int | None = None, seeds: int | Sequence[int] = 10,
    n_init: int = 10, normalize: bool = True, algorithm: str = "exact", device: str = "auto",
    max_memory: int | None = None,
) -> pd.DataFrame:
    """Run k-means on features (n, dim) and score it against the classes `targets` (n,).

    k is by default the number of classes. Each of `seeds` is one run of k-means; a number means that many, from 0. The
    other arguments are as for `cluster`.

    Returns:
        One row per seed; columns seed, acc, nmi, ari, inertia.

    Raises:
        ItaeError: a value that `cluster` refuses; no targets, or not one for each row of features.
    """
    if targets is None:
        raise ItaeError("targets=None: ACC, NMI and ARI need labels; without labels use agreement() between seeds")
    features = as_matrix(features)
    if len(targets) != len(features):
        raise ItaeError(f"{len(targets):,} targets for {len(features):,} rows of features: give one target per row")
    k = len(np.unique(targets)) if k is None else k
    seeds = seed_list(seeds)
    labels, inertias = cluster_seeds(features, k, seeds=seeds, n_init=n_init, normalize=normalize, algorithm=algorithm,
                                     device=device, max_memory=max_memory)
    scores = score_runs(targets, labels)
    scores.insert(0, "seed", seeds)
    return scores.assign(inertia=inertias)


def summarize(scores: pd.DataFrame) -> pd.DataFrame:
    """Return mean, sd (n - 1; NaN for one seed), min and max over the seeds, one row for each metric in `scores`."""
    return scores.drop(columns="seed").agg(["mean", "std", "min", "max"]).T.rename(columns={"std": "sd"})


def agreement(labels: np.ndarray) -> float:
    """Return the mean ARI over all pairs of runs (seeds, n) of `cluster_seeds`, a measure of stability without labels.

    Raises:
        ItaeError: fewer than 2 runs.
    """
    if len(labels) < 2:
        raise ItaeError(f"agreement needs at least 2 runs of k-means, not {len(labels)}: use 2 seeds or more")
    return float(np.mean([adjusted_rand_score(a, b) for a, b in combinations(labels, 2)]))


def score_runs(targets: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Return ACC, NMI (arithmetic mean of the entropies) and ARI of cluster labels (seeds, n) against classes (n,).

    The table has one row per run, in order, and the columns acc, nmi and ari.
    """
    if np.ndim(labels) != 2 or np.shape(labels)[1] != len(targets):
        raise ItaeError(f"labels of shape {np.shape(labels)} don't match {len(targets):,} targets: give (seeds, n)")
    return pd.DataFrame(_Tables(targets, labels).scores(np.ones(len(targets), dtype=int)), columns=METRICS)


def accuracy(targets: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of images in the cluster that their class is matched to, under the best one-to-one match."""
    _, _, table = _contingency(targets, labels)
    return float(table[_match(table)].sum() / table.sum())


def match_clusters(targets: np.ndarray, labels: np.ndarray) -> dict:
    """Return the one-to-one match of clusters to classes with the highest accuracy, as {cluster: class}.

    With more clusters than classes some clusters have no match; with fewer, some classes have none.
    """
    classes, clusters, table = _contingency(targets, labels)
    rows, columns = _match(table)
    return dict(zip(clusters[columns].tolist(), classes[rows].tolist(), strict=True))


def confusion(targets: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Return the number of images by class (rows) and cluster (columns), with the matched pairs on the diagonal.

    Rows and columns are in the order of the classes; unmatched classes and clusters come last.
    """
    classes, clusters, table = _contingency(targets, labels)
    rows, columns = (np.append(matched, np.setdiff1d(np.arange(size), matched))
                     for matched, size in zip(_match(table), table.shape, strict=True))
    return pd.DataFrame(table[np.ix_(rows, columns)], index=pd.Index(classes[rows], name="class"),
                        columns=pd.Index(clusters[columns], name="cluster"))


def paired_bootstrap(
    targets: np.ndarray, labels_a: np.ndarray, labels_b: np.ndarray, *, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return the lead of variant b over variant a, with a 95 % bootstrap interval over the images.

    Each draw resamples the images with replacement, the same ones for both variants and all seeds. Their cluster labels
    stay fixed, and clusters are matched to classes again. The interval does not include the spread between seeds.

    Args:
        targets: classes (n,).
        labels_a: cluster labels (seeds, n) or (n,) from `cluster_seeds`; scores are averaged over the seeds.
        labels_b: the same for b; the number of seeds and clusters may differ.
        draws: number of resamples.
        seed: of the resamples.

    Returns:
        Rows acc, nmi, ari; columns difference (b - a), low, high.

    Raises:
        ItaeError: labels and targets of different length, or draws below 1.
    """
    sides = [np.atleast_2d(labels_a), np.atleast_2d(labels_b)]
    for labels in sides:
        if labels.shape[-1] != len(targets):
            raise ItaeError(f"labels of shape {labels.shape} don't match {len(targets):,} targets: give (seeds, n)")
    tables = _Tables(targets, [run for labels in sides for run in labels])

    def difference(images: np.ndarray) -> np.ndarray:
        scores = tables.scores(np.bincount(images, minlength=len(targets)))
        return scores[len(sides[0]) :].mean(axis=0) - scores[: len(sides[0])].mean(axis=0)

    return bootstrap(difference, len(targets), METRICS, draws=draws, seed=seed)


def bootstrap(difference: Callable[[np.ndarray], np.ndarray], total: int, metrics: Iterable[str], *, draws: int = 1000,
              seed: int = 0) -> pd.DataFrame:
    """Return a table as `paired_bootstrap` does, given a function from image numbers (total,) to one value a metric."""
    if draws < 1:
        raise ItaeError(f"draws={draws} is too few: use 1,000 or so")
    rng = np.random.default_rng(seed)
    resampled = np.stack([difference(rng.integers(total, size=total)) for _ in range(draws)])
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    return pd.DataFrame({"difference": difference(np.arange(total)), "low": low, "high": high},
                        index=pd.Index(metrics, name="metric"))


def unpaired_bootstrap(
    before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray], *, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return the lead of one run over another on other images, as `paired_bootstrap` does.

    Both are (targets, labels). Each draw resamples the images of each by themselves.
    """
    sides = [(_Tables(targets, np.atleast_2d(labels)), len(targets)) for targets, labels in (before, after)]
    rng = np.random.default_rng(seed)

    def difference(resample: bool) -> np.ndarray:
        old, new = (tables.scores(np.bincount(rng.integers(n, size=n) if resample else np.arange(n), minlength=n))
                    for tables, n in sides)
        return new.mean(axis=0) - old.mean(axis=0)

    low, high = np.quantile([difference(True) for _ in range(draws)], (0.025, 0.975), axis=0)
    return pd.DataFrame({"difference": difference(False), "low": low, "high": high},
                        index=pd.Index(METRICS, name="metric"))


def describe_difference(row: Mapping[str, float] | pd.Series) -> str:
    """Return a row of `paired_bootstrap` as text such as "+0.054 [+0.031, +0.078]", and say if 0 is in the interval."""
    words = f"{row['difference']:+z.3f} [{row['low']:+z.3f}, {row['high']:+z.3f}]"
    return f"{words}: no clear difference (the interval contains 0)" if row["low"] <= 0 <= row["high"] else words


class _Tables:
    """The contingency tables of several runs of k-means, for fast scores of resampled images.

    scikit-learn computes the same scores a hundred times slower: for one table per call, with its empty cells.

    Args:
        targets: classes (n,).
        runs: cluster labels (n,) of each run.
    """

    def __init__(self, targets: np.ndarray, runs: Sequence[np.ndarray]) -> None:
        self.runs = len(runs)
        self.classes = np.unique(targets, return_inverse=True)[1]
        clusters = np.stack([np.unique(labels, return_inverse=True)[1] for labels in runs])
        shape = self.runs, 1 + self.classes.max(), 1 + clusters.max()
        places = np.ravel_multi_index((np.arange(self.runs)[:, None], self.classes, clusters), shape)
        self.images = places.argsort(axis=1, kind="stable").ravel()  # sorted by cell
        self.cells, self.first_images = np.unique(np.sort(places, axis=1), return_index=True)
        run, _, cluster = np.unravel_index(self.cells, shape)
        self.first_cells = np.searchsorted(run, np.arange(self.runs))
        self.columns = run * shape[2] + cluster
        counts = np.arange(len(targets) + 1)
        self.logs, self.pairs = counts * np.log(np.maximum(counts, 1)), counts * (counts - 1) / 2
        self.costs = np.zeros(shape)

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """Return ACC, NMI and ARI of all runs (runs, 3), if each image counts as often as `weights` (n,) says."""
        total = weights.sum()
        cells = np.add.reduceat(weights[self.images], self.first_images)
        rows = np.bincount(self.classes, weights).astype(int)
        columns = np.bincount(self.columns, cells, self.runs * self.costs.shape[2]).astype(int).reshape(self.runs, -1)

        def sums(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            """Return the sums of `values` of all counts in tables, rows and columns of each run."""
            return np.add.reduceat(values[cells], self.first_cells), values[rows].sum(), values[columns].sum(axis=1)

        # NMI and ARI are 0 / 0, and 1 by convention, if both partitions are trivial in the same way
        joint, of_rows, of_columns = (np.maximum(np.log(total) - each / total, 0) for each in sums(self.logs))
        mean = (of_rows + of_columns) / 2
        nmi = np.divide(np.maximum(2 * mean - joint, 0), mean, out=np.ones(self.runs), where=mean > TINY)
        joint, of_rows, of_columns = sums(self.pairs)
        expected = of_rows * of_columns / max(total * (total - 1) / 2, 1)
        reach = (of_rows + of_columns) / 2 - expected
        ari = np.divide(joint - expected, reach, out=np.ones(self.runs), where=reach != 0)
        return np.stack([self._matched(cells) / total, nmi, ari], axis=1)

    def _matched(self, cells: np.ndarray) -> np.ndarray:
        """Return how many images the best match has in each run, given the counts of all cells with images."""
        self.costs.flat[self.cells] = -cells  # the other cells stay empty
        return np.array([-cost[linear_sum_assignment(cost)].sum() for cost in self.costs])


def _contingency(targets: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct classes, the distinct clusters, and the number of images in both (classes, clusters)."""
    if np.shape(targets) != np.shape(labels) or np.ndim(targets) != 1 or not len(targets):
        raise ItaeError(f"targets {np.shape(targets)} and labels {np.shape(labels)} do not match: both must be (n,)")
    classes, rows = np.unique(targets, return_inverse=True)
    clusters, columns = np.unique(labels, return_inverse=True)
    shape = (len(classes), len(clusters))
    return classes, clusters, np.bincount(rows * shape[1] + columns, minlength=np.prod(shape)).reshape(shape)


def _match(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows, in ascending order, and columns of the matched pairs of a contingency table."""
    return linear_sum_assignment(table, maximize=True)
