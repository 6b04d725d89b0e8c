import itertools
import re

import numpy as np
import pandas as pd
import pytest

from itae_utils import figures
from itae_utils.analysis.metrics import confusion
from itae_utils.analysis.scoring import AGREEMENT, CHANGE
from itae_utils.errors import ItaeError
from itae_utils.method.setting import ATTENUATIONS, SOURCES
from tests.drawn import assert_nothing_is_clipped, title

THETAS = {"1 %": 0.01, "5 %": 0.05, "auto": 0.03}
DIGITS = [str(digit) for digit in range(10)]


def ablation(measure="acc", *, auto=True, oracle=True, sources=("query", "key"), attenuations=("min", "mask")):
    """Scores that rise by 0.1 for the key, by 0.01 for each later attenuation; two seeds 0.02 apart."""
    rows = [{"variant": "baseline", "kind": "baseline", "value": 0.5}]
    if oracle:
        rows.append({"variant": "oracle", "kind": "oracle", "value": 0.8})
    for source, (theta, share) in itertools.product(sources, THETAS.items()):
        if theta == "auto" and (source == "query" or not auto):
            continue
        about = {"source": source, "theta": theta, "share": share}
        rows += [{"variant": f"{source} {kind} {theta}", "kind": "itae", "attenuation": kind, **about,
                  "value": 0.6 + 0.1 * (source == "key") + 0.01 * place} for place, kind in enumerate(attenuations)]
        rows.append({"variant": f"random like {source} {theta}", "kind": "random", **about, "value": 0.45})
    table = pd.concat([pd.DataFrame(rows).assign(seed=seed) for seed in (0, 1)])
    return table.assign(**{measure: table.value + 0.02 * table.seed - 0.01}).set_index("variant")


def scores(**means):
    return pd.DataFrame([{"variant": name.replace("_", " "), "seed": seed, "acc": mean + seed / 100, "nmi": mean}
                         for name, mean in means.items() for seed in (0, 1)])


def heat_maps(figure):
    return [axes for axes in figure.axes if axes.get_xlabel() == "θ as share of the patches"]


def test_heat_maps_share_colours_and_name_the_best_setting():
    figure = figures.ablation_heatmaps(ablation(), "acc")
    assert title(figure) == "Best of 10 settings: key, mask, 1 %: ACC 0.710 (baseline 0.500)"
    query, key = heat_maps(figure)
    assert query.collections[0].get_clim() == key.collections[0].get_clim() == (0.5, pytest.approx(0.71))
    assert [label.get_text() for label in key.get_xticklabels()] == ["1 %", "5 %", "auto"]
    assert "no θ found" in [text.get_text() for text in query.texts]
    assert "no θ found" not in [text.get_text() for text in key.texts]
    assert_nothing_is_clipped(figure)


def test_every_source_and_edit_has_its_place():
    table = ablation(sources=SOURCES, attenuations=ATTENUATIONS)
    heat, curves = figures.ablation_heatmaps(table, "acc"), figures.ablation_curves(table, "acc")
    for figure in (heat, curves):
        assert_nothing_is_clipped(figure)
        panels = [axes for axes in figure.axes if axes.get_title(loc="left").split(":")[0] in SOURCES]
        assert [axes.get_title(loc="left").split(":")[0] for axes in panels] == list(SOURCES)
        assert [bool(axes.get_ylabel()) for axes in panels] == [True, False, False] * 2
        boxes = [axes.get_tightbbox(figure.canvas.get_renderer()) for axes in panels]
        assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
    assert [label.get_text() for label in heat.axes[0].get_yticklabels()] == list(ATTENUATIONS)
    assert [text.get_text() for text in curves.legends[0].get_texts()][:len(ATTENUATIONS)] == list(ATTENUATIONS)
    colors = [line.get_color() for line in curves.axes[0].lines if line.get_label() in ATTENUATIONS]
    assert len(set(colors)) == len(ATTENUATIONS)


def test_changes_are_in_thousandths_and_have_no_baseline():
    figure = figures.ablation_heatmaps(ablation(CHANGE), CHANGE)
    assert title(figure) == "Largest change of 10 settings: key, mask, 1 %: cosine distance to the baseline 0.710"
    assert "700.0" in [text.get_text() for text in heat_maps(figure)[1].texts]
    assert "; baseline" not in title(figures.ablation_curves(ablation(CHANGE), CHANGE))


