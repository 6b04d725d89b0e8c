"""Scores of many variants side by side: tables, differences to the baseline, and the test bench's targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from sklearn.neighbors import NearestNeighbors
from torch.utils.data import Dataset

from itae_utils.analysis import remembered
from itae_utils.analysis.metrics import agreement, confusion, describe_difference, paired_bootstrap, score
from itae_utils.analysis.words import percent
from itae_utils.errors import ItaeError
from itae_utils.method.artifacts import precision_recall

LARGEST_SIDE = 32  # more pixels cost k-means time and tell it nothing about what is in a photograph


def pixel_features(dataset: Dataset, size: int) -> np.ndarray:
    """Every image, resized to `size` × `size` pixels (32 at the most), as one row of intensities in [0, 1].

    Returns:
        (n, side · side · 3) float32; only one channel where all images are grey, which k-means can't tell from three.

    Raises:
        ItaeError: a size below 1.
    """
    if size < 1:
        raise ItaeError(f"size={size} is not a number of pixels: use 1 or more")
    side = min(size, LARGEST_SIDE)
    pixels = np.stack([np.asarray(image.resize((side, side)), dtype=np.float32) for image, _ in dataset]) / 255
    is_grey = (pixels == pixels[..., :1]).all()
    return (pixels[..., :1] if is_grey else pixels).reshape(len(pixels), -1)


# What is measured where there are no labels.
CHANGE = "change"  # mean cosine distance of the features to the baseline's
NOT_MEASURED = "–"
NEIGHBOURS = 10  # of a point, that are looked at
AGREEMENT = "agreement"  # mean ARI between runs of k-means


def score_variants(
    features: Mapping[str, np.ndarray], targets: np.ndarray | None, *, seeds: Sequence[int], n_init: int = 1,
    normalize: bool = True,
) -> pd.DataFrame:
    """K-means scores of every variant, or, without targets, how far its features are from the baseline's.

    Args:
        features: (n, dim) by variant; without targets "baseline" must be among them.
        targets: classes (n,), or None.
        seeds: of k-means.
        n_init: k-means starts for a seed.
        normalize: whether rows are brought to length 1 before k-means.

    Returns:
        Columns variant, seed, acc, nmi, ari; or variant, seed (0), change.
    """
    if targets is None:
        return pd.DataFrame([{"variant": name, "seed": 0, CHANGE: cosine_distance(rows, features["baseline"])}
                             for name, rows in features.items()])
    k = len(np.unique(targets))
    labels = {name: remembered.clusters(rows, k, seeds=seeds, n_init=n_init, normalize=normalize)[0]
              for name, rows in features.items()}
    return score_labels(targets, labels, seeds)


def score_labels(targets: np.ndarray, labels: Mapping[str, np.ndarray], seeds: Sequence[int]) -> pd.DataFrame:
    """ACC, NMI and ARI of cluster labels (seeds, n) by variant: columns variant, seed, acc, nmi, ari."""
    return pd.DataFrame([{"variant": name, "seed": seed, **score(targets, found)}
                         for name, runs in labels.items() for seed, found in zip(seeds, runs, strict=True)])


def agreement_scores(labels: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Mean ARI between every two runs, from cluster labels (seeds, n) by variant: columns variant, agreement."""
    return pd.DataFrame([{"variant": name, AGREEMENT: agreement(runs)} for name, runs in labels.items()])


def cosine_distance(rows: np.ndarray, others: np.ndarray) -> float:
    """Mean of 1 − cos over the pairs of rows of two (n, dim) arrays."""
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    cosines = (rows * others).sum(axis=1) / np.maximum(lengths, np.finfo(np.float32).tiny)
    return max(0.0, float(np.mean(1 - cosines)))  # rounding can bring a cosine above 1


