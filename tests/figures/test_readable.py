"""Every figure can be read on a grey page, and no text of it is clipped or lies on another, on screen and paper."""

from itertools import combinations, pairwise

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.text import Text

from itae_utils import figures
from itae_utils.analysis.discovery import jaccard_table
from itae_utils.analysis.metrics import confusion
from itae_utils.figures.comparison import published_and_measured
from itae_utils.figures.style import ARTIFACT, MAP, ReportFigure
from itae_utils.method.setting import ATTENUATIONS, SIDES, SOURCES
from itae_utils.method.thresholds import fit_threshold
from tests.figures import test_discovery as discovery
from tests.figures import test_remedies as remedies
from tests.figures import test_scores as scores
from tests.figures import test_statistics as statistics
from tests.made_results import pairing_of

pytestmark = pytest.mark.filterwarnings("error::UserWarning")
VARIANTS = ["raw_pixels", "untrained", "baseline", "random_control", "itae", "oracle", "demo_clean"]
LONG = [f"{word}_with_a_long_name_of_a_class" for word in ("one", "two", "three", "four", "five", "six", "seven")]


def distributions(seen, folder):
    fits = {source: fit_threshold(statistics.two_modes(source), side=side, source=source)
            for source, side in SIDES.items()}
    return figures.statistic_distributions(fits, {name: fit.threshold for name, fit in fits.items()} | {"value": 2000})


def embeddings(classes, count):
    targets = np.arange(200) % len(classes)
    points = np.random.default_rng(0).normal(size=(200, 2)) + 5 * targets[:, None]
    return figures.embeddings({f"variant {place}": points for place in range(count)}, targets, classes)


def confusions(classes):
    targets = np.arange(200) % len(classes)
    table = confusion(targets, np.roll(targets, 1))
    return figures.confusions({"baseline": table, "itae": table}, classes)


def gains(classes):
    change = pd.DataFrame(np.linspace(-0.5, 0.5, 2 * len(classes)).reshape(2, -1))
    return figures.class_gains(change * 0, change, classes)


def harms(*acc):
    steps = ["what the values write\nbaseline → substitute", "stolen attention\nsubstitute → mask",
             "the same, if it is spread evenly\nsubstitute → spread", "both\nbaseline → mask"]
    return figures.harms(scores.steps(**dict(zip(steps, acc * 2, strict=True))))


def maps_of_remedies(names, planted):
    artifacts = np.zeros((4, 4, 5), dtype=bool)
    artifacts[:, 1, 2] = True
    weights = np.random.default_rng(0).uniform(0, 0.9, (4, 4, 5))
    return figures.remedy_maps([np.zeros((16, 20, 3))] * 4, dict.fromkeys(names, weights), artifacts, planted=planted)


def without(seen):
    seen.artifacts[:] = False
    return seen


