"""Remedies of attention artifacts in one table: scores, attention that is left on artifacts, cost and needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from itae_utils.analysis import remembered
from itae_utils.analysis.metrics import describe_difference
from itae_utils.analysis.probes import paired_gain
from itae_utils.analysis.scoring import difference_table, over_seeds, score_labels
from itae_utils.analysis.words import percent
from itae_utils.models.backbones import Backbone

METRICS = {"acc": "ACC", "nmi": "NMI", "ari": "ARI", "knn": "k-NN", "probe": "linear probe"}
NOT_RANKED = ("**This table does not rank the remedies.** The artifacts of this backbone were planted, and they harm "
              "in the way that ITAE undoes. So no score is marked best, and none is drawn against its cost.")


@dataclass(frozen=True)
class Remedy:
    """What the table says of a remedy beside its scores."""

    needs: str                         # "nothing", "weights only", "a sample" or "training"
    passes: float = 0.0                # its cost beside the baseline's pass, from `passes`
    measured: float | None = None      # the same, as it was measured
    attention: tuple[float, ...] = ()  # its share on artifacts before and after; nothing if it plays no part


def passes(backbone: Backbone, blocks: int, *, tokens: int | None = None, more: int = 0) -> float:
    """Return the cost of some blocks on `tokens` (None: an image's) and `more` tokens, in passes of the model."""
    whole = backbone.model.num_prefix_tokens + int(np.prod(backbone.patch_grid))
    return blocks * ((whole if tokens is None else tokens) + more) / (backbone.num_blocks * whole)


def remedy_scores(features: Mapping[str, np.ndarray], targets: np.ndarray, *, seed: int = 0, **k_means: object
                  ) -> pd.DataFrame:
    """Return the scores of features (n, dim) by remedy, and their leads over "baseline" with a 95 % interval.

    `k_means` are seeds, store and more as for `remembered.clusters`; `seed` draws folds and resamples. The index is
    (remedy, metric), and the columns are value, difference, low and high.
    """
    runs = remembered.clusters_of_all(features, len(np.unique(targets)), **k_means)
    labels = {name: found for name, (found, _) in runs.items()}
    leads, store = difference_table(targets, labels, seed=seed).drop(columns="words"), k_means.get("store", "auto")
    hits = {name: remembered.hits(features[name], targets, seed=seed, store=store) for name in features}
    gains = {name: paired_gain(hits["baseline"], each, seed) for name, each in hits.items() if name != "baseline"}
    values = over_seeds(score_labels(targets, labels, k_means["seeds"])).xs("mean", axis=1, level=1).T
    values = pd.concat([values, pd.DataFrame({name: pd.DataFrame(each).mean() for name, each in hits.items()})])
    names = ["remedy", "metric"]
    leads = pd.concat([leads, pd.concat(gains)]).rename_axis(names)
    return values.unstack().rename_axis(names).to_frame("value").join(leads)


def remedy_table(scores: pd.DataFrame | None, remedies: Mapping[str, Remedy], *, ranked: bool) -> pd.DataFrame:
    """Return the remedies as text, one row each, with their `remedy_scores`; None if there are no labels.

    If `ranked`, ★ marks the best score of each column, provided that its lead over the baseline is clear.
    """
    facts = pd.DataFrame({name: {
        "attention on artifacts": " → ".join(map(percent, each.attention)) or "–",
        "passes more": f"{each.passes:.3g}" + ("" if each.measured is None else f" (measured {each.measured:.2f})"),
        "needs": each.needs} for name, each in remedies.items()}).T
    if scores is None:
        return facts
    best = (scores.value == scores.value.groupby("metric").transform("max")) & (scores.low > 0) & ranked
    leads = [f" ({describe_difference(row).partition(':')[0]})" for row in scores.to_dict("records")]
    text = scores.value.map("{:.3f}".format) + np.where(scores.low.isna(), "", leads) + np.where(best, " ★", "")
    return text.unstack().rename(columns=METRICS)[list(METRICS.values())].join(facts, how="right").fillna("–")
