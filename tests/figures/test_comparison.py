import pytest

from itae_utils.figures.comparison import published_and_measured
from tests.drawn import assert_nothing_is_clipped, title
from tests.made_results import pairing_of


@pytest.mark.parametrize(("backbones", "gap"), [([], None), (["demo"], None), (["demo", "dinov2_vitb14"], "-0.045")])
def test_published_and_measured(tmp_path, backbones, gap):
    made = [pairing_of(tmp_path / name, name, "cifar10") for name in backbones]
    figure = published_and_measured(made)
    assert (gap or "No run") in title(figure)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == 4 + max(len(made) - 1, 0)
    assert labels[-1] == "Tiny-ImageNet\nnot run"
    assert ("CIFAR-10\ndemo (other weights)" in labels) == bool(backbones)
    drawn = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_label() == "published ITAE"]
    assert drawn[0] == 0.8449


def test_names_with_dollar_signs(tmp_path):
    figure = published_and_measured([pairing_of(tmp_path, "demo", r"imagefolder:/a/$\frac$")])
    assert_nothing_is_clipped(figure)
    assert len(figure.axes[0].get_yticklabels()) == 1, "data sets of the paper have nothing to do with it"
    assert "+0.100" in title(figure)
    assert any(r"$\frac$" in label.get_text() for label in figure.axes[0].get_yticklabels())


def test_images_without_labels_have_no_row(tmp_path):
    figure = published_and_measured([pairing_of(tmp_path, "demo", "imagefolder:/a/cats", rows=[])])
    assert "No run" in title(figure)
    assert not figure.axes
