"""Sentences, numbers and rows that several notebooks share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

from itae_utils.method.thresholds import ThresholdFit
from itae_utils.models.backbones import Backbone

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
