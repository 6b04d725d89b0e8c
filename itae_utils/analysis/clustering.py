"""The number of clusters, and notes, sentences and headline facts of the notebooks that cluster images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from itae_utils.analysis.bench import RECOVERED
from itae_utils.analysis.scoring import AGREEMENT, over_seeds
from itae_utils.analysis.vectors import all_equal
from itae_utils.analysis.words import describe_runs, percent
from itae_utils.errors import ItaeError

FEWEST = 4  # images that can be clustered or mapped
UNCHANGED = "Nothing was attenuated, so ITAE equals the baseline"


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
    if n < FEWEST:
        raise ItaeError(f"{n} images are too few to cluster: use {FEWEST} or more")
    return min(10, n // 2) if targets is None else len(np.unique(targets))


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


def clustering_headline(
    scores: pd.DataFrame, differences: pd.DataFrame | None, changed: bool, bench: pd.DataFrame | None, *, seeds: int,
    n_init: int,
) -> list[dict[str, str]]:
    """Return the clustering's headline facts: the score before and after, and how many expected results were met.

    The first three arguments are as for `describe_gain`; `bench` is from `bench_targets`, or None; `seeds` and `n_init`
    are those of the k-means runs behind the scores.
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
    facts = [{"label": label, "value": value, "note": note}]
    if bench is not None:
        recovered = bench.measured[RECOVERED]
        note = ("planting the artifacts cost no ACC on these images" if np.isnan(recovered)
                else f"ITAE recovers {percent(recovered)} of the ACC that was lost by planting")
        facts.append({"label": "Expected results on the demo", "value": f"{bench.met.sum()} of {len(bench)} met",
                      "note": note})
    return facts


def _before_and_after(scores: pd.DataFrame) -> list[float]:
    means = over_seeds(scores)["acc" if "acc" in scores else AGREEMENT, "mean"]
    return [means[name] for name in ("baseline", "itae")]
