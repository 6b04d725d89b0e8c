"""Scores of several variants side by side: tables, differences to the baseline, and the demo's expected results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pandas as pd
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize as unit_rows
from torch.utils.data import Dataset

from itae_utils.analysis import remembered
from itae_utils.analysis.kmeans import as_matrix
from itae_utils.analysis.metrics import agreement, confusion, describe_difference, paired_bootstrap, score_runs
from itae_utils.analysis.words import describe_runs, percent
from itae_utils.data.items import picture_of
from itae_utils.errors import ItaeError
from itae_utils.method.artifacts import precision_recall
from itae_utils.store.store import Store

LARGEST_SIDE = 32  # pixels; larger images make k-means slower, not better
# Columns that are measured without labels.
CHANGE = "change"  # mean cosine distance of the features to the baseline's
AGREEMENT = "agreement"  # mean ARI between runs of k-means
NEIGHBOURS = 10
ROUNDING = 1e-5  # features that differ by less, relative to the largest, are equal
UNCHANGED = "Nothing was attenuated, so ITAE equals the baseline"


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


def scorable(targets: np.ndarray | None) -> np.ndarray | None:
    """Return the classes (n,) of the images, or None if there are none or all are of one class: nothing to score."""
    return None if targets is None or len(np.unique(targets)) < 2 else np.asarray(targets)


def describe_unscorable(targets: np.ndarray | None, clusters: int | None, k: int) -> str:
    """Return Markdown that says why nothing can be scored, and what is shown instead.

    `targets` are the data set's, `clusters` is the parameter, and k is from `number_of_clusters`.
    """
    why = "have no labels" if targets is None else "are all of one class"
    how = "" if clusters is not None else " (10, or half of the images if that is fewer; `clusters` sets another)"
    return (f"**These images {why}**, so ACC, NMI and ARI can't be measured. This page shows k = {k} clusters{how} as "
            "sheets of images, and how well runs of k-means with different seeds agree.")


def number_of_clusters(clusters: int | None, targets: np.ndarray | None, n: int) -> int:
    """Return k for `n` images: `clusters` if given, else the number of classes, else 10 but at most half of the images.

    `targets` are from `scorable`.

    Raises:
        ItaeError: no k is given and there are fewer than 4 images.
    """
    if clusters is not None:
        return clusters
    if n < 4:
        raise ItaeError(f"{n} images are too few to cluster: use 4 or more")
    return min(10, n // 2) if targets is None else len(np.unique(targets))


def all_equal(features: np.ndarray, *, normalize: bool = True) -> bool:
    """Return whether all rows (n, dim) are equal up to rounding, scaled to length 1 first if `normalize`.

    scikit-learn's t-SNE of equal rows ends in a segmentation fault.
    """
    rows = as_matrix(features)
    rows = unit_rows(rows) if normalize else rows
    return bool(np.ptp(rows, axis=0).max() <= ROUNDING * np.abs(rows).max())


def cluster_notes(
    features: Mapping[str, np.ndarray], k: int, labels: Mapping[str, np.ndarray] | None = None, *,
    normalize: bool = True,
) -> list[dict[str, str]]:
    """Return what a reader must know before the scores, as facts for the headline; an empty list if nothing.

    Equal features can't be clustered, and as many clusters as images are perfect whatever the features. With `labels`
    (seeds, n) by variant, k-means may also have found fewer clusters than asked.
    """
    n, facts = len(next(iter(features.values()))), []
    if k >= n:
        facts.append({"label": "Clusters", "value": f"{k:,} for {n:,} images", "note": (
            "there are as many clusters as images, so each image is a cluster of its own, and ACC, NMI and ARI say "
            "nothing about the features")})
    equal = [name for name, rows in features.items() if all_equal(rows, normalize=normalize)]
    if equal:
        facts.append({"label": "Features", "value": "all equal", "note": (
            f"all images have the same features ({', '.join(equal)}), so k-means can't divide them and their scores "
            "mean nothing")})
    found = {name: max(len(np.unique(run)) for run in runs) for name, runs in (labels or {}).items()
             if name not in equal}
    fewer = [f"{count} for {name}" for name, count in found.items() if count < k]
    if fewer:
        facts.append({"label": "Clusters", "value": f"fewer than {k:,}", "note": (
            f"k-means found fewer clusters than asked, because too few features differ: {', '.join(fewer)}")})
    return facts


def describe_notes(facts: Sequence[Mapping[str, str]]) -> str:
    """Return `cluster_notes` as Markdown."""
    return "\n\n".join(f"**{fact['label']}: {fact['value']}** ({fact['note']})." for fact in facts)


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
        return pd.DataFrame([{"variant": name, "seed": 0, CHANGE: cosine_distance(rows, features["baseline"])}
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


def cosine_distance(rows: np.ndarray, others: np.ndarray) -> float:
    """Return the mean of 1 − cos over corresponding rows of two (n, dim) arrays."""
    rows, others = as_matrix(rows), as_matrix(others)
    if rows.shape != others.shape:
        raise ItaeError(f"features of shapes {rows.shape} and {others.shape} can't be compared: give the same images")
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    cosines = (rows * others).sum(axis=1) / np.maximum(lengths, np.finfo(np.float32).tiny)
    return max(0.0, float(np.mean(1 - cosines)))  # rounding can bring a cosine above 1


def over_seeds(scores: pd.DataFrame) -> pd.DataFrame:
    """Return mean and sd (NaN for one seed) over the seeds, a row per variant and columns (metric, "mean" | "sd").

    They are exact before the last rounding. NumPy's and pandas' sums depend on the order, so that 0.3475 would be 0.347
    in one place and 0.348 in another.
    """
    def sd(values: pd.Series) -> float:
        return stdev(values) if len(values) > 1 else np.nan

    metrics = [name for name in scores if name not in ("variant", "seed")]
    return scores.groupby("variant", sort=False)[metrics].agg([mean, sd])


def score_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Return mean ± sd over seeds as text: one row per variant, in the order of `scores`, and one column per metric."""
    spread = over_seeds(scores)
    texts = spread.xs("mean", axis=1, level=1).map("{:.3f}".format)
    if spread.notna().all(axis=None):
        texts += " ± " + spread.xs("sd", axis=1, level=1).map("{:.3f}".format)
    return texts.rename(columns=str.upper)


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


