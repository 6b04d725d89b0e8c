"""The benchmark's figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.contenders import COUNTS, ours
from itae_utils.figures.style import PALETTE, ReportFigure, styled

NEAR = (0.75, 1.25)  # plain passes on the linear scale


@styled
def benchmark(rows: Sequence[Mapping[str, object]], conditions: str) -> Figure:
    """Draw each contender's time, and peak memory above the weights, relative to a plain pass of that model and batch.

    Args:
        rows: from `summarize`. Headings "passes" and, if measured, "memory" are drawn.
        conditions: the legend's title: device, threads and precision.
    """
    times = [row for row in rows if row["heading"] == "passes"]
    memory = [row for row in rows if row["heading"] == "memory"]
    names = list(dict.fromkeys(row["what"] for row in times))
    figure = ReportFigure(_title(times), "", height=1.8 + 0.42 * len(names))
    panels = figure.subplots(1, 3 if memory else 2, sharey=True, squeeze=False)[0]
    for axes, shown in zip(panels, [times, times, memory], strict=False):
        _dots(axes, shown, names)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    panels[0].set(xscale="log", title="time", xlabel="plain passes (log scale)")
    panels[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[0].xaxis.set_minor_locator(NullLocator())
    panels[1].set(xlim=NEAR, title=f"time, from {NEAR[0]} to {NEAR[1]}", xlabel="plain passes")
    if memory:
        panels[2].set(title="peak memory", xlabel="plain passes")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), title=conditions)
    return figure


def _dots(axes: Axes, rows: Sequence[Mapping[str, object]], names: Sequence[str]) -> None:
    """Draw medians with their spread, one colour and marker per size; sizes are shifted so that none hides another."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    for size, shift, color, marker in zip(sizes, np.linspace(-0.2, 0.2, len(sizes)), PALETTE, "osD", strict=False):
        own = [row for row in rows if row["size"] == size]
        ratio, low, high = (np.array([row[key] for row in own]) for key in ("ratio", "low", "high"))
        places = [names.index(row["what"]) + shift for row in own]
        axes.errorbar(ratio, places, xerr=[ratio - low, high - ratio], fmt=marker, markersize=4, capsize=2,
                      color=color, label=f"ViT-{size}")
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def _title(times: Sequence[Mapping[str, object]]) -> str:
    last = ours(max(COUNTS))
    most = [row for row in times if row["what"] == last]
    of_last = ", ".join(f"{row['ratio']:.2f} (ViT-{row['size']})" for row in most)
    return f"{last.removeprefix('ours, ').capitalize()} in one pass take {of_last} of the time of one plain pass"
