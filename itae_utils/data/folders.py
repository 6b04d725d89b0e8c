"""Image folders: finding the files, opening and checking them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from itae_utils.errors import ItaeError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"})

Contents = tuple[Sequence, np.ndarray | None, list[str] | None]  # images (arrays or paths), targets, classes


def open_image(path: Path) -> Image.Image:
    """The image in a file as RGB: upright as its EXIF data says, without transparency, 16-bit grey scaled to 8 bits.

    Raises:
        ItaeError: the file can't be decoded (the path is named).
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow would clip these at 255, to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise ValueError(f"mode {image.mode} has no known range, save it with 8 bits")
            # by way of RGBA: Pillow warns about palettes with transparency otherwise
            return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ItaeError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ItaeError(f"can't read the image {path} ({reason}): mend or remove it, or leave such files out by "
                     "on_error='skip' (in a report: -p on_error skip)")


def check_header(path: Path) -> None:
    """Refuse an image whose header tells that it can't be read; the path is named."""
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:  # as in open_image
        raise _unreadable(path, error) from error


def readable(
    paths: list[Path], targets: np.ndarray | None, on_error: str
) -> tuple[list[Path], np.ndarray | None, list[Path]]:
    """The `paths` and `targets` that can be used, and the paths that can't: by header, with "skip" by decoding."""
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
        raise ItaeError(f"none of the {len(paths):,} images can be read, {paths[0]} for one: check the files")
    kept, skipped = ([path for path, ok in zip(paths, good, strict=True) if ok == wanted] for wanted in (True, False))
    return kept, None if targets is None else targets[good], skipped


def image_folder(name: str) -> Path | None:
    """The folder that a data set's name names, PATH of `imagefolder:PATH`; None for other names."""
    kind, _, folder = name.partition(":")
    return Path(folder).expanduser() if kind == "imagefolder" and folder else None


def read_folder(folder: Path) -> Contents:
    """The images below a folder as paths, with their classes where it has several class folders.

    Raises:
        ItaeError: it is missing, holds no image, or images on two levels.
    """
    if not folder.is_dir():
        raise ItaeError(f"the image folder {folder} {'is a file' if folder.exists() else 'does not exist'}: "
                        "give a folder of class folders, or of images")
    paths = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in files
                  if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")]
    if not paths:
        raise ItaeError(f"the image folder {folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    paths.sort(key=lambda path: path.relative_to(folder).parts)
    loose = [path for path in paths if path.parent == folder]
    if len(loose) == len(paths):
        return paths, None, None
    if loose:
        raise ItaeError(f"the image folder {folder} holds images beside its class folders, {loose[0].name} for one: "
                        "move them into a class folder or out of it")
    labels = [path.relative_to(folder).parts[0] for path in paths]
    classes, targets = np.unique(labels, return_inverse=True)
    if len(classes) == 1:
        return paths, None, None  # tells nothing apart
    return paths, targets.astype(np.int64), classes.tolist()
