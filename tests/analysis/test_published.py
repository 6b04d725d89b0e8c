import pytest

from itae_utils.analysis.collection import NOT_IN_SOURCES, PUBLISHED, SOURCE, UNKNOWN_SETTINGS, published_table
from itae_utils.data.datasets import DATASETS


def test_the_published_numbers():
    expected = """
        CIFAR-10       0.8449  0.8682  0.7946
        CIFAR-100      0.6502  0.7710  0.5053
        STL-10         0.8276  0.8818  0.7594
        Tiny-ImageNet  0.6823  0.8178  0.5227
    """
    found = [(row.title, row.acc, row.nmi, row.ari) for row in published_table().itertuples()]
    assert found == [(name, *map(float, scores)) for name, *scores in map(str.split, expected.split("\n")[1:-1])]


def test_rows_are_named_as_data_sets_are_loaded():
    assert {row.dataset for row in PUBLISHED} <= set(DATASETS)
    assert list(published_table().index) == [row.dataset for row in PUBLISHED]


def test_what_is_not_known_is_said():
    table = published_table()
    assert (table[["baseline_acc", "baseline_nmi", "baseline_ari"]] == NOT_IN_SOURCES).all(axis=None)
    assert table.backbone.tolist() == ["DINOv2 ViT-B/14"] * 3 + [NOT_IN_SOURCES]
    assert not table.isna().any(axis=None)
    assert any("θ" in setting for setting in UNKNOWN_SETTINGS.values())


def test_the_source_names_the_paper():
    assert "2410.04801" in SOURCE


def test_rows_cannot_be_changed():
    with pytest.raises(AttributeError):
        PUBLISHED[0].acc = 1.0
