"""The plot of the comparison: measured scores beside the published ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from itae_utils.analysis.collection import Cell
from itae_utils.analysis.comparison import BY_DATASET, VARIANTS, dataset_title, has_scores, marked, score_values
from itae_utils.analysis.metrics import METRICS
from itae_utils.figures.style import AFTER, NORMAL, ReportFigure, styled

MARKERS = {"baseline": ("o", NORMAL, NORMAL), "random control": ("o", "white", NORMAL), "itae": ("D", AFTER, AFTER)}


@styled
def published_and_measured(cells: Sequence[Cell]) -> Figure:
    """A panel for each score: a line for every cell with its variants' mean ± sd, and the published ITAE as a bar.

    Data sets that were not run have a line with the published number alone.
    """
    lines: list[tuple[str, str, Cell | None]] = []
    measured = [cell for cell in cells if has_scores(cell)]
    for dataset in [*BY_DATASET, *dict.fromkeys(cell.dataset for cell in measured if cell.dataset not in BY_DATASET)]:
        own = [cell for cell in measured if cell.dataset == dataset]
        lines += [(dataset, _name(cell), cell) for cell in own]
        lines += [] if own else [(dataset, f"{dataset_title(dataset)}\nnot run", None)]
    figure = ReportFigure(_title(measured), height=1.5 + 0.55 * len(lines))
    panels = figure.subplots(1, len(METRICS), sharey=True)
    for axes, metric in zip(panels, METRICS, strict=True):
        for place, (dataset, _, cell) in enumerate(lines):
            _draw(axes, place, metric, cell, dataset)
        axes.set(title=metric.upper(), ylim=(len(lines) - 0.5, -0.5))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(lines)), [name for _, name, _ in lines])
    handles = {label: handle for axes in panels
               for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


def _name(cell: Cell) -> str:
    marks = cell.marks()
    return (f"{marked(dataset_title(cell.dataset), marks.get('dataset'))}\n"
            f"{marked(cell.backbone, marks.get('backbone'))}")


def _draw(axes: Axes, place: int, metric: str, cell: Cell | None, dataset: str) -> None:
    if dataset in BY_DATASET:
        axes.plot([getattr(BY_DATASET[dataset], metric)] * 2, [place - 0.35, place + 0.35], color="black", linewidth=2,
                  label="published ITAE")
    for offset, (variant, (marker, face, edge)) in zip((-0.18, 0, 0.18), MARKERS.items(), strict=True):
        values = score_values(cell, variant, metric) if cell else []
        if values:
            axes.errorbar(np.mean(values), place + offset, xerr=np.std(values, ddof=1) if len(values) > 1 else None,
                          marker=marker, color=edge, markerfacecolor=face, linestyle="none", label=VARIANTS[variant])


def _title(measured: Sequence[Cell]) -> str:
    gaps = [np.mean(score_values(cell, "itae", "acc")) - BY_DATASET[cell.dataset].acc for cell in measured
            if cell.dataset in BY_DATASET and not cell.marks()]
    if not gaps:
        return "No published number can be compared yet: nothing was run on the real images with the published weights"
    ends = dict.fromkeys(f"{gap:+.3f}" for gap in (min(gaps), max(gaps)))
    return (f"Measured minus published ACC of ITAE: {' to '.join(ends)} over {len(gaps)} "
            f"run{'s' if len(gaps) > 1 else ''} with real images and weights")
