"""What was measured, in words and small tables: the sentences and rows that the notebooks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from itae_utils.artifacts import precision_recall
from itae_utils.layers import SOURCES

if TYPE_CHECKING:
    import pandas as pd
    from torch.utils.data import Dataset

    from itae_utils.backbones import Backbone
    from itae_utils.features import Features
    from itae_utils.observation import Observation
    from itae_utils.thresholds import ThresholdFit

PLANTED = (
    "**The artifacts of this backbone were planted** by an edit of its weights, so that it is known which patches they "
    "are. What is found here shows that the program works, not that natural artifacts behave the same."
)


def percent(share: float) -> str:
    """A share as text with two figures, never rounded to none or all: "8.9 %", "92 %", "99.9 %", "< 0.1 %"."""
    if share in (0, 1) or not 0 <= share <= 1:
        number = f"{100 * share:.0f}"
    elif share < 0.001:
        number = "< 0.1"
    elif share >= 0.99:
        number = f"{min(100 * share, 99.9):.1f}"
    else:
        number = f"{100 * share:.0f}" if share >= 0.0995 else f"{100 * share:.2g}"
    return f"{number} %"


def describe_run(backbone: Backbone, dataset: Dataset) -> str:
    """Markdown: which model looks at which images, and whether its artifacts were planted."""
    rows, columns = backbone.patch_grid
    labels = "without labels" if dataset.targets is None else _classes(dataset)
    lines = [
        f"**{backbone.name}**: {backbone.source}; {backbone.num_blocks} blocks, width {backbone.dim}, "
        f"{backbone.image_size} px ({backbone.preprocess}), {rows} × {columns} patches, "
        f"{backbone.precision} on {backbone.device}.",
        f"**{dataset.name}**: {len(dataset):,} images, {labels}; {dataset.source}.",
    ]
    if dataset.skipped:
        lines.append(f"{len(dataset.skipped):,} unreadable files were left out, {dataset.skipped[0]} the first.")
    if backbone.truth is not None:
        lines.append(PLANTED)
    return "\n\n".join(lines)


def _classes(dataset: Dataset) -> str:
    present, known = len(np.unique(dataset.targets)), len(dataset.classes)
    return f"{known:,} classes" if present == known else f"{present:,} of {known:,} classes"


def describe_threshold(source: str, fit: ThresholdFit, threshold: float | None) -> str:
    """Markdown: the θ that is used for `source` and where it comes from, or why there is none and what that means."""
    if fit.is_given(threshold):
        return f"θ = {threshold:.4g} on the norm of the {source} was given; the fit would say: {fit.reason}."
    if threshold is None:
        if not fit.is_tested:
            return (f"**Artifacts could not be looked for** by the norm of the {source}: {fit.reason}. So nothing is "
                    "attenuated: with ITAE every feature is the model's own. Take more images, or give `threshold` a "
                    "number.")
        return (f"**No artifacts were found** by the norm of the {source} in the last block ({fit.reason}). So nothing "
                "is attenuated: with ITAE every feature is the model's own.")
    return f"θ = {threshold:.4g} on the norm of the {source} in the last block: {fit.reason}."


def threshold_table(fits: Mapping[str, ThresholdFit]) -> pd.DataFrame:
    """θ, the share of patches at or below it, the modes' separation and the verdict, a row a source."""
    import pandas as pd

    return pd.DataFrame(
        [{
            "source": source,
            "θ": "none" if fit.threshold is None else f"{fit.threshold:.4g}",
            "patches ≤ θ": "–" if fit.threshold is None else percent((fit.norms <= fit.threshold).mean()),
            "separation": "–" if np.isnan(fit.separation) else f"{fit.separation:.1f}",
            "verdict": fit.reason,
        } for source, fit in fits.items()]
    ).set_index("source")


def detection_table(seen: Observation, thresholds: Mapping[str, float | None]) -> pd.DataFrame:
    """Precision and recall of every source's θ against the planted truth; NaN where nothing was found."""
    import pandas as pd

    rows = []
    for source in SOURCES:
        theta = thresholds[source]
        found = np.zeros_like(seen.truth) if theta is None else seen.norms[source] <= theta
        precision, recall = precision_recall(found, seen.truth)
        rows.append({"source": source, "θ": np.nan if theta is None else theta, "found": int(found.sum()),
                     "true": int(seen.truth.sum()), "precision": precision, "recall": recall})
    return pd.DataFrame(rows).set_index("source")


