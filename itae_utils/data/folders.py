"""Image folders: find the files, and check that they can be read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from itae_utils.data.images import check_header, image_suffixes, open_image
from itae_utils.errors import ItaeError

Contents = tuple[Sequence, np.ndarray | None, list[str] | None]  # images (arrays or paths), targets, classes


def readable(
    paths: list[Path], targets: np.ndarray | None, on_error: str
) -> tuple[list[Path], np.ndarray | None, list[Path]]:
    """Return the paths and targets of the readable images, and the paths of the others.

    With `on_error="raise"` only the headers are checked; with "skip" every file is decoded.
    """
    if on_error == "raise":
        for path in paths:
            check_header(path)
        return paths, targets, []

    def decodes(path: Path) -> bool:
        try:
            open_image(path)
        except ItaeError:
            return False
        return True

    with ThreadPoolExecutor() as pool:
        good = np.fromiter(pool.map(decodes, paths), dtype=bool, count=len(paths))
    if not good.any():
        raise ItaeError(f"none of the {len(paths):,} images can be read, for example {paths[0]}: check the files")
    used, skipped = ([path for path, ok in zip(paths, good, strict=True) if ok == wanted] for wanted in (True, False))
    return used, None if targets is None else targets[good], skipped


def image_folder(name: str) -> Path | None:
    """Return PATH if a data set is called `imagefolder:PATH`, else None."""
    kind, _, folder = name.partition(":")
    return Path(folder).expanduser() if kind == "imagefolder" and folder else None


def read_folder(folder: Path) -> Contents:
    """Return the images below a folder as paths, with their classes if it has two class folders or more.

    Links to folders are followed, but each folder is read once: by its own path if that lies below `folder`, else by
    the first link to it. A link to a file counts as a file of its own.

    Raises:
        ItaeError: the folder is missing, holds no image, or holds images beside its class folders.
    """
    if not folder.is_dir():
        raise ItaeError(f"the image folder {folder} {'is a file' if folder.exists() else 'does not exist'}: "
                        "give a folder of class folders, or of images")
    suffixes = image_suffixes()
    paths = [path for path in _files_below(folder) if path.suffix.lower() in suffixes]
    if not paths:
        raise ItaeError(f"the image folder {folder} holds no image ({', '.join(sorted(suffixes))})")
    paths.sort(key=lambda path: path.relative_to(folder).parts)
    loose = [path for path in paths if path.parent == folder]
    if len(loose) == len(paths):
        return paths, None, None
    if loose:
        raise ItaeError(f"the image folder {folder} holds images beside its class folders, such as {loose[0].name}: "
                        "move them into a class folder or elsewhere")
    labels = [path.relative_to(folder).parts[0] for path in paths]
    classes, targets = np.unique(labels, return_inverse=True)
    if len(classes) == 1:
        return paths, None, None  # a single class distinguishes nothing
    return paths, targets.astype(np.int64), classes.tolist()


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, except hidden ones. Linked folders come last; no folder is read twice."""
    visited, starts = set(), [folder]
    for start in starts:
        for parent, folders, files in os.walk(start):  # does not follow links, except `start` itself
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in visited:
                folders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            starts += [Path(parent, name) for name in folders if os.path.islink(Path(parent, name))]
            yield from (Path(parent, name) for name in files if not name.startswith("."))
