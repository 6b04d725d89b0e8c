"""Image folders: find the files, check and open them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from itae_utils.errors import ItaeError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"})

Contents = tuple[Sequence, np.ndarray | None, list[str] | None]  # images (arrays or paths), targets, classes


def open_image(path: Path) -> Image.Image:
    """Open an image file as RGB: upright by its EXIF data, without transparency, 16-bit grey scaled to 8 bits.

    Raises:
        ItaeError: the file cannot be decoded; the message names it.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow would clip these at 255, to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"mode {image.mode} has no known range, save it with 8 bits")
            # via RGBA, because Pillow warns about palettes with transparency
            return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ItaeError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ItaeError(f"can't read the image {path} ({reason}): repair or remove it, or leave out unreadable files with "
                     "on_error='skip' (in a report: -p on_error skip)")


def check_header(path: Path) -> None:
    """Raise an `ItaeError` that names the file if its header shows that it cannot be read."""
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:  # as in open_image
        raise _unreadable(path, error) from error


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
    paths = [path for path in _files_below(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise ItaeError(f"the image folder {folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
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
