import pytest

from benchmarks.figure import benchmark
from tests.drawn import assert_nothing_is_clipped, title

RATIOS = {"plain forward_features": 1.0, "ours, 1 variant": 0.9, "ours, 48 variants": 0.95, "loop, 48 variants": 48.0}


def rows(heading, *sizes):
    return [{"heading": heading, "size": size, "what": what, "ratio": ratio + 0.01 * place, "low": ratio - 0.01,
             "high": ratio + 0.03} for place, size in enumerate(sizes) for what, ratio in RATIOS.items()]


def test_time_and_memory_are_drawn_against_a_plain_pass():
    figure = benchmark([*rows("passes", "S", "B", "L"), *rows("memory", "S")], "a processor, 2 threads, fp32")
    assert all(text in title(figure) for text in ("48 variants", "0.95 (ViT-S)", "0.96 (ViT-B)", "0.97 (ViT-L)"))
    time = figure.axes[0]
    assert [label.get_text() for label in time.get_yticklabels()] == list(RATIOS)
    assert [len(axes.containers) for axes in figure.axes] == [3, 3, 1], "one series per size"
    assert time.containers[1][0].get_xdata().tolist() == pytest.approx([ratio + 0.01 for ratio in RATIOS.values()])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ViT-S", "ViT-B", "ViT-L"]
    assert figure.legends[0].get_title().get_text() == "a processor, 2 threads, fp32"
    assert_nothing_is_clipped(figure)


def test_without_memory_there_are_two_panels():
    figure = benchmark([*rows("passes", "S"), *rows("files", "S")], "x")
    assert [len(axes.containers) for axes in figure.axes] == [1, 1]
    assert_nothing_is_clipped(figure)