def describe_concentration(seen: Observation) -> str:
    """Markdown: how unevenly `[CLS]` spreads its attention, where no artifacts were found."""
    busiest = max(1, round(0.1 * seen.attention.shape[1]))
    share = np.sort(seen.attention, axis=1)[:, -busiest:].sum(axis=1).mean()
    return (f"No patch was taken for an artifact: no share to measure. For comparison: the {busiest} most attended of "
            f"an image's {seen.attention.shape[1]:,} patches take {percent(share)} of the `[CLS]` attention, wherever "
            "they are.")


def discovery_headline(
    seen: Observation, source: str, threshold: float | None, fit: ThresholdFit, detection: pd.DataFrame | None
) -> list[dict[str, str]]:
    """What to know first about artifacts: the attention they take, and how well they were found.

    Args:
        seen: what was observed.
        source: whose norms told them.
        threshold: θ that was used; None for none.
        fit: of that source in the last block.
        detection: from `detection_table`, where the truth is known.
    """
    given = fit.is_given(threshold)
    if not seen.artifacts.any():
        why = f"no patch lies at or below the given θ = {threshold:.4g}" if given else fit.reason
        return [{"label": "Artifacts", "value": "none found" if given or fit.is_tested else "not looked for",
                 "note": f"{source} norms, last block: {why}"}]
    before, after = (percent((weights * seen.artifacts).sum(axis=1).mean())
                     for weights in (seen.attention, seen.attention_after))
    by = f"the given ‖{source}‖ ≤ {threshold:.4g}" if given else f"‖{source}‖"
    facts = [{"label": "[CLS] attention on artifacts", "value": f"{before} → {after}",
              "note": f"before → after ITAE, mean over all images; {percent(seen.artifacts.mean())} of the patches, "
                      f"told by {by}"}]
    if detection is not None:
        precision, recall = detection.loc[source, ["precision", "recall"]]
        facts.append({"label": "Detection", "value": f"{precision:.4f} / {recall:.4f}",
                      "note": f"precision / recall of ‖{source}‖ ≤ {threshold:.4g} against the planted truth"})
    return facts


def describe_extraction(features: Features, fit_seconds: float) -> str:
    """Markdown: how many variants were run, on how many images, in what time, and how many the store already held."""
    run = [count for count in features.computed.values() if count]
    total, took, images = len(features), f"{features.seconds:.1f} s", max(run, default=0)
    if not run:
        return (f"**All {total} variants were found in the feature store**, where an earlier run left them; looking "
                f"took {took}, after {fit_seconds:.1f} s for θ.")
    which = f"{total} variants" if len(run) == total else f"{len(run)} of {total} variants"
    stored = "" if len(run) == total else "; the others were found in the feature store"
    return (f"**{which} ran in one pass** over {images:,} images, which took {took} "
            f"({images / features.seconds:,.0f} images a second), after {fit_seconds:.1f} s for θ{stored}.")


def ablation_headline(scores: pd.DataFrame, measure: str, features: Features) -> list[dict[str, str]]:
    """What to know first about the ablation: how many settings in what time, and what θ from the norms alone gives."""
    run = sum(count > 0 for count in features.computed.values())
    note = f"in {features.seconds:.1f} s" if run == len(features) else f"{len(features) - run} of them from the store"
    facts = [{"label": "One pass", "value": f"{len(features)} variants", "note": note}]
    auto = scores[(scores.kind == "itae") & (scores.theta == "auto")]
    if measure != "acc":
        return facts
    baseline = scores[scores.kind == "baseline"][measure].mean()
    if auto.empty:
        return [*facts, {"label": "θ from the norms alone", "value": "none", "note": f"baseline ACC {baseline:.3f}"}]
    means = auto.groupby(level="variant")[measure].mean()
    facts.append({"label": "ACC with θ from the norms alone", "value": f"{means.min():.3f} to {means.max():.3f}",
                  "note": f"over {len(means)} settings; baseline {baseline:.3f} (means over seeds)"})
    return facts


def result_rows(
    table: pd.DataFrame, metrics: Sequence[str], *, backbone: str, dataset: str, n: int
) -> list[dict[str, object]]:
    """Rows for `results.json` from a table with columns variant and `metrics`; what is not finite is left out.

    Args:
        table: may have a column seed, and a column backbone where not all rows are of one.
        metrics: columns to take.
        backbone: name.
        dataset: name.
        n: number of images.
    """
    return [
        {"backbone": row.get("backbone", backbone), "dataset": dataset, "n": n, "variant": row["variant"],
         "seed": row.get("seed"), "metric": metric, "value": float(row[metric])}
        for row in table.to_dict("records") for metric in metrics if np.isfinite(row[metric])
    ]
