"""Write files in one step, so that no reader and no crash sees half of one."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from itae_utils.errors import ItaeError

PACKAGE = Path(str(resources.files("itae_utils")))  # an ordinary folder: the package does not run from a zip
OUTPUT_MARK = ".itae-output"  # an empty file in a folder that a report writes to: image folders leave such folders out


def make_folder(folder: str | Path, *, mark: bool = False) -> Path:
    """Make `folder` and its parents if they are missing; with `mark`, also an empty file `OUTPUT_MARK` in it.

    Raises:
        ItaeError: the folder can't be made or written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if mark:
            (Path(folder) / OUTPUT_MARK).touch()
    except OSError as error:
        raise ItaeError(f"output folder {str(folder)!r} can't be made ({error.strerror}): choose another") from error
    return Path(folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; replace `path` by that file when the block ends, or delete it if the block fails.

    Several writers may replace one `path` at the same time: the last one to end wins.
    """
    # Not tempfile.mkstemp: only their owner may read its files, and the umask can't be read safely with threads.
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write `content` as JSON, replacing the file in one step."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def in_one_line(error: Exception | str, longest: int = 200) -> str:
    """Return an error's message in one line, or its type if it has none; a long one is cut in its middle."""
    line, end = " ".join(str(error).split()) or type(error).__name__, longest // 3
    return line if len(line) <= longest else f"{line[:longest - end - 3]} … {line[-end:]}"
