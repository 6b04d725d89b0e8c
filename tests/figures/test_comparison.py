import pytest

from itae_utils.figures.comparison import published_and_measured
from tests.made_results import cell_of


@pytest.mark.parametrize(("cells", "title"), [
    ([], "No published number can be compared"), (["demo"], "No published number can be compared"),
    (["demo", "dinov2_vitb14"], "Measured minus published ACC of ITAE: -0.045 over 1 run with"),
])
def test_figure(tmp_path, cells, title):
    made = [cell_of(tmp_path / name, name, "cifar10") for name in cells]
    figure = published_and_measured(made)
    assert figure.get_suptitle().replace("\n", " ").startswith(title)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == 4 + max(len(made) - 1, 0)
    assert labels[-1] == "Tiny-ImageNet\nnot run"
    assert ("CIFAR-10\ndemo (stand-in)" in labels) == bool(cells)
    drawn = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_label() == "published ITAE"]
    assert drawn[0] == 0.8449
