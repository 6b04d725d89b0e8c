"""One number for a set of images: equal exactly where the images, their labels and their names are."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from itae_utils.environment import cache_folder
from itae_utils.errors import ItaeError
from itae_utils.files import replacing

RACY = 2e9  # nanoseconds: a file changed so lately may change again without a new time


def fingerprint(dataset: Dataset) -> str | None:
    """Return the SHA-256 over name, label and SHA-256 of the bytes of every image, in the data set's order; or None.

    Files are named by their path below the data set's folder, images in memory by their place, shape and type. The
    hashes of files are kept in `cache_folder()` with size, time of change and inode, so an unchanged file is read
    once. A data set that says nothing of its `images` has no fingerprint.

    Raises:
        ItaeError: `images` that are neither paths nor arrays, or not as many as labels and items.
    """
    images, labels = getattr(dataset, "images", None), getattr(dataset, "targets", None)
    if images is None or not len(images):
        return None
    labels = [-1] * len(images) if labels is None else labels
    if len(labels) != len(images):
        raise ItaeError(f"a data set has {len(images):,} .images and {len(labels):,} .targets: give it as many")
    if isinstance(images[0], (str, Path)):
        named = _of_files(getattr(dataset, "name", ""), list(map(Path, images)))
    elif all(isinstance(image, np.ndarray) for image in images):
        named = _of_arrays(images)
    else:
        raise ItaeError(f"a data set's .images must be paths or arrays, not {type(images[0]).__name__}")
    lines = [f"{name}\t{int(label)}\t{digest}\n" for (name, digest), label in zip(named, labels, strict=True)]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _of_arrays(images: np.ndarray | list[np.ndarray]) -> Iterator[tuple[str, str]]:
    for index, image in enumerate(images):
        yield f"{index} {image.shape} {image.dtype}", hashlib.sha256(np.ascontiguousarray(image)).hexdigest()


def _of_files(name: str, paths: list[Path]) -> list[tuple[str, str]]:
    paths = [Path(os.path.abspath(path)) for path in paths]
    kind, _, folder = name.partition(":")
    root = (Path(os.path.abspath(Path(folder).expanduser())) if kind == "imagefolder"
            else Path(os.path.commonpath([path.parent for path in paths])))
    memory = cache_folder() / "fingerprints" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.json"
    known = _remembered(memory)
    names = [path.relative_to(root).as_posix() for path in paths]
    with ThreadPoolExecutor() as pool:
        seen = dict(zip(names, pool.map(lambda path, name: _seen(path, known.get(name)), paths, names), strict=True))
    settled = {name: entry for name, entry in seen.items() if time.time_ns() - entry[1] > RACY}
    if any(known.get(name) != entry for name, entry in settled.items()):
        _remember(memory, known | settled)
    return [(name, seen[name][-1]) for name in names]


def _seen(path: Path, known: tuple | None) -> tuple[int, int, int, str]:
    """Size, time of change, inode and SHA-256 of a file, which is only read where the first three are new."""
    status = path.stat()
    state = (status.st_size, status.st_mtime_ns, status.st_ino)
    if known and known[:3] == state:
        return known
    with path.open("rb") as file:
        return *state, hashlib.file_digest(file, "sha256").hexdigest()


def _remembered(memory: Path) -> dict[str, tuple]:
    try:
        return {name: tuple(entry) for name, entry in json.loads(memory.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # nothing yet, or damaged: the files are read


def _remember(memory: Path, entries: dict[str, tuple]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with replacing(memory) as part:
            part.write_text(json.dumps(entries), encoding="utf-8")
    except OSError:
        return  # a cache that can't be written only costs time
