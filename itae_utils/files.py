"""Files that are replaced in one step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from itae_utils.errors import ItaeError

PACKAGE = Path(str(resources.files("itae_utils")))  # an ordinary folder: nothing here runs from an archive


def make_folder(folder: str | Path) -> Path:
    """Make `folder` where it is missing.

    Raises:
        ItaeError: it can't be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ItaeError(f"output folder {str(folder)!r} can't be made ({error.strerror}): name another") from error
    return Path(folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends well and vanishes when it doesn't."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write JSON in one step."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def in_one_line(error: Exception) -> str:
    """What an error says, short."""
    return " ".join(str(error).split())[:200] or type(error).__name__
