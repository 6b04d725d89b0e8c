from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import same_color

from itae_utils import figures
from itae_utils.analysis.discovery import jaccard_table
from itae_utils.analysis.words import percent
from itae_utils.figures.style import ARTIFACT, NORMAL
from itae_utils.method.setting import SIDES, SOURCES
from itae_utils.method.thresholds import fit_threshold
from tests.drawn import assert_nothing_is_clipped, title
from tests.figures.conftest import HEADS

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")  # a page would show them
BULK, RARE = 5000, 300


def two_modes(source):
    """Return a bulk and 5.7 % of the patches on the side where the source has its artifacts."""
    rng = np.random.default_rng(0)
    if source in ("direction", "attention"):
        return np.concatenate([rng.normal(0.1, 0.01, BULK), rng.normal(0.8, 0.01, RARE)])
    return np.concatenate([rng.normal(8, 0.5, BULK), rng.normal(1 if SIDES[source] == "low" else 60, 0.05, RARE)])


def one_mode(scale=1.0):
    return scale * np.random.default_rng(0).normal(8, 0.5, BULK + RARE)


@pytest.fixture
def fits():
    return {"query": fit_threshold(one_mode()), "key": fit_threshold(two_modes("key"))}


@pytest.fixture
def six():
    return {source: fit_threshold(two_modes(source), side=side, source=source) for source, side in SIDES.items()}


def found_by(fits):
    return {source: fit.threshold for source, fit in fits.items()}


def bars(axes, color):
    """Return left edge, right edge and height of the bars of a colour."""
    return [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for container in axes.containers
            for bar in container if same_color(bar.get_facecolor(), color) and bar.get_height()]


def test_each_statistic_has_a_panel_with_its_artifacts_coloured_on_their_side(six):
    figure = figures.statistic_distributions(six, found_by(six))
    assert_nothing_is_clipped(figure)
    assert len(figure.axes) == len(SOURCES) == 6
    for axes, (source, fit) in zip(figure.axes, six.items(), strict=True):
        coloured = bars(axes, ARTIFACT)
        assert sum(height for *_, height in coloured) == RARE
        assert sum(height for *_, height in bars(axes, NORMAL)) == BULK + RARE
        if SIDES[source] == "low":
            assert max(left for left, *_ in coloured) < fit.threshold
        else:
            assert min(right for _, right, _ in coloured) > fit.threshold
        assert [line.get_xdata()[0] for line in axes.lines] == [fit.threshold]
        where = "below" if SIDES[source] == "low" else "above"
        assert axes.get_title(loc="left") == f"{source}: θ = {fit.threshold:.4g}, 5.7 % at or {where}"
    assert title(figure).startswith("6 of 6 statistics")


def test_places_without_a_statistic_are_empty(six):
    del six["direction"], six["query"]
    figure = figures.statistic_distributions(six, found_by(six))
    assert [axes.axison for axes in figure.axes] == [True] * 4 + [False] * 2
    assert [bool(axes.get_ylabel()) for axes in figure.axes] == [True, False, False, True, False, False]
    assert_nothing_is_clipped(figure)


def test_a_statistic_without_theta_has_no_line(fits):
    figure = figures.statistic_distributions(fits, found_by(fits))
    assert title(figure).startswith("1 of 2 statistics")
    assert title(figure).endswith(": key")
    query, key = figure.axes
    assert query.get_title(loc="left") == "query: no θ"
    assert [len(axes.lines) for axes in (query, key)] == [0, 1]
    assert not bars(query, ARTIFACT)


def test_distributions_without_any_theta_say_so(fits):
    assert "No statistic" in title(figures.statistic_distributions(fits, dict.fromkeys(fits)))
    few = dict.fromkeys(fits, fit_threshold(np.arange(1.0, 1000.0)))
    assert "Too few patches" in title(figures.statistic_distributions(few, dict.fromkeys(fits)))


@pytest.mark.parametrize(("theta", "share"), [(1000.0, "100 %"), (1e-4, "0 %")])
def test_a_given_theta_claims_nothing_and_keeps_to_the_values(fits, theta, share):
    fitted = figures.statistic_distributions(fits, {"query": None, "key": None})
    figure = figures.statistic_distributions(fits, {"query": None, "key": theta})
    assert title(figure).startswith(f"{title(fitted)}; {share} of the patches")
    assert figure.axes[1].get_xlim() == pytest.approx(fitted.axes[1].get_xlim())


def test_norms_that_differ_by_rounding_are_drawn():
    norms = np.float32(30) + np.spacing(np.float32(30)) * np.arange(3, dtype=np.float32).repeat(1000)
    figure = figures.statistic_distributions({"key": fit_threshold(norms)}, {"key": None})
    assert_nothing_is_clipped(figure)


def outputs(seen, norms):
    """Return an observation with these norms after the last block, and their fit."""
    hidden = np.ones((1, 2, norms.size))
    hidden[0, -1] = norms
    return replace(seen, hidden_norms=hidden), fit_threshold(hidden[:, -1], side="high", source="token")


def cuts_of(norms, fit):
    """Return the cuts of the literature and of the fit."""
    away = 3 * np.sqrt(np.mean((norms - norms.mean()) ** 2))
    cuts = [] if fit.threshold is None else [fit.threshold]
    return [*cuts, np.quantile(norms, 0.98), norms.mean() + away, 150]


