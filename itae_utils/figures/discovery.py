"""Figures of patches and attention, one function each.

A figure's title states its finding. No function touches pyplot's state: figures work headless and in notebooks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter, ScalarFormatter

from itae_utils.analysis.inspection import InspectedImage
from itae_utils.analysis.words import percent, symbol
from itae_utils.extraction.observation import Observation
from itae_utils.figures.names import label_names
from itae_utils.figures.style import AFTER, ARTIFACT, HATCH, MAP, NORMAL, PALETTE, WIDTH, ReportFigure, outline, styled

OVERLAY = ListedColormap([PALETTE[8]])  # yellow, which everybody can tell from grey
SHORTEST_ROW, TALLEST_ROW = 0.3, 2.0  # height over width of a row of `inspection`; longer images are drawn smaller


@styled
def hidden_norms(seen: Observation) -> Figure:
    """Draw the norm of artifacts and of other patch tokens after each block: median, 1–99 % band, and longest."""
    blocks = np.arange(1, seen.hidden_norms.shape[1] + 1)
    groups = [(label, color, seen.hidden_norms.transpose(0, 2, 1)[mask])
              for label, color, mask in _groups(seen.artifacts) if mask.any()]
    caption = ("L2 norm of the patch tokens after each block, before the final norm: the median, the band from 1 to "
               "99 % of the patches, and the longest token. Artifacts are the patches beyond θ in the last block.")
    figure = ReportFigure(_hidden_norms_title(seen), caption, height=4.2)
    axes = figure.subplots()
    for (label, color, norms), marker, hatch in zip(groups, "os", ("", HATCH), strict=False):
        low, median, high = np.quantile(norms, [0.01, 0.5, 0.99], axis=0)
        axes.plot(blocks, median, color=color, marker=marker, label=f"{label}, median")
        axes.fill_between(blocks, low, high, color=color, alpha=0.2, linewidth=0, hatch=hatch, label="1 to 99 %")
        axes.plot(blocks, norms.max(axis=0), color=color, marker=marker, markersize=3, linestyle=":", label="longest")
    axes.set(xlabel="after block", ylabel="‖hidden‖₂ of a patch (log scale)", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter("")
    figure.legend(loc="outside right center")
    return figure


def _groups(artifacts: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    share = artifacts.mean()
    others = f"other patches ({percent(1 - share)})" if share else "all patches"
    return [(others, NORMAL, ~artifacts), (f"artifacts ({percent(share)})", ARTIFACT, artifacts)]


def _hidden_norms_title(seen: Observation) -> str:
    norms = seen.hidden_norms.transpose(0, 2, 1)
    if not seen.artifacts.any() or seen.artifacts.all():
        peak = norms.max(axis=(0, 1)) / np.median(norms, axis=(0, 1))
        block = int(peak.argmax())
        return f"The longest patch token is {peak[block]:.3g} × the median of its block (after block {block + 1})"
    ratio = np.median(norms[seen.artifacts], axis=0) / np.median(norms[~seen.artifacts], axis=0)
    block = int(ratio.argmax())
    if ratio[block] < 1.5:
        return f"Artifacts are not longer than other patches: at most {ratio[block]:.2f} × (after block {block + 1})"
    return f"Artifacts stand out most after block {block + 1}: {ratio[block]:.3g} × as long as other patches"


@styled
def attention_examples(
    pictures: Sequence[np.ndarray], before: np.ndarray, after: np.ndarray, artifacts: np.ndarray
) -> Figure:
    """Draw images and the `[CLS]` attention on their patches before and after, beside the images and laid over them.

    Artifacts are outlined. Over an image, each map is drawn on a scale of its own.

    Args:
        pictures: n images (H, W, 3) in [0, 1].
        before: (n, rows, columns) attention weights.
        after: the same after ITAE; it is drawn only if there are artifacts.
        artifacts: (n, rows, columns) bool.
    """
    maps = {"before": before, "after": after} if artifacts.any() else {"attention": before}
    shares = [percent((weights * artifacts).sum(axis=(1, 2)).mean()) for weights in maps.values()]
    title = (f"In these images artifacts draw {shares[0]} of the [CLS] attention, and {shares[1]} after ITAE"
             if artifacts.any() else "No patch of these images is an artifact: ITAE does not change their attention")
    caption = ("Attention of [CLS] in the last block, mean over the heads, on one scale of square roots for all maps. "
               "Artifacts are framed. Over an image each map has a scale of its own: yellow is its largest weight.")
    figure = ReportFigure(title, caption,
                          height=1.1 + (1 + 2 * len(maps)) * min(1.3, 0.96 * WIDTH / len(pictures)))
    grid = figure.subplots(1 + 2 * len(maps), len(pictures), squeeze=False)
    brightest = max(weights.max() for weights in maps.values())
    for column, picture, mask, *weights in zip(grid.T, pictures, artifacts, *maps.values(), strict=True):
        _on_grid(column[0], picture, mask.shape)
        for axes, weight in zip(column[1:], weights, strict=False):
            drawn = _on_grid(axes, weight, mask.shape, cmap=MAP, norm=PowerNorm(0.5, 0, brightest))
        for axes, weight in zip(column[1 + len(maps):], weights, strict=True):
            _lay_over(axes, picture, weight)
        for axes in column:
            outline(axes, mask)
    for row, label in zip(grid, ["image", *maps, *(f"{name}\nover image" for name in maps)], strict=True):
        row[0].set_ylabel(label)
    figure.colorbar(drawn, ax=grid, label="attention weight", location="bottom", shrink=0.4, aspect=40, pad=0.01,
                    ticks=MaxNLocator(5))
    return figure


def _on_grid(axes: Axes, values: np.ndarray, patch_grid: tuple[int, int], **style: object) -> AxesImage:
    """Draw a picture or a map so that the unit of both axes is the patch."""
    rows, columns = patch_grid
    return axes.imshow(values, extent=(0, columns, rows, 0), **style)


def _lay_over(axes: Axes, picture: np.ndarray, weights: np.ndarray) -> None:
    """Draw a picture in dark grey under its attention in yellow, which is opaque at this map's own maximum."""
    _on_grid(axes, 0.5 * picture.mean(axis=2), weights.shape, cmap="gray", vmin=0, vmax=1)
    opaque = weights / max(weights.max(), np.finfo(np.float32).tiny)
    _on_grid(axes, np.ones_like(weights), weights.shape, cmap=OVERLAY, vmin=0, vmax=1, alpha=opaque)


