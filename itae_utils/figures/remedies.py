"""Figures of remedies: what they gain against what they cost, and the attention that they leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from textwrap import wrap

import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from itae_utils.analysis.remedies import Remedy
from itae_utils.analysis.words import percent
from itae_utils.figures.style import MAP, PALETTE, SIGNS, ReportFigure, outline, styled


@styled
def score_against_cost(scores: pd.DataFrame, remedies: Mapping[str, Remedy]) -> Figure:
    """Draw each remedy's lead over the baseline in ACC, with its interval, against its cost in passes.

    `scores` are from `remedy_scores`. Don't draw it where artifacts were planted, see `NOT_RANKED`.
    """
    rows = scores.xs("acc", level="metric").drop(index="baseline")
    rows = rows[(rows.low != 0) | (rows.high != 0)]  # the others changed nothing
    clear = rows.difference[rows.low > 0]
    best = f"{clear.idxmax()}, {clear.max():+.3f}" if len(clear) else "none"
    caption = ("Lead of each remedy over the baseline in ACC, with its 95 % paired bootstrap interval over the "
               "images, against its cost: the share of a pass of the model that it adds, counted from blocks and "
               "tokens. Remedies that change nothing are left out.")
    figure = ReportFigure(f"Largest clear lead over the baseline in ACC: {best}", caption, height=4.2)
    axes = figure.subplots()
    series = product(("-", ":", "-."), zip(SIGNS, PALETTE, strict=True))
    for (name, row), (line, (sign, color)) in zip(rows.iterrows(), series, strict=False):
        ends = row[["low", "difference", "high"]]
        axes.plot([remedies[name].passes] * 3, ends, f"{sign}{line}", markevery=[1], color=color, label=name)
    axes.axhline(0, color="black", linestyle="--", linewidth=1, label="baseline")
    axes.set(xlabel="cost in passes of the model, beside the baseline's", ylabel="lead in ACC, with its 95 % interval")
    figure.legend(loc="outside right center")
    return figure


@styled
def remedy_maps(pictures: Sequence[np.ndarray], maps: Mapping[str, np.ndarray], artifacts: np.ndarray, *,
                planted: bool = False) -> Figure:
    """Draw images (H, W, 3) in rows, and their `[CLS]` attention under each remedy in columns, with artifacts framed.

    `maps` are (n, rows, columns) by remedy, the baseline first, and share one colour scale of square roots; `artifacts`
    are bool, and have dashed frames if they were `planted`. Above each column is the mean share of the attention on
    artifacts.
    """
    shares = [(weights * artifacts).sum(axis=(1, 2)).mean() for weights in maps.values()]
    ends = dict.fromkeys(percent(end(shares[1:])) for end in (min, max))
    framed = "The planted artifacts have dashed frames" if planted else "Artifacts of the unmodified model are framed"
    caption = ("Attention of [CLS] in the last block under each remedy, mean over the heads, on one scale of square "
               f"roots. {framed}.")
    figure = ReportFigure(f"In these images artifacts draw {percent(shares[0])} of the [CLS] attention; under the "
                          f"remedies {' to '.join(ends)}", caption, height=1.6 + 9.5 * len(pictures) / (1 + len(maps)))
    grid = figure.subplots(len(pictures), 1 + len(maps), squeeze=False)
    norm = PowerNorm(0.5, 0, max(weights.max() for weights in maps.values()))
    for row, mask, *drawn in zip(grid, artifacts, pictures, *maps.values(), strict=True):
        for axes, values in zip(row, drawn, strict=True):
            image = axes.imshow(values, extent=(0, mask.shape[1], mask.shape[0], 0), cmap=MAP, norm=norm)
            outline(axes, mask, planted=planted)
    grid[0][0].set_title("image", fontsize="small")
    longest = max(6, 130 // len(grid[0]))  # letters beside each other above a column
    for axes, name, share in zip(grid[0][1:], maps, shares, strict=True):
        axes.set_title("\n".join([*wrap(name, longest), percent(share)]), fontsize="small")
    figure.colorbar(image, ax=grid, label="attention weight", location="bottom", shrink=0.4, aspect=40,
                    ticks=MaxNLocator(4))
    return figure