def score_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean ± sd over seeds as text, a row a variant in the order of `scores`, a column a metric."""
    metrics = [name for name in scores if name not in ("variant", "seed")]
    groups = scores.groupby("variant", sort=False)[metrics]
    means, spreads = groups.mean(), groups.std()
    texts = means.map("{:.3f}".format)
    if spreads.notna().all(axis=None):
        texts += " ± " + spreads.map("{:.3f}".format)
    return texts.rename(columns=str.upper)


def difference_table(
    targets: np.ndarray, labels: Mapping[str, np.ndarray], *, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """How far each variant is ahead of "baseline", with the 95 % interval of `paired_bootstrap`.

    Returns:
        Index (variant, metric); columns difference, low, high, words.
    """
    table = pd.concat({name: paired_bootstrap(targets, labels["baseline"], runs, draws=draws, seed=seed)
                       for name, runs in labels.items() if name != "baseline"}, names=["variant"])
    return table.assign(words=[describe_difference(row) for row in table.to_dict("records")])


def class_accuracy(targets: np.ndarray, labels: np.ndarray) -> pd.DataFrame:
    """Share of each class that is in its matched cluster, one row a seed, one column a class; 0 where none is matched.

    Args:
        targets: classes (n,).
        labels: clusters (seeds, n).
    """
    rows = []
    for run in labels:
        table = confusion(targets, run)
        matched = pd.Series(0.0, index=table.index)
        pairs = min(table.shape)
        matched.iloc[:pairs] = np.diag(table)
        rows.append(matched / table.sum(axis=1))
    return pd.DataFrame(rows, index=range(len(labels)))[np.unique(targets).tolist()]


def neighbour_agreement(points: np.ndarray, targets: np.ndarray, neighbours: int = NEIGHBOURS) -> float:
    """Share of the nearest neighbours of each point (n, d) that have its class."""
    neighbours = min(neighbours, len(points) - 1)
    nearest = NearestNeighbors(n_neighbors=neighbours).fit(points).kneighbors(return_distance=False)
    return float((targets[nearest] == targets[:, None]).mean())


def bench_targets(acc: Mapping[str, float], found: np.ndarray, truth: np.ndarray) -> pd.DataFrame:
    """What the test bench must show, what was measured, and whether that meets it.

    Args:
        acc: mean ACC of "raw pixels", "baseline" (demo), "demo-clean", "itae" and "random control".
        found: detected artifacts, bool of any shape.
        truth: the planted ones, likewise.
    """
    def told(value: float, form: str) -> str:
        return NOT_MEASURED if np.isnan(value) else form.format(value)

    precision, recall = precision_recall(found, truth)
    cost = acc["demo-clean"] - acc["baseline"]
    won = {name: (acc[name] - acc["baseline"]) / cost if cost > 0 else np.nan for name in ("itae", "random control")}
    lead = acc["demo-clean"] - acc["raw pixels"]
    lines = [
        ("demo-clean beats raw pixels by at least 0.08 ACC", f"{lead:+.3f}", lead >= 0.08),
        ("planting the artifacts costs at least 0.08 ACC", f"{cost:+.3f}", cost >= 0.08),
        ("precision of the detection is at least 0.99", told(precision, "{:.4f}"), precision >= 0.99),
        ("recall of the detection is at least 0.99", told(recall, "{:.4f}"), recall >= 0.99),
        ("ITAE wins back at least 80 % of that cost", told(100 * won["itae"], "{:.0f} %"), won["itae"] >= 0.8),
        ("the random control wins back less than 20 %", told(100 * won["random control"], "{:.0f} %"),
         won["random control"] < 0.2),
    ]
    return pd.DataFrame([(target, measured, "met" if met else "not met") for target, measured, met in lines],
                        columns=["target", "measured", "verdict"]).set_index("target")


def describe_counts(counts: np.ndarray, patches: int) -> str:
    """How many patches a variant attenuates, from the (n,) counts: "4.4 of 49 patches an image (8.9 %)"."""
    mean = counts.mean()
    number = f"{mean:.2g}" if 0 < mean < 0.1 else f"{mean:.1f}"
    return f"{number} of {patches:,} patches an image ({percent(mean / patches)})"


def describe_gain(scores: pd.DataFrame, differences: pd.DataFrame | None, changed: bool) -> str:
    """ITAE against the baseline in one sentence.

    Args:
        scores: with a column acc, or agreement.
        differences: from `difference_table`; None without labels.
        changed: whether anything was attenuated.
    """
    if not changed:
        return "Nothing was attenuated, so ITAE is the baseline itself"
    metric = AGREEMENT if differences is None else "acc"
    before, after = (scores[scores.variant == name][metric].mean() for name in ("baseline", "itae"))
    if differences is None:
        return f"Two runs of k-means agree by ARI {before:.3f} on the baseline's features and by {after:.3f} with ITAE"
    return f"ACC {before:.3f} before, {after:.3f} with ITAE: {differences.words['itae', 'acc']}"


def clustering_headline(scores: pd.DataFrame, finding: str, bench: pd.DataFrame | None) -> list[dict[str, str]]:
    """What to know first about the clustering: the score before and after, and how many targets are met."""
    metric = "acc" if "acc" in scores else AGREEMENT
    label = "ACC of the clustering" if metric == "acc" else "Agreement of clusterings"
    before, after = (scores[scores.variant == name][metric].mean() for name in ("baseline", "itae"))
    facts = [{"label": label, "value": f"{before:.3f} → {after:.3f}",
              "note": f"baseline → ITAE, mean over seeds; {finding}"}]
    if bench is not None:
        met = bench[bench.verdict == "met"]
        won = bench.measured.iloc[4]
        note = ("the planted artifacts cost no ACC on these images" if won == NOT_MEASURED
                else f"ITAE wins back {won} of what the planted artifacts cost")
        facts.append({"label": "Test bench", "value": f"{len(met)} of {len(bench)} targets met", "note": note})
    return facts
