"""Names of classes and files as figures show them: short enough, and in fonts that have their characters."""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib import font_manager, ft2font

from itae_utils.analysis.words import escape
from itae_utils.data.images import shown

LONGEST_NAME = 30  # columns of a name beside an axis; a Chinese character takes two
JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # invisible, but they change the letters beside them
SHAPES = hasattr(ft2font, "__libraqm_version__")  # older versions of matplotlib draw Arabic from left to right


def label_names(names: Sequence[object], *, longest: int = LONGEST_NAME) -> list[str]:
    """Return names as a figure shows them: in one line, short enough for an axis, and "#3" for the third if needed.

    A number stands for a name whose characters no installed font has, and for one that looks like another after it was
    cut; `describe_numbered` lists them. Call this in a function that is `styled`, before anything is drawn: it adds the
    fonts that the names need to matplotlib's list.
    """
    written = [_drawn(name) for name in names]
    families, missing = _fonts("".join(sorted(set("".join(written)))))
    matplotlib.rcParams["font.family"] = [*matplotlib.rcParams["font.family"], *families]
    short = [_shortened(name, longest) for name in written]
    same = Counter(short)
    return [f"#{place}" if missing & set(name) or (label != name and same[label] > 1) else label
            for place, (name, label) in enumerate(zip(written, short, strict=True), start=1)]


def describe_numbered(names: Sequence[object], write: Callable[[object], str] = escape) -> str:
    """Return Markdown that lists the names for which figures show numbers, or nothing if there are none.

    `write` turns a name into text; for a terminal that is `shown`.
    """
    with matplotlib.rc_context():
        labels = label_names(names)
    listed = [f"{label} is {write(name)}" for place, (label, name) in enumerate(zip(labels, names, strict=True), 1)
              if label == f"#{place}" != str(name)]
    return ("No installed font has the characters of some names, or they are too long for an axis, so figures show "
            f"numbers: {', '.join(listed)}." if listed else "")


def _drawn(name: object) -> str:
    """Return a name with composed accents, as most fonts have them, and without invisible marks such as bidi ones."""
    return "".join(sign for sign in unicodedata.normalize("NFC", shown(name))
                   if sign in JOINERS or unicodedata.category(sign) != "Cf")


def _shortened(name: str, longest: int) -> str:
    """Return a name of at most `longest` columns, with its middle cut out if it is longer."""
    def width(text: str) -> int:
        return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text)

    if width(name) <= longest:
        return name
    half = (longest - 1) // 2
    start = next(end for end in range(len(name), -1, -1) if width(name[:end]) <= half)
    rest = next(begin for begin in range(len(name)) if width(name[begin:]) <= longest - 1 - half)
    return f"{name[:start]}…{name[rest:]}"


@functools.cache
def _fonts(signs: str) -> tuple[list[str], set[str]]:
    """Return fonts that have the characters which matplotlib's own lacks, and the characters that none can draw."""
    missing = {sign for sign in signs if not sign.isspace()}
    hopeless = set() if SHAPES else {sign for sign in missing if unicodedata.bidirectional(sign) in ("R", "AL")}
    families: list[str] = []
    own = font_manager.findfont("DejaVu Sans")
    others = sorted(font_manager.fontManager.ttflist, key=lambda font: ("Sans" not in font.name, font.name))
    for name, path in [("", own), *((font.name, font.fname) for font in others)]:
        if not missing:
            break
        try:
            font = font_manager.get_font(path)
        except (OSError, RuntimeError):  # a font that can't be read
            continue
        found = {sign for sign in missing if font.scalable and font.get_char_index(ord(sign))}
        if found and not name.startswith("Last Resort"):  # whose glyphs are boxes
            missing -= found
            families += [name] if name else []
    return families, missing | hopeless
