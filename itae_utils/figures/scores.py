"""Figures of scores and clusters: the ablation's grid, variants, confusions, embeddings, image sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from itae_utils.analysis.ablation import AUTO
from itae_utils.analysis.scoring import AGREEMENT, CHANGE, over_seeds
from itae_utils.analysis.vectors import NEIGHBOURS, neighbour_agreement
from itae_utils.errors import ItaeError
from itae_utils.figures.names import label_names
from itae_utils.figures.style import AFTER, ARTIFACT, COLUMNS, MAP, NORMAL, PALETTE, SIGNS, ReportFigure, panels, styled

MEASURES = {"acc": "ACC", "nmi": "NMI", "ari": "ARI", CHANGE: "cosine distance to the baseline",
            AGREEMENT: "ARI between runs"}
SMALL_GAIN = 0.01  # smaller changes of a class's accuracy are not counted
NAMED_CLASSES = 20  # more names do not fit beside an axis
LEGEND_SIGNS = 105  # characters in a line of a legend


def _check_measure(scores: pd.DataFrame, measure: str) -> None:
    known = [name for name in MEASURES if name in scores]
    if measure not in known:
        raise ItaeError(f"measure={measure!r} is not one of these scores: use {' or '.join(known)}")


@styled
def ablation_heatmaps(scores: pd.DataFrame, measure: str) -> Figure:
    """Draw the mean of the column `measure` over seeds by attenuation and θ, one panel per source, in equal colours.

    `scores` are from `ablation_grid`, joined with the scores: kind, source, attenuation, theta, seed and `measure`.
    """
    _check_measure(scores, measure)
    settings = scores[scores.kind == "itae"]
    means = settings.groupby(["source", "attenuation", "theta"], sort=False)[measure].agg(mean)
    baseline, (source, attenuation, theta) = mean(scores[scores.kind == "baseline"][measure]), means.idxmax()
    best = f"{source}, {attenuation}, {theta}: {MEASURES[measure]} {means.max():.3f}"
    title = (f"Largest change of {len(means)} settings: {best}" if measure == CHANGE
             else f"Best of {len(means)} settings: {best} (baseline {baseline:.3f})")
    columns = [*dict.fromkeys(settings.theta[settings.theta != AUTO]), AUTO]
    sources, rows = list(dict.fromkeys(settings.source)), list(dict.fromkeys(settings.attenuation))
    caption = (f"{MEASURES[measure]} of every setting, mean over the seeds of k-means: one panel per statistic, one "
               "row per edit, one column per θ. The white line on the scale is the baseline.")
    figure = ReportFigure(title, caption, height=0.7 + (1 + 0.42 * len(rows)) * -(-len(sources) // COLUMNS))
    drawn = panels(figure, len(sources))
    unit, fmt, suffix = (1000, ".1f", " × 1000") if measure == CHANGE else (1, ".2f", "")
    low, high = min(means.min(), baseline) * unit, max(means.max(), baseline) * unit
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5  # equal values get the colour in the middle of the scale
    for axes, source in zip(drawn, sources, strict=True):
        table = means[source].unstack("theta").reindex(index=rows, columns=columns)
        sns.heatmap(table * unit, vmin=low, vmax=high, cmap=MAP, annot=True, fmt=fmt, linewidths=1, cbar=False, ax=axes)
        axes.set(title=source, xlabel="θ as share of the patches", ylabel="")
        axes.tick_params(length=0)
        axes.tick_params("y", rotation=0)
        if table[AUTO].isna().all():
            axes.text(len(columns) - 0.5, len(rows) / 2, "no θ found", rotation=90, ha="center", va="center")
    for axes in drawn[::COLUMNS]:
        axes.set_ylabel("attenuation")
    bar = figure.colorbar(drawn[0].collections[0], ax=drawn, label=MEASURES[measure] + suffix, pad=0.01)
    bar.ax.axhline(baseline * unit, color="white", linewidth=2)
    return figure


@styled
def ablation_curves(scores: pd.DataFrame, measure: str) -> Figure:
    """Draw `measure` against θ as share of the patches: mean ± sd over seeds per attenuation, one panel per source.

    The arguments are as for `ablation_heatmaps`.
    """
    _check_measure(scores, measure)
    sources = list(dict.fromkeys(scores.source.dropna()))
    caption = (f"{MEASURES[measure]} against θ, given as the share of the patches beyond it: mean ± standard "
               "deviation over the seeds of k-means, one panel per statistic. Stars are the θ found without labels. "
               "The dotted line edits as many random patches.")
    figure = ReportFigure(_curves_title(scores, measure), caption, height=1 + 3 * -(-len(sources) // COLUMNS))
    drawn = panels(figure, len(sources))
    for axes, source in zip(drawn, sources, strict=True):
        _curves(axes, scores, source, measure)
    for axes in drawn[::COLUMNS]:
        axes.set_ylabel(MEASURES[measure])
    handles, labels = drawn[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(7, len(labels)))
    return figure


def _curves(axes, scores: pd.DataFrame, source: str, measure: str) -> None:
    of_source = scores[scores.source == source].sort_values("share")
    attenuations = dict.fromkeys(scores.attenuation[scores.kind == "itae"])
    for attenuation, color, marker in zip(attenuations, PALETTE[:3] + PALETTE[4:], SIGNS, strict=False):
        groups = of_source[(of_source.kind == "itae") & (of_source.attenuation == attenuation)]
        _band(axes, groups, measure, color=color, marker=marker, markerfacecolor="none", label=attenuation)
        auto = groups[groups.theta == AUTO]
        if not auto.empty:
            axes.plot(auto.share.iloc[0], auto[measure].mean(), "*", color=color, markeredgecolor="black",
                      markersize=2 * matplotlib.rcParams["lines.markersize"])
    _band(axes, of_source[of_source.kind == "random"], measure, color="0.5", linestyle=":", label="random patches")
    for kind, color, linestyle in [("baseline", "black", "-"), ("oracle", ARTIFACT, "--")]:
        if (scores.kind == kind).any():
            axes.axhline(scores[scores.kind == kind][measure].mean(), color=color, linestyle=linestyle, label=kind)
    title = source if (of_source.theta == AUTO).any() else f"{source}: no θ found"
    axes.set(title=title, xscale="log", xlabel="θ as share of the patches (log; ★ auto)")
    given = of_source[of_source.theta != AUTO].drop_duplicates("share")
    axes.set_xticks(given.share.tolist(), given.theta.tolist())
    axes.xaxis.set_minor_locator(NullLocator())


def _band(axes, rows: pd.DataFrame, measure: str, *, color: str, **style) -> None:
    spread = rows.groupby("share")[measure].agg(["mean", "std"]).fillna(0)
    axes.plot(spread.index, spread["mean"], color=color, **style)
    axes.fill_between(spread.index, spread["mean"] - spread["std"], spread["mean"] + spread["std"], color=color,
                      alpha=0.15, linewidth=0)


def _curves_title(scores: pd.DataFrame, measure: str) -> str:
    means = scores.groupby(["kind", "source", "theta", "attenuation"], dropna=False)[measure].agg(mean)
    baseline = mean(scores[scores.kind == "baseline"][measure])
    auto = scores[(scores.kind == "itae") & (scores.theta == AUTO)]
    against = "" if measure == CHANGE else f"; baseline {baseline:.3f}"
    if auto.empty:
        low, high = means["itae"].min(), means["itae"].max()
        return f"No θ was found; at fixed shares {MEASURES[measure]} is {low:.3f} to {high:.3f}{against}"
    found, sources = auto.groupby(["source", "attenuation"])[measure].agg(mean), list(dict.fromkeys(auto.source))
    control = ", ".join(f"{means['random', source, AUTO].iloc[0]:.3f}" for source in sources)
    return (f"With θ found without labels ({', '.join(sources)}) {MEASURES[measure]} is {found.min():.3f} to "
            f"{found.max():.3f}; with as many random patches {control}{against}")


@styled
def score_overview(scores: pd.DataFrame, title: str) -> Figure:
    """Draw mean ± sd over seeds of every variant, one panel per metric, with the baseline as a line.

    `scores` has columns variant, metrics, and seed if there are several; `title` is the finding in words.
    """
    variants = list(dict.fromkeys(scores.variant))
    metrics = [name for name in MEASURES if name in scores]
    spread_of = ": mean ± standard deviation over its seeds" if "seed" in scores else ""
    caption = f"Scores of each kind of features, clustered by k-means{spread_of}. The dashed line is the baseline."
    figure = ReportFigure(title, caption, height=1.3 + 0.32 * len(variants))
    spread = over_seeds(scores).fillna(0)
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0], metrics, strict=True):
        for place, variant in enumerate(variants):
            value, sd = spread.loc[variant, metric]
            color, marker = (AFTER, "D") if variant == "itae" else (NORMAL, "o")
            axes.errorbar(value, place, xerr=sd, fmt=marker, capsize=3, color=color)
            axes.annotate(f"{value:.3f}", (value, place), (0, 4.5), textcoords="offset points", ha="center",
                          va="bottom", fontsize="small",
                          bbox={"boxstyle": "square,pad=0", "facecolor": "white", "linewidth": 0})
        axes.axvline(spread.loc["baseline", (metric, "mean")], color="black", linestyle="--", linewidth=1)
        axes.set_yticks(range(len(variants)), variants)
        axes.set_xlabel(f"{MEASURES[metric]} (mean ± sd)" if "seed" in scores else MEASURES[metric])
        axes.set_ylim(len(variants) - 0.5, -0.6)
        axes.margins(x=0.15)
    return figure


@styled
def harms(differences: pd.DataFrame, measure: str = "acc") -> Figure:
    """Draw what each step from one edit to another gains, with its 95 % interval.

    `differences` are from `scoring.harm_table`.
    """
    name = MEASURES[measure]
    rows = differences.xs(measure, level="metric")
    clear = ~((rows.low <= 0) & (rows.high >= 0))
    written, stolen = (f"{rows.difference.iloc[place]:+.3f} {name}" if clear.iloc[place] else "no clear difference"
                       for place in (0, 1))
    caption = (f"Gain of {name} from one edit of the attention to the next, with 95 % paired bootstrap intervals over "
               "the images. Substitute replaces what artifacts write and leaves them their attention; mask takes it "
               "away.")
    figure = ReportFigure(f"Undoing what the artifacts' values write: {written}; undoing stolen attention: {stolen}",
                          caption, height=1.4 + 0.42 * len(rows))
    axes = figure.subplots()
    for place, (step, row) in enumerate(rows[::-1].iterrows()):
        axes.plot([row.low, row.high], [place, place], color=AFTER, linewidth=2)
        axes.plot(row.difference, place, "o", color=AFTER, markerfacecolor=AFTER if clear[step] else "white")
    axes.axvline(0, color="black", linestyle="--", linewidth=1)
    axes.set(yticks=range(len(rows)), yticklabels=rows.index[::-1],
             xlabel=f"gain of {name}, with its 95 % interval over images (open: the interval contains 0)")
    axes.margins(y=0.25)
    return figure


@styled
def embeddings(points: Mapping[str, np.ndarray], targets: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw two-dimensional embeddings (n, 2) by variant, side by side, coloured by class."""
    shares = [f"{name} {100 * neighbour_agreement(places, targets):.0f} %" for name, places in points.items()]
    labels, counts, n, present = label_names(classes), np.bincount(targets), len(targets), np.unique(targets)
    chance = (counts * (counts - 1)).sum() / (n * (n - 1))
    title = (f"Share of the same class among the {min(NEIGHBOURS, n - 1)} nearest neighbours: "
             f"{', '.join(shares)} (by chance {100 * chance:.0f} %)")
    caption = ("t-SNE of the [CLS] features, one point per image, one sign per class. Near points are alike; distances "
               "between groups mean little.")
    figure = ReportFigure(title, caption, height=4.6)
    size = 0.4 * matplotlib.rcParams["lines.markersize"] ** 2
    palette = np.array(sns.color_palette("colorblind" if len(classes) <= 10 else "husl", len(classes)))
    for axes, (name, places) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True):
        handles = []
        for label in present:  # every second one is open
            is_open = (label // len(SIGNS) + label) % 2
            handles.append(axes.scatter(*places[targets == label].T, s=size, marker=SIGNS[label % len(SIGNS)],
                                        linewidth=0.7, facecolors="none" if is_open else palette[label],
                                        edgecolors=0.7 * palette[label]))
        axes.set(xticks=[], yticks=[], title=name, box_aspect=1, xlabel="t-SNE 1", ylabel="t-SNE 2")
    if len(classes) <= NAMED_CLASSES:
        named = [labels[label] for label in present]
        figure.legend(handles, named, loc="outside lower center", markerscale=2, handletextpad=0.1,
                      ncols=min(10, LEGEND_SIGNS // (5 + max(map(len, named)))))
    return figure


@styled
def confusions(tables: Mapping[str, pd.DataFrame], classes: Sequence[str]) -> Figure:
    """Draw confusion matrices: the share of each class (row) in each matched cluster (column), in equal colours.

    Args:
        tables: counts from `confusion`, by the variant's name.
        classes: names by class number.
    """
    labels = label_names(classes)
    shares = {name: table.div(table.sum(axis=1), axis=0) for name, table in tables.items()}
    longest = max(map(len, labels)) if len(labels) <= NAMED_CLASSES else 0
    caption = ("Share of each class (row) in each cluster (column), in the run of k-means with the lowest inertia. "
               "Clusters are matched to classes, so the diagonal is right.")
    figure = ReportFigure(_confusions_title(shares, labels), caption, height=5.2 + 0.05 * longest)
    # A single matrix is drawn at half width too. The rows share their names if their order is the same.
    same_rows = len({tuple(table.index) for table in tables.values()}) == 1
    panels = figure.subplots(1, max(2, len(tables)), squeeze=False, sharey=same_rows and len(tables) > 1)[0]
    for axes in panels[len(tables):]:
        axes.set_axis_off()
    for axes, (name, table) in zip(panels, shares.items(), strict=False):
        drawn = axes.imshow(table, cmap=MAP, vmin=0, vmax=1, aspect="auto")  # long names need the height of squares
        matched = min(table.shape)
        axes.set(title=name, xlabel="cluster, by the class it is matched to", ylabel="class")
        if same_rows:
            axes.label_outer()
        if len(table) <= NAMED_CLASSES:
            names = [labels[label] for label in table.index]
            axes.set_yticks(range(len(table)), names)
            axes.set_xticks(range(matched), names[:matched], rotation=90 if longest > 2 else 0)
    figure.colorbar(drawn, ax=panels, label="share of the class", pad=0.01, shrink=0.8)
    return figure


def _confusions_title(shares: Mapping[str, pd.DataFrame], labels: Sequence[str]) -> str:
    worst = []
    for name, table in shares.items():
        wrong = table.to_numpy().copy()
        np.fill_diagonal(wrong, 0)
        row, column = np.unravel_index(wrong.argmax(), wrong.shape)
        into = labels[table.index[column]] if column < min(table.shape) else "an unmatched cluster"
        worst.append(f"{name} {100 * wrong.max():.0f} % of {labels[table.index[row]]} in {into}" if wrong.any()
                     else f"{name} none")
    return f"Largest confusions: {'; '.join(worst)}"


@styled
def class_gains(before: pd.DataFrame, after: pd.DataFrame, classes: Sequence[str]) -> Figure:
    """Draw the change of each class's accuracy, mean ± sd over seeds, sorted; of many classes only both ends.

    Args:
        before: (seeds × classes) accuracies from `class_accuracy`.
        after: the same.
        classes: names by class number.
    """
    labels = label_names(classes)
    change = (after - before).agg(["mean", "std"]).fillna(0).T.sort_values("mean", ascending=False)
    clear = change[change["mean"].abs() > np.maximum(change["std"], SMALL_GAIN)]
    gained, lost = (clear["mean"] > 0).sum(), (clear["mean"] < 0).sum()
    title = (f"Of {len(change)} classes {gained} gain and {lost} lose more than one sd over seeds: from "
             f"{labels[change.index[0]]}, {change['mean'].iloc[0]:+.2f}, to "
             f"{labels[change.index[-1]]}, {change['mean'].iloc[-1]:+.2f}")
    half = NAMED_CLASSES // 2
    shown = change if len(change) <= NAMED_CLASSES else change.iloc[[*range(half), *range(-half, 0)]]
    names = [labels[label] for label in shown.index]
    longest = max(map(len, names))
    caption = ("Change of the share of each class that is in its own cluster, with ITAE minus without: mean over the "
               "seeds of k-means, whiskers of one standard deviation.")
    figure = ReportFigure(title, caption, height=3.4 + 0.06 * longest)
    axes = figure.subplots()
    colors = [NORMAL if mean > 0 else ARTIFACT for mean in shown["mean"]]
    axes.bar(range(len(shown)), shown["mean"], yerr=shown["std"], color=colors, capsize=3)
    rotation = 45 if longest > 3 else 0
    axes.set_xticks(range(len(shown)), names, rotation=rotation, ha="right" if rotation else "center")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(ylabel="change of accuracy", xlabel="class")
    return figure


@styled
def cluster_sheet(sheets: Mapping[int, Sequence[np.ndarray]], sizes: Mapping[int, int], title: str) -> Figure:
    """Draw images of each cluster in a row.

    Args:
        sheets: pictures (H, W, 3) by cluster, at least one each.
        sizes: number of images by cluster.
        title: the finding in words.
    """
    columns = max(map(len, sheets.values()))
    caption = "Images of the largest clusters of k-means, one row per cluster, drawn at random from it."
    figure = ReportFigure(title, caption, height=0.6 + 0.8 * len(sheets) * min(1, 11 / columns))
    grid = figure.subplots(len(sheets), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, (label, pictures) in zip(grid, sheets.items(), strict=True):
        row[0].set_title(f"cluster {label}: {sizes[label]:,} images", fontsize=8, pad=2)
        for axes, image in zip(row, pictures, strict=False):
            axes.imshow(image)
    return figure
