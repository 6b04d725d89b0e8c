"""Remedies of attention artifacts in one table: scores, attention that is left on artifacts, cost and needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

from itae_utils.analysis import remembered
from itae_utils.analysis.probes import paired_gain
from itae_utils.analysis.scoring import difference_table, over_seeds, score_labels
from itae_utils.analysis.vectors import cosine_distance
from itae_utils.analysis.words import percent, result_rows
from itae_utils.errors import ItaeError
from itae_utils.extraction.neurons import find_register_neurons
from itae_utils.method.register_setting import TestTimeRegisters
from itae_utils.method.setting import ITAE
from itae_utils.models.backbones import Backbone

NBSP = "\N{NO-BREAK SPACE}"
LAYOUT = [{"selector": "th, td", "props": "font-size: .8rem; padding-right: .7rem"},  # so that a page shows all columns
          {"selector": "thead th", "props": "white-space: normal; max-width: 7em; vertical-align: bottom"},
          {"selector": "tbody th", "props": "white-space: normal; min-width: 6em"}]
TRAINED = 4  # registers of the checkpoints that have some
METRICS = {"acc": "ACC", "nmi": "NMI", "ari": "ARI", "knn": "k-NN", "probe": "linear probe"}
NOT_RANKED = (
    "**This table does not rank the remedies.** The artifacts of this backbone were planted, and they harm in the way "
    "that ITAE undoes. So no score is marked best, and none is drawn against its cost. For OpenCLIP ViT-B/16 the paper "
    "of the registers reports the reverse: silencing its neurons harms (zero-shot), and a register does not.")


@dataclass(frozen=True)
class Remedy:
    """What the table says of a remedy beside its scores."""

    needs: str                         # "nothing", "a sample" or "training"
    passes: float = 0.0                # its cost beside the baseline's pass, from `passes`
    attention: tuple[float, ...] = ()  # its share on artifacts before and after; nothing if it plays no part


def passes(backbone: Backbone, blocks: int, *, tokens: int | None = None, more: int = 0) -> float:
    """Return the cost of some blocks on `tokens` (None: an image's) and `more` tokens, in passes of the model."""
    whole = backbone.model.num_prefix_tokens + int(np.prod(backbone.patch_grid))
    return blocks * ((whole if tokens is None else tokens) + more) / (backbone.num_blocks * whole)


def describe_attention(remedies: Mapping[str, Remedy]) -> str:
    """Return Markdown that says how much attention the remedies that act on it leave on artifacts."""
    changed = {name: each.attention for name, each in remedies.items() if len(each.attention) == 2}
    before, left = next(iter(changed.values()))[0], {name: after for name, (_, after) in changed.items()}
    if not before:
        return "No artifacts were found, so the remedies that look for them have nothing to do here."
    most = max(left, key=left.get)
    return (f"Artifacts hold {percent(before)} of the [CLS] attention without a remedy, and at most "
            f"{percent(left[most])} ({most}) under one that acts on the attention.")


def register_settings(backbone: Backbone, dataset: Dataset, itae: ITAE, **options: object
                      ) -> tuple[TestTimeRegisters, dict[str, TestTimeRegisters], list[str]]:
    """Return test-time registers, their fitted rows of notebook 05 by name, and why some rows are left out.

    `itae` is the edit on top of "registers and itae"; `options` are those of `find_register_neurons`.
    """
    rows, left_out = {}, []
    try:
        found = find_register_neurons(backbone, dataset, **options)
    except ItaeError as error:
        return TestTimeRegisters(neurons=(), reason=str(error)), {}, [f"registers are left out: {error}"]
    for name, changes in {"registers": {}, "late registers": {"insert": "late"}, "register bias": {"form": "bias"},
                          "neurons zeroed": {"form": "zero"}, "registers and itae": {"then": itae}}.items():
        try:
            rows[name] = find_register_neurons(backbone, dataset, replace(found, **changes), **options)
        except ItaeError as error:
            left_out.append(f"{name} is left out: {error}")
    return found, rows, left_out


def remedy_facts(backbone: Backbone, registers: TestTimeRegisters, attention: Mapping[str, float]) -> dict[str, Remedy]:
    """Return the needs and costs of the remedies of notebook 05, by name.

    `attention` is the share on artifacts of the baseline and of the remedies that change it.
    """
    depth, first = backbone.num_blocks, registers.neurons[0][0] if registers.neurons else backbone.num_blocks
    row, block = passes(backbone, 1, tokens=1), passes(backbone, 1)
    whole = passes(backbone, depth, more=1) if registers.neurons else 0.0  # without neurons, nothing is run again
    costs = {
        "baseline": ("nothing", 0.0), "itae": ("a sample", row), "no patches": ("nothing", row),
        "mean of patches": ("nothing", block), "mean of normal patches": ("a sample", block),
        "[CLS] and mean": ("nothing", block),
        "registers": ("a sample", whole), "late registers": ("a sample", passes(backbone, depth - first, more=1)),
        "register bias": ("a sample", whole), "neurons zeroed": ("a sample", passes(backbone, depth - first)),
        "registers and itae": ("a sample", whole + row),
        "trained registers": ("training", passes(backbone, depth, tokens=TRAINED)),
    }
    shares = {name: (attention["baseline"],) if name == "baseline" else (attention["baseline"], share)
              for name, share in attention.items()}
    return {name: Remedy(needs, cost, shares.get(name, ())) for name, (needs, cost) in costs.items()}


def describe_remedies(scores: pd.DataFrame) -> str:
    """Return Markdown that says which remedies lead the baseline or fall behind it, by more than their interval."""
    found = []
    for metric, title in METRICS.items():
        rows = scores.xs(metric, level="metric")
        sides = {"above": rows.index[rows.low > 0], "below": rows.index[rows.high < 0]}
        found += [f"{title} is clearly {side} the baseline's with {', '.join(names)}." for side, names in sides.items()
                  if len(names)] or [f"{title} does not clearly differ from the baseline's with any remedy."]
    return " ".join(found) + " These are the scores of one model on one data set."


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
        "attention on artifacts": " → ".join(percent(share).replace(" ", NBSP) for share in each.attention) or "–",
        "passes more": "< 0.01" if 0 < each.passes < 0.01 else f"{each.passes:.2f}",
        "needs": each.needs} for name, each in remedies.items()}).T.rename_axis("remedy")
    if scores is None:
        return facts
    best = (scores.value == scores.value.groupby("metric").transform("max")) & (scores.low > 0) & ranked
    leads = [f"; {row.difference:+z.3f} [{row.low:+z.3f},{NBSP}{row.high:+z.3f}]" for row in scores.itertuples()]
    text = scores.value.map("{:.3f}".format) + np.where(scores.low.isna(), "", leads) + np.where(best, " ★", "")
    return text.unstack().rename(columns=METRICS)[list(METRICS.values())].join(facts, how="right").fillna("–")


