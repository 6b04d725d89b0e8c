"""The common style of all figures, and functions that save them."""

from __future__ import annotations

import functools
import io
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from itae_utils.errors import ItaeError
from itae_utils.files import make_folder, replacing

WIDTH = 10.0  # inches, the width of a report's column
DPI = 150
PALETTE = sns.color_palette("colorblind").as_hex()
NORMAL, ARTIFACT, AFTER = PALETTE[0], PALETTE[3], PALETTE[2]
SIGNS = "osD^vPX*<>"  # with line styles they tell series apart on a grey page, as HATCH does for areas
HATCH = "////"
SOLID = {"dash_offset": 0, "dash_list": None}
CASED = [withStroke(linewidth=2.4, foreground="white", dashes=SOLID)]  # a line that is seen on dark and on light ground
MAP = "cividis"  # its lightness rises steadily
COLUMNS = 3  # of panels; more would squeeze their labels
FORMATS = ("png", "pdf", "svg", "jpg")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.titlesize": 12.5,
    "hatch.color": "white", "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a "$" in a name is a dollar sign
}


PAPER = STYLE | {"font.family": ["STIXGeneral", "DejaVu Serif"], "font.size": 8, "axes.titlesize": 8,
                 "legend.fontsize": 7.5, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "lines.linewidth": 1,
                 "lines.markersize": 4}
PAPER_WIDTH, COLUMN_WIDTH = 6.9, 3.3  # inches, of a page with two columns, and of one of them
_format = "screen"


def use_format(name: str) -> None:
    """Draw all figures from now on for a "screen", or for a "paper": serif, at column width, and without titles."""
    global _format
    _format = name


class ReportFigure(Figure):
    """A matplotlib figure that notebooks display without pyplot, and the report with its caption.

    Args:
        title: the finding.
        caption: what is drawn, for a reader who sees nothing else of the page.
        height: in inches, at a width of `WIDTH`.
        narrow: whether it fits into one column of a paper.
    """

    def __init__(self, title: str, caption: str, *, height: float, narrow: bool = False) -> None:
        paper = _format == "paper"
        width = (COLUMN_WIDTH if narrow else PAPER_WIDTH) if paper else WIDTH
        super().__init__(figsize=(width, height * (PAPER_WIDTH / WIDTH if paper else 1)), dpi=DPI, layout="constrained")
        self.title, self.caption = title, caption
        if not paper:  # there the caption says it
            drawn = self.suptitle(title, x=0.01, ha="left", parse_math=False)
            for text in _lines(title):
                drawn.set_text(text)
                if drawn.get_window_extent().x1 < 0.99 * self.bbox.width:
                    break

    @property
    def page_texts(self) -> dict[str, str]:
        """Its texts for a page, which IPython keeps beside the picture."""
        return {"alt": self.title, "caption": self.caption}

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue(), self.page_texts


def _lines(title: str) -> Iterator[str]:
    """Yield a title in one line, in two that break after a clause, a comma or a word near the middle, and in more."""
    yield title
    for sign in ("; ", ": ", ", ", " "):
        ends = [found.end() for found in re.finditer(sign, title)]
        for end in sorted(ends, key=lambda place: abs(place - len(title) / 2)):
            yield f"{title[:end - 1]}\n{title[end:]}"
    yield textwrap.fill(title, 90)


def styled(draw: Callable[..., ReportFigure]) -> Callable[..., ReportFigure]:
    """Decorate a drawing function to use the project's style; matplotlib's settings are restored afterwards."""

    @functools.wraps(draw)
    def in_style(*args, **kwargs) -> ReportFigure:
        with matplotlib.rc_context(PAPER if _format == "paper" else STYLE):
            return draw(*args, **kwargs)

    return in_style


def panels(figure: Figure, count: int) -> list[Axes]:
    """Return panels with a common y axis, in rows of at most `COLUMNS`; places that are left over stay empty."""
    grid = figure.subplots(-(-count // COLUMNS), min(COLUMNS, count), sharey=True, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.set_axis_off()
    return list(grid[:count])


def save(figure: Figure, output_dir: str | Path, name: str) -> None:
    """Write `output_dir/figures/name` as PNG, PDF and SVG, without dates.

    Raises:
        ItaeError: the folder can't be created.
    """
    folder, engine = make_folder(Path(output_dir) / "figures"), figure.get_layout_engine()
    for suffix, metadata in [("png", {}), ("pdf", {"CreationDate": None}), ("svg", {"Date": None})]:
        with replacing(folder / f"{name}.{suffix}") as part, matplotlib.rc_context({"svg.hashsalt": name}):
            figure.savefig(part, format=suffix, metadata=metadata)
        figure.set_layout_engine("none")  # the places are found once
    figure.set_layout_engine(engine)


def outline(axes: Axes, artifacts: np.ndarray, *, planted: bool = False) -> None:
    """Frame the artifacts (rows, columns) on a picture whose unit is the patch, and remove its ticks.

    The frames of true artifacts, which were `planted`, are dashed.
    """
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    for row, column in np.argwhere(artifacts):
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=ARTIFACT, linewidth=1.2, path_effects=CASED,
                                 linestyle=(0, (2, 1)) if planted else "-"))


def check_figure_path(path: Path) -> None:
    """Validate a path for `save_as`.

    Raises:
        ItaeError: its ending is not one of `FORMATS`, or it is a folder.
    """
    if path.suffix[1:].lower() not in FORMATS:
        raise ItaeError(f"output {str(path)!r} must end in {', '.join(f'.{name}' for name in FORMATS)}")
    if path.is_dir():
        raise ItaeError(f"output {str(path)!r} is a folder: name a file")


def save_as(figure: Figure, path: Path) -> None:
    """Write a figure in one step, in the format named by the path's ending."""
    make_folder(path.parent)
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix[1:].lower())