KINDS = {
    "statistic_distributions": distributions,
    "output_norms": lambda seen, _: figures.output_norms(*statistics.outputs(seen, statistics.two_modes("token"))),
    "output_norms, no mode": lambda seen, _: figures.output_norms(*statistics.outputs(seen, statistics.one_mode())),
    "agreement": lambda seen, _: figures.agreement(jaccard_table(statistics.masks(
        query=(), key=range(8), value=range(3), token=range(1, 8), direction=range(2), attention=range(20, 30)))),
    "value_norms": lambda seen, _: figures.value_norms(seen),
    "hidden_norms": lambda seen, _: figures.hidden_norms(seen),
    "hidden_norms, no artifacts": lambda seen, _: figures.hidden_norms(without(seen)),
    "attention_examples": lambda seen, _: discovery.examples(seen),
    "artifact_positions": lambda seen, _: figures.artifact_positions(seen.artifacts, discovery.GRID),
    "attention_shares": lambda seen, _: figures.attention_shares(seen),
    "inspection": lambda seen, _: figures.inspection(
        [discovery.inspected(4, 5), discovery.inspected(7, 3)], "key", 12, "two images, and a title of some length"),
    "ablation_heatmaps": lambda seen, _: figures.ablation_heatmaps(scores.ablation(), "acc"),
    "ablation_heatmaps, all": lambda seen, _: figures.ablation_heatmaps(
        scores.ablation(sources=SOURCES, attenuations=ATTENUATIONS), "acc"),
    "ablation_curves": lambda seen, _: figures.ablation_curves(scores.ablation(), "acc"),
    "ablation_curves, all": lambda seen, _: figures.ablation_curves(
        scores.ablation(sources=SOURCES, attenuations=ATTENUATIONS), "acc"),
    "harms": lambda seen, _: harms((0.12, 0.1, 0.15), (0.05, 0.01, 0.1)),
    "harms, unclear": lambda seen, _: harms((0.12, -0.1, 0.15), (0.05, -0.01, 0.1)),
    "score_overview": lambda seen, _: figures.score_overview(
        scores.scores(**{name: 0.1 + 0.05 * place for place, name in enumerate(VARIANTS)}), "ACC 0.658 before"),
    "embeddings": lambda seen, _: embeddings(scores.DIGITS, 3),
    "embeddings, long names": lambda seen, _: embeddings(LONG, 2),
    "confusions": lambda seen, _: confusions(scores.DIGITS),
    "confusions, long names": lambda seen, _: confusions(LONG),
    "class_gains": lambda seen, _: gains(scores.DIGITS),
    "class_gains, long names": lambda seen, _: gains(LONG),
    "cluster_sheet": lambda seen, _: figures.cluster_sheet(
        {name: [np.zeros((8, 8, 3))] * 10 for name in range(3)}, dict.fromkeys(range(3), 12345), "three clusters"),
    "score_against_cost": lambda seen, _: figures.score_against_cost(
        remedies.scores(*[0.1] * len(remedies.NAMES)), remedies.REMEDIES),
    "remedy_maps": lambda seen, _: maps_of_remedies(
        ["baseline", "itae", "registers", "late registers", "register bias", "neurons zeroed", "registers and itae",
         "no patches"], planted=True),
    "remedy_maps, many": lambda seen, _: maps_of_remedies(["baseline", *remedies.NAMES], planted=False),
    "published_and_measured": lambda seen, folder: published_and_measured(
        [pairing_of(folder / name, name, "cifar10") for name in ("demo", "dinov2_vitb14")]),
}
IN_NO_REPORT = "inspection"  # drawn by the command alone, for a screen


@pytest.fixture(params=["screen", "paper"])
def form(request):
    figures.use_format(request.param)
    yield request.param
    figures.use_format("screen")


@pytest.fixture
def drawn(seen, tmp_path):
    return lambda kind: KINDS[kind](seen, tmp_path)


def texts_in(figure, monkeypatch):
    """Draw a figure, and return what it writes with the extents of the letters."""
    written, draw = [], Text.draw
    monkeypatch.setattr(Text, "draw", lambda text, *rest: (written.append(text), draw(text, *rest)))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    written.clear()  # constrained layout has moved them
    canvas.draw()
    return {text: text.get_window_extent(canvas.get_renderer()) for text in dict.fromkeys(written)
            if text.get_text().strip() and text.get_visible()}


def problems(figure, monkeypatch):
    """Return the texts that are not inside a figure, and the pairs that overlap by more than a pixel or two."""
    boxes = texts_in(figure, monkeypatch)
    assert boxes
    outside = [text.get_text() for text, box in boxes.items()
               if min(box.x0, box.y0) < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1]
    upright = [text for text in boxes if text.get_rotation() % 90 == 0]  # boxes of others are larger than their letters
    met = [(one.get_text(), other.get_text()) for one, other in combinations(upright, 2)
           if boxes[one].padded(-1).overlaps(boxes[other].padded(-1))]
    return outside, met


def test_problems_are_found(monkeypatch):
    figure = ReportFigure("a title", "", height=3)
    figure.text(0.95, 0.5, "too far right")
    figure.text(0.02, 0.97, "over the title", va="top")
    assert problems(figure, monkeypatch) == (["too far right"], [("a title", "over the title")])


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_inside_and_apart(kind, form, drawn, monkeypatch):
    if form == "paper" and kind == IN_NO_REPORT:
        return
    assert problems(drawn(kind), monkeypatch) == ([], [])


@pytest.mark.parametrize("kind", KINDS)
def test_titles_have_one_line_or_two_that_break_after_a_clause(kind, drawn):
    lines = drawn(kind).get_suptitle().splitlines()
    assert len(lines) in (1, 2)
    assert len(lines) == 1 or lines[0][-1] in ";:,"


