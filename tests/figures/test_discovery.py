import matplotlib
import numpy as np
import pytest

from itae_utils import figures
from itae_utils.analysis.inspection import InspectedImage
from itae_utils.figures.style import outline
from tests.drawn import assert_nothing_is_clipped, title
from tests.figures.conftest import GRID, PATCHES


def inspected(rows, columns, *, after=True, artifact=True, name="a picture.png"):
    before = np.linspace(0, 0.5, rows * columns).reshape(rows, columns)
    artifacts = np.zeros((rows, columns), dtype=bool)
    artifacts[0, 0] = artifact
    picture = np.zeros((rows * 4, columns * 4, 3))
    return InspectedImage(name, picture, before * 100, before * 10, before, before / 2 if after else None, artifacts)


def grids(values):
    return values.reshape(-1, *GRID)


def examples(seen):
    maps = (grids(values[:4]) for values in (seen.attention, seen.attention_after, seen.artifacts))
    return figures.attention_examples([np.zeros((16, 20, 3))] * 4, *maps)


def limits(figure):
    return {image.get_clim() for axes in figure.axes for image in axes.get_images() if image.get_array().ndim == 2}


def test_no_figure_is_clipped_or_known_to_pyplot(seen, nothing):
    drawn = [
        figures.hidden_norms(seen), figures.hidden_norms(nothing), examples(seen), examples(nothing),
        figures.artifact_positions(seen.artifacts, GRID), figures.attention_shares(seen),
        figures.inspection([inspected(4, 5), inspected(7, 3)], "key", 2, "two images " * 20),
    ]
    for figure in drawn:
        assert_nothing_is_clipped(figure)
    assert not matplotlib.pyplot.get_fignums()


def test_matplotlib_settings_are_restored(seen):
    before = dict(matplotlib.rcParams)
    figures.hidden_norms(seen)
    assert dict(matplotlib.rcParams) == before


def test_hidden_norms_names_the_block_and_how_far_artifacts_stand_out(seen):
    words = title(figures.hidden_norms(seen))
    assert "after block 2" in words or "after block 3" in words
    assert float(words.split(": ")[1].split(" ×")[0]) == pytest.approx(30, rel=0.1)
    seen.hidden_norms[:] = 1
    assert "not longer" in title(figures.hidden_norms(seen))


def test_hidden_norms_without_artifacts_draws_one_group(nothing):
    nothing.hidden_norms[0, 2, 3] = 7
    figure = figures.hidden_norms(nothing)
    assert "7 × the median of its block (after block 3)" in title(figure)
    assert figure.legends[0].get_texts()[0].get_text() == "all patches, median"
    assert len(figure.legends[0].get_texts()) == 3


def test_attention_examples_share_colours_and_outline_artifacts(seen):
    figure = examples(seen)
    assert "draw 80 % of the [CLS] attention, and 0 % after ITAE" in title(figure)
    assert limits(figure) == {(0, 0.8), (0, 1)}, "the maps, and the pictures and overlays"
    outlined = [axes for axes in figure.axes if axes.patches]
    assert len(outlined) == 5 * 4
    assert [patch.get_xy() for patch in outlined[0].patches] == [(0, 0)]


def test_attention_is_laid_over_the_image_on_a_scale_of_its_own(seen):
    figure = examples(seen)
    picture, overlay = figure.axes[4 * 4].get_images()
    assert picture.get_cmap().name == "gray"
    np.testing.assert_allclose(overlay.get_alpha(), grids(seen.attention_after)[0] / seen.attention_after[0].max())
    assert overlay.get_extent() == picture.get_extent() == [0, 5, 4, 0]


def test_attention_examples_without_artifacts_has_no_after(nothing):
    figure = examples(nothing)
    assert "No patch" in title(figure)
    assert sum(bool(axes.get_images()) for axes in figure.axes) == 3 * 4


def test_outline_frames_row_and_column(seen):
    axes = figures.ReportFigure("x", "", height=2).subplots()
    mask = np.zeros(GRID, dtype=bool)
    mask[1, 3] = True
    outline(axes, mask)
    assert [patch.get_xy() for patch in axes.patches] == [(3, 1)]


def test_artifact_positions_counts_places_and_artifacts():
    artifacts = np.zeros((10, PATCHES), dtype=bool)
    artifacts[:, 0] = True
    artifacts[:5, 7] = True
    figure = figures.artifact_positions(artifacts, GRID)
    assert title(figure) == "2 of 20 places hold at least 90 % of the artifacts; an image has 1.5 of them (1 to 2)"
    frequency = figure.axes[0].get_images()[0].get_array()
    assert frequency[0, 0] == 1
    assert frequency[1, 2] == 0.5


