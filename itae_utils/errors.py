"""The one error users meet when what they gave can't work: a single line that names the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ItaeError(ValueError):
    """Bad input, told in one line: what was wrong and what would be right."""


def unknown_name(kind: str, name: str, known: Iterable[str], see: str) -> ItaeError:
    """An `ItaeError` for a name that is not among `known`, naming the closest ones and the command that lists all."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return ItaeError(f"unknown {kind} {name!r}: {hint}{see} lists them all")