def remedy_rows(scores: pd.DataFrame, **about: object) -> list[dict[str, object]]:
    """Return rows for `results.json` from `remedy_scores`: each score, its difference to the baseline and its interval.

    `about` is as for `result_rows`.
    """
    flat = scores.rename(columns={"value": "", "difference": "_difference", "low": "_difference_low",
                                  "high": "_difference_high"}).unstack("metric")
    flat.columns = [f"{metric}{part}" for part, metric in flat.columns]
    return result_rows(flat.rename_axis("variant").reset_index(), list(flat), **about)


def change_table(features: Mapping[str, np.ndarray], pooled: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Return whether remedies leave a model without artifacts as it is, and else how far they move its features.

    `features` hold "baseline"; `pooled` are from `pooled_features`.
    """
    pairs = {name: (features["baseline"], features[name]) for name in features if name != "baseline"}
    pairs["mean of patches"] = features["baseline"], pooled["mean"]
    pairs["mean of normal patches (beside the mean of all)"] = pooled["mean"], pooled["mean_normal"]
    return pd.DataFrame({name: {
        "equal to the bit": "yes" if np.array_equal(*pair) else "no",
        "mean cosine distance": f"{cosine_distance(*pair[::-1]):.3g}"} for name, pair in pairs.items()}
    ).T.rename_axis("remedy")