@pytest.mark.parametrize(("title", "lines"), [
    ("short; it stays", ["short; it stays"]),
    ("a " * 50 + "b; " + "c " * 30 + "d", ["a " * 50 + "b;", "c " * 30 + "d"]),
    ("a " * 40 + "b: " + "c, " * 20 + "d", ["a " * 40 + "b:", "c, " * 20 + "d"]),
    ("word " * 23 + "end", ["word " * 11 + "word", "word " * 11 + "end"]),
])
def test_a_long_title_breaks_where_it_reads_best(title, lines):
    assert ReportFigure(title, "", height=3).get_suptitle().split("\n") == lines


def test_a_title_of_any_length_stays_inside():
    figure = ReportFigure("an endless title " * 30, "", height=5)
    assert figure.get_suptitle().count("\n") > 1
    figure.draw_without_rendering()
    assert figure.get_tightbbox().x1 <= figure.get_figwidth()


@pytest.mark.parametrize("kind", KINDS)
def test_lines_are_told_apart_by_marker_and_line_style(kind, form, drawn):
    for axes in drawn(kind).axes:
        named = {line.get_label(): (line.get_marker(), line.get_linestyle()) for line in axes.lines
                 if not line.get_label().startswith("_")}
        named |= {bars.get_label(): (bars.lines[0].get_marker(), bars.lines[0].get_linestyle())
                  for bars in axes.containers if bars.get_label()[0] != "_" and hasattr(bars, "has_xerr")}
        assert len({*named.values()}) == len(named)


def test_both_groups_of_norms_have_lines_and_bands_of_their_own(drawn, form):
    axes = drawn("hidden_norms").axes[0]
    assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines}) == len(axes.lines) == 4
    assert len({band.get_hatch() for band in axes.collections}) == len(axes.collections) == 2


@pytest.mark.parametrize(("kind", "panel"), [("statistic_distributions", 1), ("attention_shares", 0)])
def test_bars_of_two_colours_differ_by_hatch(kind, panel, drawn, form):
    series = [bars for bars in drawn(kind).axes[panel].containers]
    assert len({bars[0].get_facecolor() for bars in series}) == len({bars[0].get_hatch() for bars in series}) == 2


def test_bars_of_losses_lie_below_those_of_gains(drawn, form):
    """They need no hatch."""
    bars = drawn("class_gains").axes[0].patches
    assert {(bar.get_height() < 0, matplotlib.colors.same_color(bar.get_facecolor(), ARTIFACT)) for bar in bars} == {
        (True, True), (False, False)}


@pytest.mark.parametrize("count", [2, 10, 20])
def test_points_of_each_class_have_a_sign_of_their_own(count, form):
    axes = embeddings([f"c{place}" for place in range(count)], 1).axes[0]
    points = [each for each in axes.collections if isinstance(each, PathCollection)]
    signs = {(each.get_paths()[0].vertices.tobytes(), len(each.get_facecolor()) > 0) for each in points}
    assert len(signs) == len(points) == count


def lightness(color):
    """Return CIE L* of sRGB values in [0, 1]."""
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(luminance > 216 / 24389, 116 * np.cbrt(luminance) - 16, luminance * 24389 / 27)


@pytest.mark.parametrize("kind", KINDS)
def test_colour_maps_rise_in_lightness(kind, drawn):
    images = [image for axes in drawn(kind).axes for image in [*axes.get_images(), *axes.collections]
              if image.get_array() is not None and np.ndim(image.get_array()) < 3]
    for name in {image.get_cmap().name for image in images if image.get_cmap().N > 1}:  # one colour is an overlay
        levels = lightness(matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3])
        assert all(low < high for low, high in pairwise(levels)), name
        assert np.ptp(levels) > 75
        assert name in (MAP, "gray")


def frames(figure):
    return [patch for axes in figure.axes if axes.get_images() for patch in axes.patches]


@pytest.mark.parametrize("planted", [False, True])
def test_frames_of_true_artifacts_are_dashed(planted):
    figure = maps_of_remedies(["baseline", "itae"], planted)
    assert {frame.get_linestyle() != "-" for frame in frames(figure)} == {planted}
    assert ("dashed" in figure.caption) == planted


def test_frames_are_seen_on_dark_and_light_patches(drawn):
    """A white line lies below the coloured one."""
    for frame in frames(drawn("attention_examples")):
        assert frame.get_linestyle() in ("-", "solid")
        assert frame.get_path_effects()