def neighbour_agreement(points: np.ndarray, targets: np.ndarray, neighbours: int = NEIGHBOURS) -> float:
    """Return the share of nearest neighbours with the same class as the point, averaged over all points (n, d)."""
    points, targets = as_matrix(points), np.asarray(targets)
    neighbours = min(neighbours, len(points) - 1)
    nearest = NearestNeighbors(n_neighbors=neighbours).fit(points).kneighbors(return_distance=False)
    return float((targets[nearest] == targets[:, None]).mean())


def _check_variants(given: object, name: str, needed: Sequence[str] = ()) -> None:
    if not isinstance(given, Mapping) or not given:
        raise ItaeError(f"{name} of type {type(given).__name__} can't be compared: give them by the variant's name, as "
                        "{'baseline': …, 'itae': …}")
    for variant in needed:
        if variant not in given:
            raise ItaeError(f"{name} of {', '.join(map(str, given))} lack {variant!r}: add it")


RECOVERED = "ITAE recovers at least 80 % of the ACC lost by planting"
BENCH_TARGETS: dict[str, Callable[[float], str]] = {  # with the format of the measured value
    "demo-clean beats raw pixels by at least 0.08 ACC": "{:+.3f}".format,
    "planting the artifacts costs at least 0.08 ACC": "{:+.3f}".format,
    "the precision of the detection is at least 0.99": "{:.4f}".format,
    "the recall of the detection is at least 0.99": "{:.4f}".format,
    RECOVERED: percent,
    "the random control recovers less than 20 % of it": percent,
}


