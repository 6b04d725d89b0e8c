"""The error for bad input, one line that names the value and the remedy, and checks that many modules need."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral


class ItaeError(ValueError):
    """Bad input, described in one line that names the wrong value and the remedy."""


def unknown_name(kind: str, name: str, known: Iterable[str], see: str) -> ItaeError:
    """Return an `ItaeError` that suggests the closest names among `known` and says where names are listed, by `see`."""
    known = {each.casefold(): each for each in known}
    close = [known[each] for each in difflib.get_close_matches(name.casefold(), known, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return ItaeError(f"unknown {kind} {name!r}: {hint}{see}")


def whole_number(name: str, value: object, least: int) -> int:
    """Return the value of a parameter as an int.

    Raises:
        ItaeError: it is not a whole number of at least `least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ItaeError(f"{name}={value!r} must be a whole number of at least {least}")
    return int(value)