def test_attention_shares_are_of_the_images_with_artifacts(seen):
    finding = "are 5 % of the patches and draw 80 % of the [CLS] attention; after ITAE 0 %"
    assert title(figures.attention_shares(seen)) == f"Artifacts {finding}"
    seen.artifacts[6:] = False
    figure = figures.attention_shares(seen)
    assert title(figure) == f"In the 6 of 12 images with artifacts, these {finding}"
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()][:2] == ["0 %", "20 %"]
    assert figure.axes[0].get_ylabel() == "images, of 6 with artifacts"
    assert sum(bar.get_height() for bar in figure.axes[0].containers[0]) == 6


def test_inspection_draws_long_images_smaller():
    wide, square, tall, taller = (figures.inspection([inspected(*shape)], "key", 2, "title").get_size_inches()[1]
                                  for shape in ((1, 16), (3, 3), (6, 3), (48, 3)))
    assert wide < square < tall == taller
    assert 50 * 150 * (taller - 1.2) < 2**16, "the pixels of the largest image that matplotlib can save"


def test_inspection_has_an_after_only_with_theta():
    with_theta = figures.inspection([inspected(4, 5)], "key", 2, "title")
    without = figures.inspection([inspected(4, 5, after=False, artifact=False)], "key", 2, "title")
    titles = [axes.get_title(loc="left") for axes in with_theta.axes if axes.get_title(loc="left")]
    assert titles == ["a picture.png", "‖hidden‖₂ after block 2", "‖key‖₂\nin the last block", "[CLS] attention",
                      "… after ITAE", "this over the image"]
    assert "… after ITAE" not in [axes.get_title(loc="left") for axes in without.axes]
    before, after = [axes.get_images()[0].get_clim() for axes in with_theta.axes[3:5]]
    assert before == after == (0, 0.5)


@pytest.mark.parametrize(("source", "brightest"), [("direction", [50, 5, 0.5, 0.5]), ("attention", [50, 0.5, 0.5])])
def test_inspection_draws_each_statistic_on_its_own_scale_and_attention_once(source, brightest):
    figure = figures.inspection([inspected(4, 5), inspected(7, 3)], source, 2, "title")
    assert_nothing_is_clipped(figure)
    first_row = figure.axes[1:1 + len(brightest)]
    assert [axes.get_images()[0].get_clim()[1] for axes in first_row] == brightest
    assert figure.axes[1 + len(brightest)].get_title(loc="left") == "this over the image"


@pytest.mark.parametrize(("name", "label"), [
    (r"$\frac$.png", r"$\frac$.png"), ("a_long_name_of_a_file_without_spaces.png", "a_long_name_of…hout_spaces.png"),
    ("a\nb.png", r"a\nb.png"),
])
def test_inspection_labels_rows_with_file_names(name, label):
    figure = figures.inspection([inspected(4, 5, name=name)], "key", 2, rf"{name} in a title of two $")
    assert_nothing_is_clipped(figure)
    assert figure.axes[0].get_title(loc="left") == label


def test_save_writes_png_and_pdf_without_dates(tmp_path, seen):
    figure = figures.hidden_norms(seen)
    figures.save(figure, tmp_path / "a", "norms")
    figures.save(figures.hidden_norms(seen), tmp_path / "b", "norms")
    for suffix, start in [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]:
        first, second = ((tmp_path / run / "figures" / f"norms.{suffix}").read_bytes() for run in "ab")
        assert first.startswith(start)
        assert first == second
        assert b"CreationDate" not in first
    assert len(list((tmp_path / "a" / "figures").iterdir())) == 3


def test_notebooks_get_a_picture_at_150_dots_an_inch(seen):
    figure = figures.hidden_norms(seen)
    png, texts = figure._repr_png_()
    assert texts == {"alt": figure.title, "caption": figure.caption}
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == 1500


def test_maps_of_attention_show_small_weights(seen):
    """A tenth of the largest weight has a third of the scale, before and after."""
    images = [image for axes in examples(seen).axes for image in axes.get_images()
              if image.get_cmap().name == "cividis"]
    assert len(images) > 2
    for image in images:
        assert float(image.norm(0.1 * image.norm.vmax)) == pytest.approx(0.1**0.5)


def test_figures_for_a_paper_have_column_width_serif_letters_and_no_title(seen):
    figures.use_format("paper")
    try:
        wide, narrow = figures.hidden_norms(seen), figures.value_norms(seen)
        assert [figure.get_figwidth() for figure in (wide, narrow)] == [6.9, 3.3]
        assert wide.get_suptitle() == ""
        assert wide.title
        wide.draw_without_rendering()
        labels = wide.axes[0].xaxis.label
        assert (labels.get_fontsize(), labels.get_fontfamily()[0]) == (8, "STIXGeneral")
    finally:
        figures.use_format("screen")
    again = figures.hidden_norms(seen)
    assert (again.get_figwidth(), again.get_suptitle()) == (10, again.title)
