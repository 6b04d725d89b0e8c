"""Helpers of the tests of figures."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def assert_nothing_is_clipped(figure: Figure) -> None:
    figure.set_dpi(60)  # quicker; the layout is the same
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.get_tightbbox(canvas.get_renderer())
    width, height = figure.get_size_inches()
    assert width <= 10
    assert min(box.x0, box.y0) >= -0.02
    assert box.x1 <= width + 0.02
    assert box.y1 <= height + 0.02


def title(figure: Figure) -> str:
    return " ".join(figure.get_suptitle().split())
