"""Sentences, numbers and result rows that several notebooks share."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

from itae_utils.data.images import shown
from itae_utils.data.items import targets_of
from itae_utils.method.setting import WHERE
from itae_utils.method.thresholds import ThresholdFit
from itae_utils.models.backbones import Backbone
from itae_utils.results import versions

PLANTED = (
    "**The artifacts of this backbone were planted** by editing its weights, so the true artifacts are known. "
    "The results show that the program works, not that natural artifacts behave in the same way."
)
PRINTED_VERSIONS = ("itae-utils", "torch", "timm", "scikit-learn")  # `results.json` has more of them
SETTING_COLUMNS = ("source", "attenuation", "theta")
ISOLATE, END_OF_ISOLATE = "\N{FIRST STRONG ISOLATE}", "\N{POP DIRECTIONAL ISOLATE}"
MARKDOWN = str.maketrans({sign: f"\\{sign}" for sign in r"\`*_[]~|$"})


def escape(text: object) -> str:
    """Return a name or path as literal text for Markdown: neither HTML nor Markdown in it takes effect.

    A name that is written from right to left is isolated, so that it does not reorder the words around it.
    """
    literal = html.escape(shown(text), quote=False).translate(MARKDOWN)
    leftward = any(unicodedata.bidirectional(sign) in ("R", "AL") for sign in literal)
    return f"{ISOLATE}{literal}{END_OF_ISOLATE}" if leftward else literal


def percent(share: float) -> str:
    """Return a share as text with two or three digits, such as "8.9 %"; only 0 and 1 give "0 %" and "100 %"."""
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
    """Return Markdown that describes the model, device, images and versions, and says if the artifacts were planted.

    A data set of your own needs only its length. `targets`, `classes`, `name` and `source` are described if it has
    them, and each of its `notes` is a line.
    """
    rows, columns = backbone.patch_grid
    targets, classes = targets_of(dataset), getattr(dataset, "classes", None)
    if targets is None:
        labels = "without labels"
    else:
        present = len(np.unique(targets))
        known = present if classes is None else len(classes)
        labels = f"{known:,} classes" if present == known else f"{present:,} of {known:,} classes"
    name, source = getattr(dataset, "name", type(dataset).__name__), getattr(dataset, "source", "a data set of yours")
    lines = [
        f"**{escape(backbone.name)}**: {escape(backbone.source)}; {backbone.num_blocks} blocks, width {backbone.dim}, "
        f"{backbone.image_size} px ({backbone.preprocess}), {rows} × {columns} patches, "
        f"{backbone.precision} on {backbone.device}.",
        f"**{escape(name)}**: {len(dataset):,} images, {labels}; {escape(source)}.",
        *map(escape, getattr(dataset, "notes", ())),
        " · ".join(f"{name} {version}" for name, version in versions().items() if name in PRINTED_VERSIONS),
    ]
    if backbone.truth is not None:
        lines.append(PLANTED)
    return "\n\n".join(lines)


def statistic_name(source: str) -> str:
    """Return what a source measures, in words: "norm of the key"."""
    others = {"direction": "share along the singular direction", "attention": "share of the [CLS] attention"}
    return others.get(source, f"norm of the {source}")


def symbol(source: str) -> str:
    """Return what a source measures as a short label: "‖key‖₂"."""
    return {"direction": "|cos(token, direction)|", "attention": "[CLS] attention"}.get(source, f"‖{source}‖₂")


def condition(source: str, side: str, threshold: float) -> str:
    """Return which patches are artifacts: "‖key‖₂ ≤ 2.464"."""
    return f"{symbol(source)} {'≤' if side == 'low' else '≥'} {threshold:.4g}"


def describe_threshold(source: str, fit: ThresholdFit, threshold: float | None, rule: float | str) -> str:
    """Return Markdown that states the θ in use for `source` and its origin, or why there is no θ.

    `rule` is what the user gave: "auto", "share:2%", "sd:3" or a number.
    """
    name = statistic_name(source)
    if fit.is_given(threshold):
        origin = f"follows from {rule}" if isinstance(rule, str) else "was given"
        share = percent(fit.beyond(threshold).mean())
        return (f"θ = {threshold:.4g} on the {name} in the last block {origin}: {share} of the patches lie "
                f"{WHERE[fit.side]} it. The fit of two modes says: {fit.reason}.")
    if threshold is not None:
        return f"θ = {threshold:.4g} on the {name} in the last block: {fit.reason}."
    unchanged = "Nothing is attenuated, so every ITAE feature equals the model's own."
    if fit.is_tested:
        return f"**No artifacts were found** with the {name} in the last block ({fit.reason}). {unchanged}"
    return (f"**Too few patches to look for artifacts** with the {name}: {fit.reason}. {unchanged} Use more images, or "
            "set `threshold` to a number.")


def describe_runs(seeds: int, n_init: int) -> str:
    """Return of which runs of k-means a score is the mean: "mean of 5 seeds of k-means, best of 10 starts each"."""
    runs = f"mean of {seeds:,} seeds of k-means" if seeds > 1 else "1 seed of k-means"
    return f"{runs}, {f'best of {n_init:,} starts' if n_init > 1 else '1 start'}{' each' * (seeds > 1)}"


def describe_kmeans(options: Mapping[str, object], scored: str, fitted: str | None = None) -> str:
    """Return a sentence on how features were clustered: the algorithm, normalisation, starts, and the split.

    `options` are the notebook's; `scored` describes the images that were scored, and `fitted` those that k-means was
    fitted on, by default the same.
    """
    rows = "scaled to length 1" if options.get("normalize", True) else "not normalised"
    starts = int(options.get("n_init", 1))
    where = f"the scored images, {scored}" if fitted in (None, scored) else f"{fitted}, scored on {scored}"
    return (f"K-means ({options.get('algorithm', 'exact')}): features {rows}, "
            f"{f'best of {starts:,} starts' if starts > 1 else '1 start'}, fitted on {where}.")


def describe_thetas(thresholds: Sequence[float | None]) -> str:
    """Return the θ of several blocks as text, such as "none, 2.31"."""
    return ", ".join("none" if theta is None else f"{theta:.3g}" for theta in thresholds)


def result_rows(
    table: pd.DataFrame, metrics: Sequence[str], *, backbone: str, dataset: str, n: int
) -> list[dict[str, object]]:
    """Return rows for `results.json`, one for each finite value in the columns `metrics`; `n` is the number of images.

    `table` has a column variant. Optional columns are seed; backbone, if the rows are of several; and source,
    attenuation and theta, a setting of the ablation's grid that the result rows then carry too (None if missing).
    """
    rows = []
    for row in table.to_dict("records"):
        setting = {name: row[name] if isinstance(row[name], str) else None for name in SETTING_COLUMNS if name in row}
        rows += [{"backbone": row.get("backbone", backbone), "dataset": dataset, "n": n, "variant": row["variant"],
                  "seed": row.get("seed"), **setting, "metric": metric, "value": float(row[metric])}
                 for metric in metrics if np.isfinite(row[metric])]
    return rows