def test_curves_compare_auto_with_control_and_baseline():
    figure = figures.ablation_curves(ablation(), "acc")
    assert re.findall(r"\d\.\d+", title(figure)) == ["0.700", "0.710", "0.450", "0.500"]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["1 %", "5 %"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["min", "mask", "random patches", "baseline", "oracle"]
    key = figure.axes[1]
    stars = [line for line in key.lines if line.get_marker() == "*"]
    assert [(star.get_xdata()[0], star.get_ydata()[0]) for star in stars] == [
        (0.03, pytest.approx(0.7)), (0.03, pytest.approx(0.71))]
    assert figure.axes[0].get_title(loc="left") == "query: no θ found"
    assert_nothing_is_clipped(figure)


def test_curves_draw_the_spread_over_seeds():
    band = figures.ablation_curves(ablation(), "acc").axes[1].collections[0].get_paths()[0].vertices
    assert np.ptp(band[:, 1]) == pytest.approx(2 * np.std([0, 0.02], ddof=1))


def test_curves_of_shares_below_a_millionth_are_labelled_without_an_exponent():
    table = ablation()
    table.loc[table.theta == "1 %", ["theta", "share"]] = "0.00001 %", 1e-7
    figure = figures.ablation_curves(table, "acc")
    figure.canvas.draw()
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0.00001 %", "5 %"]


def test_curves_without_any_theta_say_so():
    figure = figures.ablation_curves(ablation(auto=False, oracle=False), "acc")
    assert title(figure).startswith("No θ was found")
    assert re.findall(r"\d\.\d+", title(figure)) == ["0.600", "0.710", "0.500"]
    assert "oracle" not in [text.get_text() for text in figure.legends[0].get_texts()]


def test_score_overview_draws_every_variant_against_the_baseline():
    figure = figures.score_overview(scores(raw_pixels=0.3, baseline=0.5, itae=0.7), "what came out")
    assert title(figure) == "what came out"
    acc = figure.axes[0]
    assert [label.get_text() for label in acc.get_yticklabels()] == ["raw pixels", "baseline", "itae"]
    assert [text.get_text() for text in acc.texts] == ["0.305", "0.505", "0.705"]
    assert acc.get_xlabel() == "ACC (mean ± sd)"
    assert acc.lines[-1].get_xdata()[0] == pytest.approx(0.505)
    assert_nothing_is_clipped(figure)
    unlabelled = figures.score_overview(pd.DataFrame({"variant": ["baseline", "itae"], AGREEMENT: [0.4, 0.5]}), "x")
    assert unlabelled.axes[0].get_xlabel() == "ARI between runs", "one value has no spread"


def steps(**acc):
    """Return a table as of `harm_table` from difference, low and high of ACC by step; NMI is 0.9 everywhere."""
    rows = {(name, metric): values if metric == "acc" else (0.9, 0.9, 0.9) for name, values in acc.items()
            for metric in ("acc", "nmi")}
    return pd.DataFrame(rows.values(), columns=["difference", "low", "high"],
                        index=pd.MultiIndex.from_tuples(rows, names=["step", "metric"]))


def test_harms_draw_each_step_with_its_interval():
    made = {"written": (0.12, 0.1, 0.15), "stolen": (-0.01, -0.03, 0.02), "evenly": (0.05, 0.0, 0.1),
            "both": (-0.2, -0.3, -0.1)}
    figure = figures.harms(steps(**made))
    assert re.findall(r"[+-]\d\.\d+", title(figure)) == ["+0.120"], "the other interval contains 0"
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[::-1] == list(made), "read from the top"
    whiskers = [line for line in axes.lines if len(line.get_xdata()) == 2 and np.ptp(line.get_xdata())]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    for place, name in enumerate(names):
        difference, low, high = made[name]
        assert [tuple(line.get_xdata()) for line in whiskers if line.get_ydata()[0] == place] == [(low, high)]
        (point,) = (line for line in points if line.get_ydata()[0] == place)
        assert point.get_xdata() == [difference]
        clear = not low <= 0 <= high
        assert (point.get_markerfacecolor() != "white") == clear, "open if the interval holds 0"
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [0]
    assert_nothing_is_clipped(figure)


def test_harms_of_another_measure():
    figure = figures.harms(steps(written=(0.1, 0, 0.2), stolen=(0.1, 0, 0.2)), "nmi")
    assert re.findall(r"[+-]\d\.\d+", title(figure)) == ["+0.900", "+0.900"]
    assert "NMI" in figure.axes[0].get_xlabel()


def test_embeddings_count_neighbours_of_the_same_class():
    targets = np.repeat([0, 1], 30)
    apart = np.stack([targets * 100.0, np.arange(60)], axis=1)
    mixed = np.random.default_rng(0).normal(size=(60, 2))
    figure = figures.embeddings({"before": mixed, "after": apart}, targets, ["a", "b"])
    assert "after 100 %" in title(figure)
    assert title(figure).endswith("(by chance 49 %)")
    few = figures.embeddings({"it": apart[:4]}, np.array([0, 0, 1, 1]), ["a", "b"])
    assert "3 nearest neighbours" in title(few)
    assert "(by chance 33 %)" in title(few)  # one of the three others
    assert "before 100 %" not in title(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert_nothing_is_clipped(figure)
    many = figures.embeddings({"x": mixed}, np.arange(60) % 25, list(map(str, range(25))))
    assert not many.legends


def test_confusions_share_colours_and_name_the_largest_confusion():
    targets = np.repeat(np.arange(10), 10)
    swapped = targets.copy()
    swapped[80:84] = 3
    tables = {"baseline": confusion(targets, swapped), "itae": confusion(targets, targets)}
    figure = figures.confusions(tables, DIGITS)
    assert "baseline 40 % of 8 in 3; itae none" in title(figure)
    assert [axes.get_images()[0].get_clim() for axes in figure.axes[:2]] == [(0, 1), (0, 1)]
    assert_nothing_is_clipped(figure)


def test_confusions_of_long_names_and_more_clusters_than_classes():
    targets = np.repeat([0, 1], 20)
    labels = targets.copy()
    labels[:9] = 7
    classes = ["a class of a long name", "another one"]
    figure = figures.confusions({"baseline": confusion(targets, labels)}, classes)
    assert "45 % of a class of a long name in an unmatched cluster" in title(figure)
    left, right = (axes.get_position() for axes in figure.axes[:2])
    assert left.x0 < 0.3
    assert right.width == pytest.approx(left.width, rel=0.01)  # an empty place: one matrix is drawn no larger than two
    assert_nothing_is_clipped(figure)


def test_names_of_classes_are_drawn_literally():
    classes = [r"$\frac$", "_hidden", "$a$"]
    targets = np.arange(30) % 3
    points = np.random.default_rng(0).normal(size=(30, 2))
    table = confusion(targets, np.where(targets == 2, 0, targets))
    gains = pd.DataFrame([[0.1, 0.2, 0.3]]), pd.DataFrame([[0.3, 0.2, 0.1]])
    embeddings = figures.embeddings({"baseline": points}, targets, classes)
    for figure in (embeddings, figures.confusions({"baseline": table}, classes), figures.class_gains(*gains, classes)):
        assert_nothing_is_clipped(figure)  # draws it
    assert [text.get_text() for text in embeddings.legends[0].get_texts()] == classes


@pytest.mark.parametrize("count", [2, 20, 200])
def test_figures_of_many_and_long_names_are_not_clipped(count):
    classes = [f"n{place:08}_a_very_long_name_of_a_class_{place}" for place in range(count)]
    targets = np.arange(2 * count) % count
    points = np.random.default_rng(0).normal(size=(2 * count, 2))
    table = confusion(targets, np.roll(targets, count // 2))
    gains = pd.DataFrame(np.zeros((1, count))), pd.DataFrame(np.linspace(-1, 1, count)[None])
    for figure in (figures.embeddings({"baseline": points}, targets, classes), figures.class_gains(*gains, classes),
                   figures.confusions({"baseline": table, "itae": table}, classes)):
        assert_nothing_is_clipped(figure)


def test_classes_that_are_absent_have_no_name_in_the_figures():
    targets = np.array([1, 1, 3, 3, 3])
    points = np.random.default_rng(0).normal(size=(5, 2))
    figure = figures.embeddings({"baseline": points}, targets, ["a", "b", "c", "d"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b", "d"]
    figure = figures.confusions({"baseline": confusion(targets, targets)}, ["a", "b", "c", "d"])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["b", "d"]


def test_confusions_of_a_single_cluster():
    figure = figures.confusions({"baseline": confusion(np.arange(6) % 3, np.zeros(6, dtype=int))}, ["a", "b", "c"])
    assert_nothing_is_clipped(figure)
    assert "100 % of b in a" in title(figure)


def test_unknown_measures_are_refused():
    with pytest.raises(ItaeError, match="'accuracy'"):
        figures.ablation_heatmaps(ablation(), "accuracy")
    with pytest.raises(ItaeError, match="'nmi'"):
        figures.ablation_curves(ablation(), "nmi")


def test_class_gains_are_sorted_and_counted():
    before = pd.DataFrame(np.full((2, 10), 0.5))
    after = before.copy()
    after[3] = [0.8, 0.9]
    after[4] = 0.2
    after[5] = [0.9, 0.3]  # more by 0.1, with an sd of 0.42
    figure = figures.class_gains(before, after, DIGITS)
    assert "Of 10 classes 1 gain and 1 lose" in title(figure)
    assert title(figure).endswith("most is +0.35 (class 3), least -0.30 (class 4)")
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert (names[0], names[-1]) == ("3", "4")
    assert_nothing_is_clipped(figure)


def test_class_gains_of_many_classes_show_both_ends():
    before = pd.DataFrame(np.zeros((1, 100)))
    after = pd.DataFrame(np.linspace(0, 0.5, 100)[None])
    figure = figures.class_gains(before, after, [f"class number {place}" for place in range(100)])
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len(names) == 20
    assert (names[0], names[-1]) == ("class number 99", "class number 0")
    assert_nothing_is_clipped(figure)


def test_cluster_sheet_has_one_row_per_cluster():
    images = [np.zeros((8, 8, 3))]
    figure = figures.cluster_sheet({4: images * 10, 2: images * 3}, {4: 1234, 2: 3}, "two clusters")
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")] == [
        "cluster 4: 1,234 images", "cluster 2: 3 images"]
    assert sum(bool(axes.get_images()) for axes in figure.axes) == 13
    assert_nothing_is_clipped(figure)
