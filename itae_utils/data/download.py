"""Download archives: resumable, with a time limit, checked, and renamed to their final name last."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TypeVar

from filelock import FileLock
from tqdm import tqdm

from itae_utils.environment import network_timeout
from itae_utils.errors import ItaeError

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Archive:
    """A file to download; `size` in bytes, if known."""

    url: str
    filename: str
    md5: str
    size: int | None = None


@contextmanager
def one_at_a_time(folder: Path, name: str) -> Iterator[None]:
    """Hold a lock file for `name` in `folder`, so that a second process waits and finds the first one's download.

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
    """Return the path of `archive` in `folder`, downloaded if missing; a partial download is resumed.

    Call it within `one_at_a_time`.

    Raises:
        ItaeError: the download fails, or the file's MD5 is wrong.
    """
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
        reason, remedy = getattr(error, "reason", error), "try again"
        if isinstance(reason, TimeoutError):
            reason, remedy = f"no answer within {network_timeout():g} s", "allow more seconds with ITAE_TIMEOUT"
        raise ItaeError(f"can't download {archive.url} ({reason}): {remedy}, or {by_hand}") from error
    if (found := _md5(part)) != archive.md5:
        part.unlink()
        raise ItaeError(f"{archive.url} gave a file with MD5 {found}, which was deleted: run again, or {by_hand}")
    return part.replace(path)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def _download(archive: Archive, part: Path) -> None:
    """Append the missing bytes of `archive` to `part`; raise OSError if they do not all arrive."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    seconds = network_timeout()
    try:
        response = within(seconds, urllib.request.urlopen, request, timeout=seconds)
    except urllib.error.HTTPError as error:
        error.close()
        if have and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # no byte is missing; the checksum decides
        raise
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0
        total = None if response.length is None else have + response.length
        if archive.size and total not in (None, archive.size):  # such as a log-in page: don't overwrite `part` with it
            raise OSError(f"the server offers {total:,} bytes instead of {archive.size:,}")
        progress = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=archive.filename, disable=None)
        with part.open("ab" if have else "wb") as file, progress:
            while chunk := response.read(1 << 18):
                file.write(chunk)
                progress.update(len(chunk))
            if total is not None and file.tell() < total:
                raise OSError(f"the connection was cut at {file.tell():,} of {total:,} bytes")


def within(seconds: float, ask: Callable[..., Answer], *args: object, **options: object) -> Answer:
    """Return `ask(*args, **options)`, or raise TimeoutError after `seconds`, DNS look-up included.

    HTTP clients' own timeouts leave the look-up out, so `ask` runs in a thread. An answer that arrives late is closed.
    """
    answer: futures.Future = futures.Future()

    def run() -> None:
        try:
            deliver, outcome = answer.set_result, ask(*args, **options)
        except Exception as error:
            deliver, outcome = answer.set_exception, error
        if answer.set_running_or_notify_cancel():
            deliver(outcome)
        elif hasattr(outcome, "close"):  # a response, or an HTTPError, which holds one
            outcome.close()

    Thread(target=run, daemon=True).start()
    try:
        futures.wait([answer], seconds)
    finally:  # also when interrupted
        late = answer.cancel()
    if late:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answer.result()


def unpack(archive: Path, prefixes: tuple[str, ...], name: str) -> None:
    """Extract the members of a zip that start with one of `prefixes`, all or none, into its folder `name` beside it."""
    scratch = Path(tempfile.mkdtemp(prefix="unpacking-", dir=archive.parent))
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(scratch, [name for name in file.namelist() if name.startswith(prefixes)])
        (scratch / name).rename(archive.parent / name)
    finally:
        shutil.rmtree(scratch)
