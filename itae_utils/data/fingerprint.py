"""A SHA-256 that identifies a set of images or files by their content."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from itae_utils.data.folders import image_folder
from itae_utils.environment import cache_folder
from itae_utils.errors import ItaeError
from itae_utils.files import replacing

RACY = 2e9  # nanoseconds: a file changed this recently may change again within the resolution of its time stamp

FileHash = tuple[int, int, int, int, str]  # size, times of modification and of change (ns), inode, SHA-256


def fingerprint(dataset: Dataset) -> str | None:
    """Return the SHA-256 over the name, label and content of every image, in the data set's order.

    Files are named by their path below the data set's folder, arrays by index, shape and type, contents of files by
    index. File hashes are cached, see `files_digest`. Return None if the data set has no `images`.

    Raises:
        ItaeError: `images` are not paths, arrays or bytes; their number differs from that of `targets`; or a file can't
            be read.
    """
    lines = _lines(dataset)
    return _digest(lines) if lines else None


def image_hashes(dataset: Dataset) -> list[str]:
    """Return a hash of every image with its label, in 16 characters each; an empty list if `fingerprint` returns None.

    The name of a file counts, but not the place of an image in memory, which is another one in a sample.
    """
    lines = _lines(dataset)
    if lines and not isinstance(dataset.images[0], (str, Path)):
        lines = [line.partition("\t")[2] for line in lines]
    return [_digest([line])[:16] for line in lines]


def _lines(dataset: Dataset) -> list[str]:
    images, labels = getattr(dataset, "images", None), getattr(dataset, "targets", None)
    if images is None or not len(images):
        return []
    labels = [-1] * len(images) if labels is None else labels
    if len(labels) != len(images):
        raise ItaeError(f"the data set has {len(images):,} .images and {len(labels):,} .targets: "
                        "give one target per image")
    if isinstance(images[0], (str, Path)):
        paths = [Path(os.path.abspath(path)) for path in images]
        hashes = _hash_files(paths, _root(getattr(dataset, "name", ""), paths))
    else:
        hashes = map(_hash_in_memory, range(len(images)), images)
    return [f"{name}\t{label}\t{sha256}\n" for (name, sha256), label in zip(hashes, labels, strict=True)]


def files_digest(paths: Iterable[str | Path], folder: str | Path) -> str | None:
    """Return the SHA-256 over the names below `folder` and the contents of files, in any order; None for no files.

    File hashes are cached in `cache_folder()` with size, times and inode: an unchanged file is read once. The time of
    change (ctime) shows that a file was rewritten in place, even if its modification time was set back.
    """
    hashes = _hash_files([Path(os.path.abspath(path)) for path in paths], Path(os.path.abspath(folder)))
    return _digest(f"{name}\t{sha256}\n" for name, sha256 in sorted(hashes)) if hashes else None


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, cached as in `files_digest`."""
    path = Path(os.path.abspath(path))
    return _hash_files([path], path.parent)[0][1]


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _root(name: str, paths: Sequence[Path]) -> Path:
    """Return the folder of a data set: PATH of `imagefolder:PATH`, else the common one of its files."""
    folder = image_folder(name)
    if folder and all(path.is_relative_to(folder) for path in paths):
        return folder
    return Path(os.path.commonpath([path.parent for path in paths]))


def _hash_in_memory(index: int, image: np.ndarray | bytes) -> tuple[str, str]:
    if isinstance(image, bytes):
        return str(index), hashlib.sha256(image).hexdigest()
    if isinstance(image, np.ndarray):
        return f"{index} {image.shape} {image.dtype}", hashlib.sha256(np.ascontiguousarray(image)).hexdigest()
    raise ItaeError(f"a data set's .images must be paths, arrays or bytes, not {type(image).__name__}")


def _hash_files(paths: Sequence[Path], root: Path) -> list[tuple[str, str]]:
    """Return the name below `root` and the SHA-256 of each file, both absolute paths."""
    cache = cache_folder() / "fingerprints" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.json"
    cached = _read_cache(cache)
    names = [path.relative_to(root).as_posix() for path in paths]
    with ThreadPoolExecutor() as pool:
        found = dict(zip(names, pool.map(_hash_file, paths, map(cached.get, names)), strict=True))
    settled = {name: entry for name, entry in found.items() if time.time_ns() - max(entry[1:3]) > RACY}
    if any(cached.get(name) != entry for name, entry in settled.items()):
        _write_cache(cache, cached | settled)
    return [(name, found[name][-1]) for name in names]


def _hash_file(path: Path, cached: FileHash | None) -> FileHash:
    """Hash a file, unless its size, times and inode are the cached ones."""
    try:
        status = path.stat()
        state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        if cached and cached[:-1] == state:
            return cached
        with path.open("rb") as file:
            return *state, hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ItaeError(f"can't read the file {path} ({error.strerror}): restore it, or load the data again") from error


def _read_cache(cache: Path) -> dict[str, FileHash]:
    try:
        return {name: tuple(entry) for name, entry in json.loads(cache.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # missing or damaged: all files are read


def _write_cache(cache: Path, entries: dict[str, FileHash]) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as part:
            part.write_text(json.dumps(entries), encoding="utf-8")
    except OSError:
        return  # without the cache, files are only read again
