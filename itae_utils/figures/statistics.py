"""Figures of the statistics that identify artifacts, one function each."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from itae_utils.analysis.words import percent, symbol
from itae_utils.extraction.observation import Observation
from itae_utils.figures.style import ARTIFACT, CASED, COLUMNS, HATCH, MAP, NORMAL, PALETTE, ReportFigure, panels, styled
from itae_utils.method.setting import WHERE
from itae_utils.method.thresholds import ThresholdFit

LITERATURE = 150  # the registers paper's cut of DINOv2-g's output norms (arXiv 2309.16588)
LINES = (("black", "-"), (PALETTE[1], "--"), (PALETTE[4], "-."), ("black", ":"))  # of the cuts


@styled
def statistic_distributions(fits: Mapping[str, ThresholdFit], thresholds: Mapping[str, float | None]) -> Figure:
    """Draw the distribution of every source over the patches, with θ if there is one; the log scale shows rare patches.

    Args:
        fits: of the last block, by source.
        thresholds: θ in use, by source.
    """
    caption = ("Distribution of each statistic over the patches of a sample of images, in the last block. The counts "
               "are on a log scale. The dashed line is θ, and the patches beyond it are hatched.")
    figure = ReportFigure(_distributions_title(fits, thresholds), caption,
                          height=0.6 + 2.5 * -(-len(fits) // COLUMNS))
    drawn = panels(figure, len(fits))
    for axes, (source, fit) in zip(drawn, fits.items(), strict=True):
        theta, values = thresholds[source], fit.values.ravel()
        edges = np.histogram_bin_edges(values.astype(np.float64), bins=100)  # float32 has no 100 steps in a small range
        axes.hist(values, edges, color=NORMAL)
        axes.set(xlabel=f"{symbol(source)} in the last block", yscale="log", title=f"{source}: no θ")
        if theta is not None:
            beyond = fit.beyond(theta).ravel()
            axes.hist(values[beyond], edges, color=ARTIFACT, hatch=HATCH)
            if edges[0] <= theta <= edges[-1]:  # a line far outside would squeeze the values
                axes.axvline(theta, color="black", linestyle="--", linewidth=1)
            axes.set_title(f"{source}: θ = {theta:.4g}, {percent(beyond.mean())} {WHERE[fit.side]}")
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter("")
    for axes in drawn[::COLUMNS]:
        axes.set_ylabel("patches (log scale)")
    return figure


def _distributions_title(fits: Mapping[str, ThresholdFit], thresholds: Mapping[str, float | None]) -> str:
    """Return the finding of the fits, and the share of patches beyond each θ that was given."""
    used = {source: theta for source, theta in thresholds.items() if theta is not None}
    found = [source for source, theta in used.items() if not fits[source].is_given(theta)]
    given = [f"{percent(fits[source].beyond(theta).mean())} of the patches lie beyond the θ given for {source}"
             for source, theta in used.items() if source not in found]
    if found:
        finding = f"{len(found)} of {len(fits)} statistics separate artifacts from other patches: {', '.join(found)}"
    elif not all(fit.is_tested for fit in fits.values()):
        finding = "Too few patches to test the statistics for a rare mode"
    else:
        finding = "No statistic has a rare mode where artifacts would be"
    return "; ".join([finding, *given])


@styled
def output_norms(seen: Observation, fit: ThresholdFit) -> Figure:
    """Draw the norms of the patches' tokens after the last block, with the cuts that the literature uses.

    `fit` is the fit of these norms on the high side.
    """
    norms = seen.hidden_norms[:, -1].ravel()
    cuts = {"valley": fit.threshold, "98th percentile": fit.apply("share:2%"), "mean + 3 sd": fit.apply("sd:3"),
            "as for DINOv2-g": float(LITERATURE)}
    shares = {name: percent((norms >= cut).mean()) for name, cut in cuts.items() if cut is not None}
    title = "There is no mode of longer tokens after the last block"
    if not fit.is_tested:
        title = "Too few patches to look for a mode of longer tokens after the last block"
    elif "valley" in shares:
        title = f"A mode of longer tokens holds {shares['valley']} of the patches after the last block"
    caption = ("Distribution of the L2 norm of the patch tokens after the last block, before the final norm, on a log "
               "scale of counts. The lines are cuts used in the literature, with the share of the patches at or above "
               "each.")
    figure = ReportFigure(f"{title}; mean + 3 sd finds {shares['mean + 3 sd']}", caption, height=3.6)
    axes = figure.subplots()
    axes.hist(norms, np.histogram_bin_edges(norms.astype(np.float64), bins=120), color=NORMAL)
    for (name, cut), (color, line) in zip(cuts.items(), LINES, strict=True):
        if name in shares:
            inside = norms.min() <= cut <= norms.max()  # a line far outside would squeeze the norms
            axes.axvline(cut if inside else np.nan, color=color, linestyle=line, linewidth=1, path_effects=CASED,
                         label=f"{name}: {cut:.4g}, {shares[name]} at or above")
    axes.set(xlabel="‖hidden‖₂ of a patch after the last block, before the final norm", ylabel="patches (log scale)",
             yscale="log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter("")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def agreement(jaccard: pd.DataFrame) -> Figure:
    """Draw how far each two sources agree on which patches are artifacts, from `discovery.jaccard_table`.

    Sources that find none have empty rows and columns.
    """
    found = [name for name in jaccard if jaccard.loc[name, name] == 1]
    shown = jaccard.loc[found, found].reindex(index=jaccard.index, columns=jaccard.columns)
    caption = ("Agreement of each two statistics on which patches are artifacts: the patches that both find, as a "
               "share of those that either finds. The cells of statistics without θ are empty.")
    figure = ReportFigure(_agreement_title(jaccard.loc[found, found]), caption, height=0.9 + 0.45 * len(jaccard))
    axes = figure.subplots()
    axes.set_facecolor("0.9")
    sns.heatmap(shown, vmin=0, vmax=1, cmap=MAP, annot=True, fmt=".3f", linewidths=1, ax=axes,
                cbar_kws={"label": "Jaccard index", "pad": 0.01})
    axes.set(title="patches that both call artifacts ÷ patches that either does (empty: no artifacts found)", xlabel="",
             ylabel="")
    axes.tick_params(length=0)
    axes.set_yticklabels(jaccard.index, rotation=0)
    return figure


def _agreement_title(jaccard: pd.DataFrame) -> str:
    """Return which two of the sources that find artifacts agree most."""
    if len(jaccard) < 2:
        who = f"Only {jaccard.index[0]}" if len(jaccard) else "No statistic"
        return f"{who} finds artifacts, so there is no agreement to measure"
    pairs = {(one, other): jaccard.loc[one, other] for one, other in combinations(jaccard, 2)}
    one, other = max(pairs, key=pairs.get)
    return f"{len(jaccard)} statistics find artifacts; {one} and {other} agree most (Jaccard {pairs[one, other]:.3f})"


@styled
def value_norms(seen: Observation) -> Figure:
    """Draw per head how long the values of artifacts are, as a multiple of those of other patches."""
    artifacts, others = np.ma.masked_invalid(seen.value_norms).mean(axis=0).T  # an image may lack one of the groups
    ratios = (artifacts / others).filled(np.nan)
    heads, known = np.arange(1, len(ratios) + 1), ratios[np.isfinite(ratios)]
    title = "Values of artifacts and of other patches can't be compared"
    if known.size:
        title = (f"Values of artifacts are {known.min():.2g} to {known.max():.2g} × as long as those of other "
                 f"patches; shorter in {np.count_nonzero(known < 1)} of {len(ratios)} heads")
    caption = ("Mean length of the values of artifacts as a multiple of that of other patches, per head of the last "
               "block. The dashed line is equal length.")
    figure = ReportFigure(title, caption, height=3, narrow=True)
    axes = figure.subplots()
    axes.bar(heads, ratios, color=ARTIFACT, width=min(0.6, 0.08 * len(heads)))
    axes.axhline(1, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="head of the last block", ylabel="‖V‖ artifacts ÷ ‖V‖ others", xlim=(0.4, len(heads) + 0.6))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    return figure
