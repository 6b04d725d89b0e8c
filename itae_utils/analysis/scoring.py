"""Scores of several variants side by side, as tables: over seeds, as differences to the baseline, and by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pandas as pd

from itae_utils.analysis import remembered
from itae_utils.analysis.metrics import agreement, confusion, describe_difference, paired_bootstrap, score_runs
from itae_utils.analysis.vectors import cosine_distance
from itae_utils.errors import ItaeError
from itae_utils.store.store import Store

# Columns that are measured without labels.
CHANGE = "change"  # mean cosine distance of the features to the baseline's
AGREEMENT = "agreement"  # mean ARI between runs of k-means


def score_variants(
    features: Mapping[str, np.ndarray], targets: np.ndarray | None, *, seeds: Sequence[int], n_init: int = 1,
    normalize: bool = True, algorithm: str = "exact", store: str | Path | Store | None = "auto",
) -> pd.DataFrame:
    """Return the k-means scores of each variant. Without targets, return its mean cosine distance to the baseline.

    The columns are variant, seed, acc, nmi and ari. Without targets they are variant, seed (always 0) and
    change. `features` are (n, dim) by variant, with "baseline" among them if there are no targets. The other
    arguments are as for `remembered.clusters`.
    """
    _check_variants(features, "features", needed=() if targets is not None else ("baseline",))
    if targets is None:
        baseline = features["baseline"]  # read once
        return pd.DataFrame([{"variant": name, "seed": 0, CHANGE: cosine_distance(rows, baseline)}
                             for name, rows in features.items()])
    k = len(np.unique(targets))
    found = remembered.clusters_of_all(features, k, seeds=seeds, n_init=n_init, normalize=normalize,
                                       algorithm=algorithm, store=store)
    return score_labels(targets, {name: labels for name, (labels, _) in found.items()}, seeds)


def score_labels(targets: np.ndarray, labels: Mapping[str, np.ndarray], seeds: Sequence[int]) -> pd.DataFrame:
    """Return ACC, NMI and ARI of cluster labels (seeds, n) by variant, in columns variant, seed, acc, nmi, ari."""
    _check_variants(labels, "labels")
    tables = {name: score_runs(targets, runs).set_index(pd.Index(seeds, name="seed")) for name, runs in labels.items()}
    return pd.concat(tables, names=["variant"]).reset_index()


def agreement_scores(labels: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Return the mean ARI over all pairs of runs, from cluster labels (seeds, n), in columns variant, agreement.

    The agreement of a single run is NaN.
    """
    _check_variants(labels, "labels")
    return pd.DataFrame([{"variant": name, AGREEMENT: agreement(runs) if len(runs) > 1 else np.nan}
                         for name, runs in labels.items()])


def over_seeds(scores: pd.DataFrame) -> pd.DataFrame:
    """Return mean and sd (NaN for one seed) over the seeds, a row per variant and columns (metric, "mean" | "sd").

    They are exact before the last rounding. NumPy's and pandas' sums depend on the order, so that 0.3475 would be 0.347
    in one place and 0.348 in another.
    """
    def sd(values: pd.Series) -> float:
        return stdev(values) if len(values) > 1 else np.nan

    metrics = [name for name in scores if name not in ("variant", "seed")]
    return scores.groupby("variant", sort=False)[metrics].agg([mean, sd])


def score_table(scores: pd.DataFrame, *, mark: bool = False) -> pd.DataFrame:
    """Return mean ± sd over seeds as text: one row per variant, in the order of `scores`, and one column per metric.

    With `mark`, ★ follows the highest mean of each column, if no other equals it.
    """
    spread = over_seeds(scores)
    means, sds = (spread.map("{:.3f}".format).xs(part, axis=1, level=1) for part in ("mean", "sd"))
    text = means + " ± " + sds if spread.notna().all(axis=None) else means
    highest = spread.xs("mean", axis=1, level=1).eq(spread.xs("mean", axis=1, level=1).max())
    return (text + np.where(mark & highest & (highest.sum() == 1), " ★", "")).rename(columns=str.upper)


def difference_table(
    targets: np.ndarray, labels: Mapping[str, np.ndarray], *, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return each variant's lead over "baseline" and its 95 % interval, from `paired_bootstrap`.

    The index is (variant, metric); the columns are difference, low, high and words.
    """
    _check_variants(labels, "labels", needed=("baseline",))
    table = pd.concat({name: paired_bootstrap(targets, labels["baseline"], runs, draws=draws, seed=seed)
                       for name, runs in labels.items() if name != "baseline"}, names=["variant"])
    return table.assign(words=[describe_difference(row) for row in table.to_dict("records")])


HARMS = {  # what each step undoes: from the first edit to the second
    "what the values write\nbaseline → substitute": ("baseline", "edit substitute"),
    "stolen attention\nsubstitute → mask": ("edit substitute", "edit mask"),
    "the same, if it is spread evenly\nsubstitute → spread": ("edit substitute", "edit spread"),
    "both\nbaseline → mask": ("baseline", "edit mask"),
}


def harm_table(
    targets: np.ndarray, labels: Mapping[str, np.ndarray], *, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return what each step of `HARMS` gains, as `difference_table` does; the index is (step, metric).

    `labels` (seeds, n) are those of "baseline" and of `ablation.edit_settings`.
    """
    _check_variants(labels, "labels", needed=[name for step in HARMS.values() for name in step])
    return pd.concat({step: paired_bootstrap(targets, labels[one], labels[other], draws=draws, seed=seed)
                      for step, (one, other) in HARMS.items()}, names=["step"])


def class_accuracy(targets: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Return the share of each class that is in its matched cluster (seeds, n); a class without a match has 0.

    The table has one row per seed and one column per class.
    """
    rows = []
    for run in np.atleast_2d(labels):
        table = confusion(targets, run)
        matched = pd.Series(np.diag(table), index=table.index[:min(table.shape)])
        rows.append(matched.reindex(table.index, fill_value=0) / table.sum(axis=1))
    return pd.DataFrame(rows)[np.unique(targets).tolist()]


def _check_variants(given: object, name: str, needed: Sequence[str] = ()) -> None:
    if not isinstance(given, Mapping) or not given:
        raise ItaeError(f"{name} of type {type(given).__name__} can't be compared: give them by the variant's name, as "
                        "{'baseline': …, 'itae': …}")
    for variant in needed:
        if variant not in given:
            raise ItaeError(f"{name} of {', '.join(map(str, given))} lack {variant!r}: add it")