def bench_targets(acc: Mapping[str, float], found: np.ndarray, truth: np.ndarray) -> pd.DataFrame:
    """Compare measured with expected results for the backbone `demo` on digits; `bench_table` formats the table.

    `acc` is the mean ACC of "raw pixels", "baseline" (demo), "demo-clean", "itae" and "random control"; `found` and
    `truth` are the detected and the planted artifacts (bool, of one shape). The columns are measured (NaN if that is
    impossible) and met.
    """
    precision, recall = precision_recall(found, truth)
    lead, cost = acc["demo-clean"] - acc["raw pixels"], acc["demo-clean"] - acc["baseline"]
    itae, control = ((acc[name] - acc["baseline"]) / cost if cost > 0 else np.nan
                     for name in ("itae", "random control"))
    measured = [lead, cost, precision, recall, itae, control]
    met = [lead >= 0.08, cost >= 0.08, precision >= 0.99, recall >= 0.99, itae >= 0.8, control < 0.2]
    return pd.DataFrame({"measured": measured, "met": met}, index=pd.Index(list(BENCH_TARGETS), name="expected result"))


def bench_table(bench: pd.DataFrame) -> pd.DataFrame:
    """Return `bench_targets` as text, in columns measured and verdict."""
    measured = ["–" if np.isnan(value) else BENCH_TARGETS[target](value) for target, value in bench.measured.items()]
    return pd.DataFrame({"measured": measured, "verdict": np.where(bench.met, "met", "not met")}, index=bench.index)


def describe_counts(counts: np.ndarray, patches: int) -> str:
    """Return how many patches a variant attenuates, from counts (n,): "4.4 of 49 patches per image (8.9 %)"."""
    mean = counts.mean()
    number = f"{mean:.2g}" if 0 < mean < 0.1 else f"{mean:.1f}"
    return f"{number} of {patches:,} patches per image ({percent(mean / patches)})"


def describe_gain(scores: pd.DataFrame, differences: pd.DataFrame | None, changed: bool) -> str:
    """Return one sentence that compares ITAE with the baseline.

    `scores` are from `score_labels` and `differences` from `difference_table`; without labels `scores` are from
    `agreement_scores` and `differences` is None. `changed` is whether anything was attenuated.
    """
    if not changed:
        return UNCHANGED
    before, after = _before_and_after(scores)
    if differences is None:
        return f"Runs of k-means agree by a mean ARI of {before:.3f} for the baseline and of {after:.3f} with ITAE"
    return f"ACC {before:.3f} before, {after:.3f} with ITAE: {differences.words['itae', 'acc']}"


def _before_and_after(scores: pd.DataFrame) -> list[float]:
    means = over_seeds(scores)["acc" if "acc" in scores else AGREEMENT, "mean"]
    return [means[name] for name in ("baseline", "itae")]


def clustering_headline(
    scores: pd.DataFrame, differences: pd.DataFrame | None, changed: bool, bench: pd.DataFrame | None, *, seeds: int,
    n_init: int, notes: Sequence[Mapping[str, str]] = (),
) -> list[Mapping[str, str]]:
    """Return the clustering's headline facts: the score before and after, and how many expected results were met.

    Args:
        scores: as for `describe_gain`.
        differences: the same.
        changed: the same.
        bench: from `bench_targets`, or None.
        seeds: number of k-means runs behind the scores.
        n_init: starts of each.
        notes: from `cluster_notes`; they come first.
    """
    before, after = _before_and_after(scores)
    if differences is None:
        label, what = "Agreement of clusterings", "mean ARI between runs of k-means"
    else:
        label = "ACC of the clustering"
        what = f"{describe_runs(seeds, n_init)}; difference {differences.words['itae', 'acc']}"
    if np.isnan(before):
        value, note = "not measured", "one run of k-means has no other to agree with: use 2 seeds or more"
    else:
        value, note = f"{before:.3f} → {after:.3f}", f"baseline → ITAE, {what}" if changed else UNCHANGED
    facts = [*notes, {"label": label, "value": value, "note": note}]
    if bench is not None:
        recovered = bench.measured[RECOVERED]
        note = ("planting the artifacts cost no ACC on these images" if np.isnan(recovered)
                else f"ITAE recovers {percent(recovered)} of the ACC that was lost by planting")
        facts.append({"label": "Expected results on the demo", "value": f"{bench.met.sum()} of {len(bench)} met",
                      "note": note})
    return facts