@pytest.mark.parametrize("norms", [two_modes("token"), 4 * two_modes("token"), one_mode()])
def test_output_norms_have_a_line_at_every_cut_inside_and_the_share_of_all(seen, norms):
    norms = norms.astype(np.float32)
    figure = figures.output_norms(*outputs(seen, norms))
    cuts = cuts_of(norms, outputs(seen, norms)[1])
    drawn = [line.get_xdata()[0] for line in figure.axes[0].lines]
    inside = [cut for cut in cuts if norms.min() <= cut <= norms.max()]
    assert 150 not in cuts[:-1]
    assert (150 in inside) == (norms.max() > 150)
    np.testing.assert_allclose([x for x in drawn if np.isfinite(x)], inside, rtol=1e-6)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(cuts)
    for label, cut in zip(labels, cuts, strict=True):
        share = sum(value >= cut for value in norms.tolist()) / norms.size
        assert label.endswith(f": {cut:.4g}, {percent(share)} at or above")
    assert_nothing_is_clipped(figure)


def test_output_norms_stay_within_the_norms(seen):
    """No norm reaches 150, the cut of another model."""
    norms = one_mode()
    axes = figures.output_norms(*outputs(seen, norms)).axes[0]
    assert norms.min() - 1 < axes.get_xlim()[0] < norms.min()
    assert norms.max() < axes.get_xlim()[1] < norms.max() + 1
    assert sum(height for *_, height in bars(axes, NORMAL)) == norms.size


def test_output_norms_name_the_mode_of_longer_tokens(seen):
    with_mode = title(figures.output_norms(*outputs(seen, two_modes("token"))))
    assert with_mode.startswith("A mode of longer tokens holds 5.7 %")
    assert with_mode.endswith("finds 5.7 %")
    assert "There is no mode" in title(figures.output_norms(*outputs(seen, one_mode())))
    assert "Too few" in title(figures.output_norms(*outputs(seen, one_mode()[:500])))


def test_each_cut_keeps_its_colour_whether_or_not_there_is_a_valley(seen):
    with_valley, without = (
        {line.get_label().partition(":")[0]: (line.get_color(), line.get_linestyle())
         for line in figures.output_norms(*outputs(seen, norms)).axes[0].lines}
        for norms in (two_modes("token"), one_mode()))
    assert set(with_valley) - set(without) == {"valley"}
    assert without == {name: style for name, style in with_valley.items() if name != "valley"}
    assert len({style for _, style in with_valley.values()}) == len(with_valley), "told apart without colours"


def masks(**places):
    """Return a mask of 30 patches by name, true at these places."""
    return {name: np.isin(np.arange(30), list(chosen)).reshape(3, 10) for name, chosen in places.items()}


def test_agreement_names_the_pair_that_agrees_most():
    found = masks(query=(), key=range(8), token=range(1, 8), direction=range(2), attention=range(20, 30))
    figure = figures.agreement(jaccard_table(found))
    assert title(figure).startswith("4 statistics find artifacts; key and token agree most")
    assert title(figure).endswith(f"{7 / 8:.3f})")
    heat = figure.axes[0]
    assert [label.get_text() for label in heat.get_xticklabels()] == list(found)
    assert [label.get_text() for label in heat.get_yticklabels()] == list(found)
    numbers = [text.get_text() for text in heat.texts]
    assert numbers.count("1.000") == 4
    assert numbers.count("0.875") == 2
    assert len(numbers) == 4 * 4, "the query has nothing to agree on"
    assert_nothing_is_clipped(figure)


@pytest.mark.parametrize(("found", "start"), [
    ({"key": (1, 2), "token": ()}, "Only key finds"), ({"key": (), "token": ()}, "No statistic finds")])
def test_agreement_of_fewer_than_two_finders(found, start):
    figure = figures.agreement(jaccard_table(masks(**found)))
    assert title(figure).startswith(start)
    assert_nothing_is_clipped(figure)


def test_finders_that_share_no_patch_agree_by_0():
    figure = figures.agreement(jaccard_table(masks(key=(1, 2), token=(3,))))
    assert title(figure).endswith("(Jaccard 0.000)")


def heights(figure):
    return [bar.get_height() for bar in figure.axes[0].containers[0]]


def test_value_norms_draw_the_ratio_of_the_means_per_head(seen):
    """Images that lack one of the two groups do not count in its mean."""
    seen.value_norms[:5, :, 0] = np.nan
    seen.value_norms[7, :, 1] = np.nan
    seen.value_norms[:, 1, 0] /= 10
    figure = figures.value_norms(seen)
    expected = []
    for head in range(HEADS):
        means = []
        for group in range(2):
            column = [value for value in seen.value_norms[:, head, group].tolist() if value == value]
            means.append(sum(column) / len(column))
        expected.append(means[0] / means[1])
    assert heights(figure) == pytest.approx(expected)
    low, high, *_ = (word for word in title(figure).split() if word[0].isdigit())
    assert (float(low), float(high)) == (pytest.approx(min(expected), rel=0.05), pytest.approx(max(expected), rel=0.05))
    shorter = sum(ratio < 1 for ratio in expected)
    assert title(figure).endswith(f"shorter in {shorter} of {HEADS} heads")
    assert_nothing_is_clipped(figure)


def test_value_norms_of_images_without_artifacts_or_of_a_dead_head_are_left_out(seen, nothing):
    assert_nothing_is_clipped(figures.value_norms(nothing))
    assert np.isnan(heights(figures.value_norms(nothing))).all()
    seen.value_norms[:, 2] = 0
    drawn = heights(figures.value_norms(seen))
    assert np.isnan(drawn[2])
    assert np.isfinite(drawn[:2]).all()
    assert "nan" not in title(figures.value_norms(seen)) + title(figures.value_norms(nothing))
