"""How well k-means on features finds the classes: ACC, NMI, ARI over seeds, and whether two variants really differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from itae_utils.analysis.kmeans import cluster_seeds, seed_list
from itae_utils.errors import ItaeError

METRICS = ("acc", "nmi", "ari")


def evaluate_clustering(
    features: np.ndarray,
    targets: np.ndarray,
    *,
    k: int | None = None,
    seeds: int | Sequence[int] = 10,
    n_init: int = 10,
    normalize: bool = True,
    max_memory: int | None = None,
) -> pd.DataFrame:
    """K-means on features (n, dim) against the classes `targets` (n,), one row a seed: seed, acc, nmi, ari, inertia.

    `k` is by default the number of classes in `targets`; the other settings and the memory it takes are `cluster`'s.

    Raises:
        ItaeError: as for `cluster`; no targets, or not one for each row of features.
    """
    if targets is None:
        raise ItaeError("ACC, NMI and ARI need labels and there are none: agreement() between seeds needs no labels")
    if len(targets) != len(features):
        raise ItaeError(f"{len(targets):,} targets don't fit {len(features):,} rows of features: give one for each row")
    k = len(np.unique(targets)) if k is None else k
    labels, inertias = cluster_seeds(
        features, k, seeds=seeds, n_init=n_init, normalize=normalize, max_memory=max_memory
    )
    runs = zip(seed_list(seeds), labels, inertias, strict=True)
    return pd.DataFrame([{"seed": seed, **score(targets, found), "inertia": inertia} for seed, found, inertia in runs])


def summarize(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean, sd (n - 1; NaN for one seed), min and max over the seeds, a row for each metric in `scores`."""
    metrics = scores.drop(columns="seed")
    return metrics.agg(["mean", "std", "min", "max"]).T.rename(columns={"std": "sd"})


def agreement(labels: np.ndarray) -> float:
    """Mean ARI between every two runs (seeds, n) of `cluster_seeds`: how stable they are, where no labels tell more.

    Raises:
        ItaeError: fewer than 2 runs.
    """
    if len(labels) < 2:
        raise ItaeError("agreement is between runs of k-means and there is only one: use 2 seeds or more")
    return float(np.mean([adjusted_rand_score(a, b) for a, b in combinations(labels, 2)]))