@styled
def artifact_positions(artifacts: np.ndarray, patch_grid: tuple[int, int]) -> Figure:
    """Draw how often each place of the patch grid holds an artifact, and how many of these (n, N) an image has."""
    frequency, counts = artifacts.mean(axis=0), artifacts.sum(axis=1)
    ordered = np.sort(frequency)[::-1].cumsum()
    places = int(np.searchsorted(ordered, 0.9 * ordered[-1]) + 1)
    title = (f"{places} of {frequency.size} places hold 90 % of the artifacts; "
             f"an image has {counts.mean():.2g} of them ({counts.min()} to {counts.max()})")
    caption = ("Left: the share of images in which each place of the patch grid holds an artifact. Right: how many "
               "images have so many artifacts.")
    figure = ReportFigure(title, caption, height=3.8)
    where, how_many = figure.subplots(1, 2)
    drawn = where.imshow(frequency.reshape(patch_grid), cmap=MAP, vmin=0)
    where.set(xlabel="patch column", ylabel="patch row")
    for axis in (where.xaxis, where.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    figure.colorbar(drawn, ax=where, label="images with an artifact here", format=PercentFormatter(1, symbol=" %"))
    sns.histplot(counts, discrete=np.ptp(counts) < 40, ax=how_many, color=ARTIFACT, edgecolor="white", alpha=1)
    how_many.set(xlabel="artifacts in an image", ylabel="images")
    how_many.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@styled
def attention_shares(seen: Observation) -> Figure:
    """Draw the share of an image's `[CLS]` attention on its artifacts, before and after, for images that have any."""
    have_any = seen.artifacts.any(axis=1)
    patches = seen.artifacts[have_any].mean()
    shares = {name: (weights * seen.artifacts)[have_any].sum(axis=1)
              for name, weights in [("before", seen.attention), ("after", seen.attention_after)]}
    before, after = (percent(share.mean()) for share in shares.values())
    subject = ("Artifacts" if have_any.all()
               else f"In the {have_any.sum():,} of {len(have_any):,} images with artifacts, these")
    caption = ("Share of the [CLS] attention of an image, in the last block, that lies on its artifacts, before and "
               "after ITAE. The dashed line is their share of the patches: attention that ignores artifacts lies "
               "there.")
    figure = ReportFigure(f"{subject} are {percent(patches)} of the patches and draw {before} of the [CLS] attention; "
                          f"after ITAE {after}", caption, height=3.4, narrow=True)
    axes = figure.subplots()
    for (name, share), color, hatch in zip(shares.items(), (ARTIFACT, AFTER), (HATCH, ""), strict=True):
        axes.hist(share, np.linspace(0, 1, 51), color=color, alpha=0.8, hatch=hatch, label=f"{name} ITAE")
    axes.axvline(patches, color="black", linestyle="--", linewidth=1, label="their share of the patches")
    axes.set(xlabel="share of an image's [CLS] attention that lies on its artifacts", xlim=(0, 1),
             ylabel=f"images, of {have_any.sum():,} with artifacts")
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.legend(loc="upper center")
    return figure


@styled
def inspection(images: Sequence[InspectedImage], source: str, block: int, title: str) -> Figure:
    """Draw one row per image: the image, its maps, its attention before and, with θ, after, and this over the image.

    Artifacts are outlined. Each column has one colour scale; the columns of attention share theirs. `title` is the
    finding in words; the other arguments are those of `Inspection`.
    """
    labels = label_names([image.name for image in images])
    columns = {f"‖hidden‖₂ after block {block}": [image.hidden for image in images]}
    if source != "attention":  # it has a column of its own
        columns[f"{symbol(source)}\nin the last block"] = [image.statistic for image in images]
    attention = {"[CLS] attention": [image.before for image in images]}
    if images[0].after is not None:
        attention["… after ITAE"] = [image.after for image in images]
    columns |= attention
    *_, over = columns  # the attention in the last column is laid over the image, too
    heights = [min(max(image.hidden.shape[0] / image.hidden.shape[1], SHORTEST_ROW), TALLEST_ROW) for image in images]
    column_width = (WIDTH - 0.5) / (2 + len(columns))
    caption = ("Norms, statistic and [CLS] attention, the latter on a scale of square roots, of each image on its "
               "patches. Artifacts are framed.")
    figure = ReportFigure(title, caption, height=1.2 + column_width * sum(heights))
    *grid, scales = figure.subplots(len(images) + 1, 2 + len(columns), height_ratios=[*heights, 0.06])
    for scale in scales[[0, -1]]:
        scale.set_axis_off()
    brightest = max(values.max() for maps in attention.values() for values in maps)
    for row, image, label, weights in zip(grid, images, labels, columns[over], strict=True):
        _on_grid(row[0], image.picture, image.hidden.shape)
        row[0].set_title(label, fontsize=7.5)
        _lay_over(row[-1], image.picture, weights)
    grid[0][-1].set_title("this over the image", fontsize=9)
    for column, scale, (name, maps) in zip(np.transpose(grid)[1:-1], scales[1:-1], columns.items(), strict=True):
        high, power = (brightest, 0.5) if name in attention else (max(values.max() for values in maps), 1)
        for axes, values in zip(column, maps, strict=True):
            drawn = _on_grid(axes, values, values.shape, cmap=MAP, norm=PowerNorm(power, 0, high))
        column[0].set_title(name, fontsize=9)
        figure.colorbar(drawn, cax=scale, orientation="horizontal")
    for row, image in zip(grid, images, strict=True):
        for axes in row:
            outline(axes, image.artifacts)
    return figure
