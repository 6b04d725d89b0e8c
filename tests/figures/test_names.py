import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager

from itae_utils import figures
from itae_utils.analysis.metrics import confusion
from itae_utils.figures import names as figure_names
from tests.drawn import assert_nothing_is_clipped

OWN = {"DejaVu Sans"}


@pytest.fixture
def installed(monkeypatch):
    """Let matplotlib find only the fonts of the names that are given."""
    def install(*names):
        fonts = [font for font in font_manager.fontManager.ttflist if font.name in {*OWN, *names}]
        monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
        figure_names._fonts.cache_clear()

    yield install
    figure_names._fonts.cache_clear()


def labels(*names):
    with matplotlib.rc_context():
        return figure_names.label_names(names)


@pytest.mark.parametrize(("name", "label"), [
    ("5$__10$", "5$__10$"), (r"\\frac{a}^2 100%", r"\\frac{a}^2 100%"), ("<b>&amp;", "<b>&amp;"),
    ("two\nlines\tand a tab", r"two\nlines\tand a tab"), ("e\u0301te\u0301", "été"), ("a\u202eb\u200fc\ufeff", "abc"),
    ("latin-1: \udcff", r"latin-1: \udcff"), ("Ελληνικά, кошка", "Ελληνικά, кошка"), ("😀", "😀"),
    ("x" * 300, "x" * 14 + "…" + "x" * 15), (7, "7"), ("#1", "#1"),
])
def test_names_are_labels_as_they_are(installed, name, label):
    installed()
    assert labels(name) == [label]


@pytest.mark.parametrize("name", ["猫", "ねこ", "고양이", "हिन्दी", "แมว", "🇩🇪", "cat 猫"])
def test_a_name_without_a_font_becomes_a_number_that_the_page_explains(installed, name):
    installed()
    assert labels("cat", name) == ["cat", "#2"]
    assert f"#2 is {name}" in figure_names.describe_numbered(["cat", name])
    assert f"#1 is _{name}." in figure_names.describe_numbered([f"_{name}"], str)


def test_names_that_look_the_same_when_cut_become_numbers(installed):
    installed()
    names = [f"{'a' * 40}{place}{'b' * 40}" for place in range(3)]
    assert labels(*names, "a") == ["#1", "#2", "#3", "a"]
    assert labels("same", "same") == ["same", "same"]
    assert figure_names.describe_numbered(["cat", "#1"]) == ""


def test_a_font_that_has_the_characters_is_used(installed):
    """STIX has letters of mathematics that DejaVu Sans lacks."""
    installed("STIXGeneral", "Last Resort High-Efficiency")
    sign = "\N{LONG DIVISION}\N{SQUARE WITH CONTOURED OUTLINE}"
    missing = [sign for sign in sign if figure_names._fonts(sign) == (["STIXGeneral"], set())]
    assert labels("猫") == ["#1"], "the boxes of Last Resort are no glyphs"
    assert missing
    with matplotlib.rc_context():
        assert figure_names.label_names([missing[0]]) == [missing[0]]
        assert matplotlib.rcParams["font.family"][-1] == "STIXGeneral"


def test_older_versions_of_matplotlib_number_names_that_are_written_from_right_to_left(installed, monkeypatch):
    monkeypatch.setattr(figure_names, "SHAPES", False)
    installed()
    assert labels("قطة", "חתול", "cat") == ["#1", "#2", "cat"]
    monkeypatch.setattr(figure_names, "SHAPES", True)
    installed()
    assert labels("قطة", "חתול") == ["قطة", "חתול"]


def test_wide_characters_count_twice(monkeypatch):
    monkeypatch.setattr(figure_names, "_fonts", lambda signs: ([], set()))
    (label,) = labels("漢" * 40)
    assert label == "漢" * 7 + "…" + "漢" * 7


def test_figures_draw_names_of_all_kinds_without_missing_glyphs(installed):
    installed()
    classes = ["猫", "5$__10$", r"$\frac$", "a^{2}_", "قطة", "x\ny", "100 %"]
    targets = np.arange(28) % 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.confusions({"baseline": confusion(targets, targets[::-1])}, classes)
        assert_nothing_is_clipped(figure)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    arabic = classes[4] if figure_names.SHAPES else "#5"
    assert sorted(names) == sorted(["#1", r"x\ny", *classes[1:4], arabic, classes[6]])