def score(targets: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """ACC, NMI (arithmetic mean of the entropies) and ARI of cluster labels (n,) against classes (n,)."""
    return {
        "acc": accuracy(targets, labels),
        "nmi": float(normalized_mutual_info_score(targets, labels)),
        "ari": float(adjusted_rand_score(targets, labels)),
    }


def accuracy(targets: np.ndarray, labels: np.ndarray) -> float:
    """Share of images in the right cluster under the best one-to-one match; clusters left without a class are wrong."""
    _, _, table = _contingency(targets, labels)
    return float(table[_match(table)].sum() / table.sum())


def match_clusters(targets: np.ndarray, labels: np.ndarray) -> dict:
    """The one-to-one match of clusters to classes that puts most images right, as {cluster: class}.

    With more clusters than classes some clusters are left out, with fewer some classes.
    """
    classes, clusters, table = _contingency(targets, labels)
    rows, columns = _match(table)
    return dict(zip(clusters[columns].tolist(), classes[rows].tolist(), strict=True))


def confusion(targets: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Number of images by class (rows) and cluster (columns), with the matched pairs on the diagonal.

    Rows and columns are in the order of the classes; classes and clusters without a match come last.
    """
    classes, clusters, table = _contingency(targets, labels)
    rows, columns = _match(table)
    rows = np.append(rows, np.setdiff1d(np.arange(len(classes)), rows))
    columns = np.append(columns, np.setdiff1d(np.arange(len(clusters)), columns))
    return pd.DataFrame(
        table[np.ix_(rows, columns)],
        index=pd.Index(classes[rows], name="class"),
        columns=pd.Index(clusters[columns], name="cluster"),
    )


def paired_bootstrap(
    targets: np.ndarray, labels_a: np.ndarray, labels_b: np.ndarray, *, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """How far variant b is ahead of variant a, with the 95 % interval that comes from the choice of images.

    The images are drawn anew with replacement, the same ones for both sides and all seeds; their cluster labels stay,
    the match of clusters to classes is found again in each draw. The spread between seeds is not in the interval.

    Args:
        targets: classes (n,).
        labels_a: cluster labels (seeds, n) or (n,), as `cluster_seeds` gives them; scores are averaged over the seeds.
        labels_b: the same for b; the number of seeds and clusters may differ.
        draws: number of resamples.
        seed: of the resamples.

    Returns:
        Rows acc, nmi, ari; columns difference (b - a), low, high.

    Raises:
        ItaeError: labels that aren't as long as the targets, draws below 1.
    """
    if draws < 1:
        raise ItaeError(f"draws={draws} is too few resamples: use 1,000 or so")
    classes, class_codes = np.unique(targets, return_inverse=True)
    sides = [np.atleast_2d(labels_a), np.atleast_2d(labels_b)]
    for labels in sides:
        if labels.shape[-1] != len(class_codes):
            raise ItaeError(f"labels of shape {labels.shape} don't fit {len(class_codes):,} targets: give (seeds, n)")
    codes = [np.unique(labels_of_seed, return_inverse=True)[1] for labels in sides for labels_of_seed in labels]
    shape = (len(codes), len(classes), 1 + max(code.max() for code in codes))
    # one number for (run, class, cluster), so that a single bincount makes the tables of all runs
    cells = np.stack([(run * shape[1] + class_codes) * shape[2] + code for run, code in enumerate(codes)])

    def difference(images: np.ndarray) -> np.ndarray:
        tables = np.bincount(cells[:, images].ravel(), minlength=np.prod(shape)).reshape(shape)
        scores = _scores_of_tables(tables)
        return scores[len(sides[0]) :].mean(axis=0) - scores[: len(sides[0])].mean(axis=0)

    rng = np.random.default_rng(seed)
    total = len(class_codes)
    resampled = np.stack([difference(rng.integers(total, size=total)) for _ in range(draws)])
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    found = difference(np.arange(total))
    return pd.DataFrame({"difference": found, "low": low, "high": high}, index=pd.Index(METRICS, name="metric"))


def describe_difference(row: Mapping[str, float] | pd.Series) -> str:
    """A row of `paired_bootstrap` in words: "+0.054 [+0.031, +0.078]", and that it tells nothing where it holds 0."""
    words = f"{row['difference']:+z.3f} [{row['low']:+z.3f}, {row['high']:+z.3f}]"
    return f"{words}: no difference can be told (interval holds 0)" if row["low"] <= 0 <= row["high"] else words


def _scores_of_tables(tables: np.ndarray) -> np.ndarray:
    """ACC, NMI and ARI (T, 3) of contingency tables (T, classes, clusters) of equal totals.

    scikit-learn gives the same numbers, one table a call, a hundred times slower.
    """
    total = tables[0].sum()
    rows, columns = tables.sum(axis=2), tables.sum(axis=1)
    accuracies = np.array([table[_match(table)].sum() for table in tables]) / total

    def entropy(counts: np.ndarray) -> np.ndarray:
        shares = counts.reshape(len(tables), -1) / total
        return -np.sum(shares * np.log(shares, out=np.zeros_like(shares), where=shares > 0), axis=1)

    def pairs(counts: np.ndarray) -> np.ndarray:
        counts = counts.reshape(len(tables), -1).astype(float)
        return np.sum(counts * (counts - 1) / 2, axis=1)

    # both scores are 0 / 0, and 1 by convention, where the two partitions are trivial in the same way
    mean_entropy = (entropy(rows) + entropy(columns)) / 2
    information = np.maximum(entropy(rows) + entropy(columns) - entropy(tables), 0)
    nmi = np.divide(information, mean_entropy, out=np.ones_like(mean_entropy), where=mean_entropy > 0)
    expected = pairs(rows) * pairs(columns) / max(total * (total - 1) / 2, 1)
    reach = (pairs(rows) + pairs(columns)) / 2 - expected
    ari = np.divide(pairs(tables) - expected, reach, out=np.ones_like(reach), where=reach != 0)
    return np.stack([accuracies, nmi, ari], axis=1)


def _contingency(targets: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct classes, the distinct clusters, and the number of images (classes, clusters) in both."""
    if np.shape(targets) != np.shape(labels) or np.ndim(targets) != 1 or not len(targets):
        raise ItaeError(f"targets {np.shape(targets)} and labels {np.shape(labels)} don't fit: both must be (n,)")
    classes, rows = np.unique(targets, return_inverse=True)
    clusters, columns = np.unique(labels, return_inverse=True)
    shape = (len(classes), len(clusters))
    return classes, clusters, np.bincount(rows * shape[1] + columns, minlength=np.prod(shape)).reshape(shape)


def _match(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows, in order, and columns of the matched pairs of a contingency table."""
    return linear_sum_assignment(table, maximize=True)
