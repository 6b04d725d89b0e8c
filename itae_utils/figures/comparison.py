"""The figure of the comparison: measured scores beside the published ones."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from itae_utils.analysis.collection import BY_DATASET, Pairing
from itae_utils.analysis.comparison import (
    VARIANTS,
    concerns_paper,
    dataset_title,
    has_scores,
    labelled_titles,
    score_values,
)
from itae_utils.analysis.metrics import METRICS
from itae_utils.figures.names import label_names
from itae_utils.figures.style import AFTER, NORMAL, ReportFigure, styled

LONGEST_TITLE = 44  # columns of a title with its caveat
MARKERS = {"baseline": ("o", NORMAL, NORMAL), "random control": ("s", "white", NORMAL), "itae": ("D", AFTER, AFTER)}


@styled
def published_and_measured(pairings: Sequence[Pairing]) -> Figure:
    """Draw one panel per score: a row for every pairing with its variants' mean ± sd, and the published ITAE as a bar.

    The paper's data sets that were not run have a row with the published number only, if any of them was run.
    """
    rows: list[tuple[str, list[str], Pairing | None]] = []
    measured = [pairing for pairing in pairings if has_scores(pairing)]
    listed = BY_DATASET if concerns_paper(pairings) else ()
    for dataset in dict.fromkeys([*listed, *(pairing.dataset for pairing in measured)]):
        own = [(dataset, labelled_titles(pairing), pairing) for pairing in measured if pairing.dataset == dataset]
        rows += own or [(dataset, [dataset_title(dataset), "not run"], None)]
    if not rows:
        return ReportFigure("No run has labels to score against", "", height=0.6)
    labels = map("\n".join, zip(*(label_names([titles[part] for _, titles, _ in rows], longest=LONGEST_TITLE)
                                  for part in (0, 1)), strict=True))
    caption = ("Scores of k-means on each pairing of data set and backbone, mean ± standard deviation over its seeds. "
               "A black bar is the published score of ITAE.")
    figure = ReportFigure(_title(measured), caption, height=1.5 + 0.55 * len(rows))
    panels = figure.subplots(1, len(METRICS), sharey=True)
    for axes, metric in zip(panels, METRICS, strict=True):
        for place, (dataset, _, pairing) in enumerate(rows):
            _draw(axes, place, metric, pairing, dataset)
        axes.set(title=metric.upper(), ylim=(len(rows) - 0.5, -0.5))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), list(labels))
    handles = {label: handle for axes in panels
               for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


def _draw(axes: Axes, place: int, metric: str, pairing: Pairing | None, dataset: str) -> None:
    if dataset in BY_DATASET:
        axes.plot([getattr(BY_DATASET[dataset], metric)] * 2, [place - 0.35, place + 0.35], color="black", linewidth=2,
                  label="published ITAE")
    for offset, (variant, (marker, face, edge)) in zip((-0.18, 0, 0.18), MARKERS.items(), strict=True):
        values = score_values(pairing, variant, metric) if pairing else []
        if values:
            axes.errorbar(np.mean(values), place + offset, xerr=np.std(values, ddof=1) if len(values) > 1 else None,
                          marker=marker, color=edge, markerfacecolor=face, linestyle="none", label=VARIANTS[variant])


def _title(measured: Sequence[Pairing]) -> str:
    gaps = [mean(score_values(pairing, "itae", "acc")) - BY_DATASET[pairing.dataset].acc for pairing in measured
            if pairing.dataset in BY_DATASET and not pairing.caveats()]
    if not concerns_paper(measured):
        gains = [mean(score_values(pairing, "itae", "acc")) - mean(score_values(pairing, "baseline", "acc"))
                 for pairing in measured]
        ends = dict.fromkeys(f"{gain:+.3f}" for gain in (min(gains), max(gains)))
        return f"ACC of ITAE minus that of the baseline: {' to '.join(ends)}; none of the data sets is the paper's"
    if not gaps:
        return "No run can be compared with the published numbers yet: none has the published images and weights"
    ends = dict.fromkeys(f"{gap:+.3f}" for gap in (min(gaps), max(gaps)))
    return (f"Measured minus published ACC of ITAE: {' to '.join(ends)} over {len(gaps)} "
            f"run{'s' if len(gaps) > 1 else ''} with the published images and weights")
