import numpy as np
import pandas as pd
import pytest

from itae_utils import figures
from itae_utils.analysis.remedies import Remedy
from tests.drawn import assert_nothing_is_clipped, title

NAMES = ["itae", "test-time registers, late", "mean of patches outside the artifacts", *"abcdefghi"]
REMEDIES = {name: Remedy("a sample", place / 10) for place, name in enumerate(["baseline", *NAMES])}


def scores(*leads):
    rows = {("baseline", "acc"): (0.5, np.nan, np.nan, np.nan)}
    for name, lead in zip(NAMES, leads, strict=False):
        rows |= {(name, "acc"): (0.5 + lead, lead, lead - 0.05, lead + 0.04), (name, "knn"): (0.9, 0.4, 0.3, 0.5)}
    index = pd.MultiIndex.from_tuples(rows, names=["remedy", "metric"])
    return pd.DataFrame(rows.values(), index, ["value", "difference", "low", "high"])


def test_the_lead_in_acc_is_drawn_against_the_cost():
    figure = figures.score_against_cost(scores(0.1, 0.2, 0.01), REMEDIES)
    assert title(figure) == "Largest clear lead over the baseline in ACC: test-time registers, late, +0.200"
    *lines, baseline = figure.axes[0].lines
    assert baseline.get_ydata() == [0, 0]
    for place, (line, lead) in enumerate(zip(lines, (0.1, 0.2, 0.01), strict=True), start=1):
        assert line.get_xdata().tolist() == [place / 10] * 3
        np.testing.assert_allclose(line.get_ydata(), [lead - 0.05, lead, lead + 0.04])
        assert line.get_markevery() == [1], "the difference has a mark, and its bounds have none"
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == [*NAMES[:3], "baseline"]
    assert_nothing_is_clipped(figure)


def test_a_lead_whose_interval_holds_zero_is_not_claimed():
    assert title(figures.score_against_cost(scores(0.04, -0.2), REMEDIES)).endswith("in ACC: none")


def test_many_remedies_have_signs_of_their_own():
    figure = figures.score_against_cost(scores(*[0.1] * len(NAMES)), REMEDIES)
    lines = figure.axes[0].lines
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == len(NAMES) + 1
    assert_nothing_is_clipped(figure)


@pytest.fixture
def maps():
    """Attention of four images on a 4 × 5 grid, whose first patch is an artifact: 0.8, then 0 and an even share."""
    before, after, even = np.full((4, 4, 5), 0.2 / 19), np.full((4, 4, 5), 1 / 19), np.full((4, 4, 5), 1 / 20)
    before[:, 0, 0], after[:, 0, 0] = 0.8, 0
    return {"baseline": before, "itae": after, "test-time registers, late": even}


def test_maps_share_a_scale_of_square_roots_and_frame_artifacts(maps):
    artifacts = np.zeros((4, 4, 5), dtype=bool)
    artifacts[:, 0, 0] = True
    pictures = [np.full((16, 20, 3), 0.1 * number) for number in range(4)]
    figure = figures.remedy_maps(pictures, maps, artifacts)
    assert title(figure) == "In these images artifacts draw 80 % of the [CLS] attention; under the remedies 0 % to 5 %"
    panels = np.array(figure.axes[:16]).reshape(4, 4)
    named = [" ".join(axes.get_title("left").split()) for axes in panels[0]]
    assert named == ["image", "baseline 80 %", "itae 0 %", "test-time registers, late 5 %"]
    for number, row in enumerate(panels):
        drawn = [axes.get_images()[0] for axes in row]
        for image, values in zip(drawn, [pictures[number], *(each[number] for each in maps.values())], strict=True):
            np.testing.assert_allclose(image.get_array(), values)
            assert image.get_extent() == [0, 5, 4, 0]
        assert {image.get_clim() for image in drawn[1:]} == {(0, 0.8)}
        assert float(drawn[1].norm(0.2)) == pytest.approx(0.5)
        assert [[patch.get_xy() for patch in axes.patches] for axes in row] == [[(0, 0)]] * 4
    assert_nothing_is_clipped(figure)


def test_maps_of_many_remedies_fit(maps):
    many = maps | {name: maps["itae"] for name in NAMES}
    figure = figures.remedy_maps([np.zeros((16, 20, 3))] * 4, many, np.zeros((4, 4, 5), dtype=bool))
    assert title(figure).endswith("draw 0 % of the [CLS] attention; under the remedies 0 %")
    assert_nothing_is_clipped(figure)
