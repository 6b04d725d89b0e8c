"""Downloads that end in a whole, checked file or in one clear line: resumed, timed out, renamed at the last moment."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TypeVar

from filelock import FileLock
from tqdm import tqdm

from itae_utils.errors import ItaeError

NETWORK_TIMEOUT = 8.0  # seconds: an offline machine hears within 10 what to do instead
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Archive:
    """A file to download: `size` in bytes where we know it."""

    url: str
    filename: str
    md5: str
    size: int | None = None


@contextmanager
def one_at_a_time(folder: Path, name: str) -> Iterator[None]:
    """While open, no other process is between these lines for this name: it waits, then finds what this one made.

    Raises:
        ItaeError: the folder can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ItaeError(f"the download folder {folder} can't be made ({error.strerror}): give another root") from error
    with FileLock(folder / f".{name}.lock"):
        yield


def fetch(archive: Archive, folder: Path) -> Path:
    """`archive` in `folder`, checked; what a broken-off download left behind is continued. Call it `one_at_a_time`."""
    path = folder / archive.filename
    part = path.with_name(path.name + ".part")
    by_hand = f"put that file (MD5 {archive.md5}) into {folder} and run again"
    if path.is_file():
        if _md5(path) != archive.md5:
            raise ItaeError(f"{path} is damaged, its MD5 is not {archive.md5}: delete it and run again")
        return path
    try:
        _download(archive, part)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ItaeError(f"can't download {archive.url} ({reason}): if it stays so, {by_hand}") from error
    if (found := _md5(part)) != archive.md5:
        part.unlink()
        raise ItaeError(f"{archive.url} gave a file with MD5 {found}, which was deleted: run again, or {by_hand}")
    return part.replace(path)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def _download(archive: Archive, part: Path) -> None:
    """The rest of `archive.url` onto the end of `part`; OSError if it doesn't come whole."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = within(NETWORK_TIMEOUT, urllib.request.urlopen, request, timeout=NETWORK_TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is left to get; the checksum decides
        raise
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0
        total = None if response.length is None else have + response.length
        if archive.size and total not in (None, archive.size):  # a log-in page, say: keep it away from `part`
            raise OSError(f"the server offers {total:,} bytes instead of {archive.size:,}")
        progress = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=archive.filename, disable=None)
        with part.open("ab" if have else "wb") as file, progress:
            while chunk := response.read(1 << 18):
                file.write(chunk)
                progress.update(len(chunk))
            if total is not None and file.tell() < total:
                raise OSError(f"the connection was cut at {file.tell():,} of {total:,} bytes")


def within(seconds: float, ask: Callable[..., Answer], *args: object, **options: object) -> Answer:
    """`ask(*args, **options)`, or an OSError after `seconds`, a true limit: the clients' own count no name look-ups."""
    answered: Future = Future()

    def run() -> None:
        try:
            answered.set_result(ask(*args, **options))
        except Exception as error:
            answered.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return answered.result(timeout=seconds)
    except TimeoutError as error:
        if answered.done():
            raise
        raise OSError(f"no answer within {seconds:g} s") from error


def unpack(archive: Path, prefixes: tuple[str, ...], folder: Path) -> None:
    """The members of a zip that start with one of `prefixes`, all of them or nothing, as `folder` beside it."""
    scratch = Path(tempfile.mkdtemp(prefix="unpacking-", dir=folder.parent))
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(scratch, [name for name in file.namelist() if name.startswith(prefixes)])
        (scratch / folder.name).rename(folder)
    finally:
        shutil.rmtree(scratch)
