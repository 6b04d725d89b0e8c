"""Image folders: find the images, tell classes from splits, and check that the files can be read."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from itae_utils.data.images import ImageSource, check_header, image_suffixes, name_of, open_image, shown
from itae_utils.errors import ItaeError
from itae_utils.files import OUTPUT_MARK

# Folders and files that systems and programs make beside a user's images, in lower case.
SYSTEM_NAMES = frozenset({"@eadir", "@recycle", "#recycle", "__macosx", "$recycle.bin", "lost+found",
                          "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
READERS = dict.fromkeys((".heic", ".heif", ".hif"), "install pillow-heif to read them") | {
    ".jxl": "install pillow-jxl-plugin to read them"} | dict.fromkeys(
    (".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"),
    "camera raw: rawpy converts them")
MOST_ENDINGS = 10  # in a message
SPLIT_NAME = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<validation>val(?:id(?:ation)?)?|eval(?:uation)?|dev(?:elopment)?)"
    r"|(?P<test>test(?:ing)?))(?:[ _.-]?(?:set|split|data|images?|imgs|\d{4}))*", re.IGNORECASE)


class Contents(NamedTuple):
    """What a data set holds.

    Attributes:
        images: uint8 arrays, paths of files, or encoded images.
        targets: (n,) int64, or None without labels.
        classes: the name of each label, or None without labels.
        split: the split that was chosen, or None if there is nothing to choose from.
        notes: sentences on what was chosen and what was left out.
        folder: the folder that the names of files are relative to.
    """

    images: Sequence
    targets: np.ndarray | None
    classes: list[str] | None
    split: str | None = None
    notes: tuple[str, ...] = ()
    folder: Path | None = None


def readable(
    images: Sequence[ImageSource], targets: np.ndarray | None, on_error: str
) -> tuple[Sequence[ImageSource], np.ndarray | None, list[ImageSource], tuple[str, ...]]:
    """Return the readable images and their targets, the other images, and notes.

    With `on_error="raise"` only the headers are checked; with "skip" every image is decoded.
    """
    def check(index: int) -> bool | ItaeError:
        image = images[index]
        try:
            has_alpha = check_header(image)
            if on_error == "skip":
                open_image(image)
        except ItaeError as error:
            if on_error == "raise":
                raise
            return error
        return has_alpha

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(check, range(len(images))))
    good = np.array([not isinstance(each, ItaeError) for each in found])
    if not good.any():
        raise ItaeError(f"none of the {len(images):,} images can be read; the first: {found[0]}")
    notes, skipped = [], [images[index] for index in np.flatnonzero(~good)]
    if alpha := found.count(True):
        notes.append(f"{alpha:,} of {len(images):,} images have an alpha channel. Transparent parts become white.")
    if skipped:
        notes.append(f"{len(skipped):,} of {len(images):,} images can't be read and are left out. The first is "
                     f"{name_of(skipped[0])}.")
    return take(images, np.flatnonzero(good)), None if targets is None else targets[good], skipped, tuple(notes)


def take(images: Sequence, indices: np.ndarray) -> Sequence:
    """Return the images at `indices`."""
    return [images[index] for index in indices] if isinstance(images, list) else images[indices]


def image_folder(name: str) -> Path | None:
    """Return PATH, absolute, if a data set is called `imagefolder:PATH`, else None."""
    kind, _, folder = name.partition(":")
    return Path(os.path.abspath(os.path.expanduser(folder))) if kind == "imagefolder" and folder else None


def read_folder(folder: Path, split: str | None = None) -> Contents:
    """Return the images below a folder as paths, with their classes if it has two class folders or more.

    Of folders called train, val and test, or similar, one is read, see `choose_split`. A single folder above the class
    folders is followed. Links to folders are followed, but each folder is read once: by its own path if that lies
    below `folder`, else by the first link to it. A link to a file counts as a file of its own. Hidden files and
    folders, those of the system and folders that a report was written to are left out.

    Raises:
        ItaeError: the folder is missing or can't be read, holds no image, or holds images beside its class folders;
            or `split` is not one of its splits.
    """
    if not os.path.isdir(folder):  # unlike pathlib's, it takes any text
        state = "is a file" if os.path.exists(folder) else "does not exist"
        raise ItaeError(f"the image folder {shown(folder)} {state}: give a folder of class folders, or of images")
    files = sorted((path.relative_to(folder).parts, path) for path in _files_below(folder))
    suffixes, notes, chosen = image_suffixes(), [], None
    hidden = sum(not _is_users(path.name) and path.suffix.lower() in suffixes for _, path in files)
    files = [(parts, path) for parts, path in files if _is_users(path.name)]
    level = _split_level([parts for parts, path in files if path.suffix.lower() in suffixes])
    if level is not None:
        names = sorted({parts[level] for parts, path in files if path.suffix.lower() in suffixes})
        chosen = choose_split([name for name in names if split_kind(name)], split, f"the image folder {shown(folder)}")
        files = [(parts[:level] + parts[level + 1:], path) for parts, path in files
                 if len(parts) <= level + 1 or parts[level] == chosen]
        notes.append(split_note(chosen, set(names) - {chosen}))
    elif split not in (None, "all"):
        raise ItaeError(f"split={split!r} is not available: the image folder {shown(folder)} has no folders such as "
                        "train, val and test")
    images = [(parts, path) for parts, path in files if path.suffix.lower() in suffixes]
    left_out = _by_ending([path for _, path in files if path.suffix.lower() not in suffixes])
    if not images:
        raise ItaeError(f"the image folder {shown(folder)} holds no image, such as a .jpg or .png file"
                        + (f"; it holds {left_out}" if left_out else ""))
    if left_out:
        notes.append(f"Files that are not read as images: {left_out}.")
    if hidden:
        notes.append(f"Hidden image files that are left out: {hidden:,}.")
    depth, deepest = 0, min(len(parts) for parts, _ in images) - 1
    while depth < deepest and len({parts[depth] for parts, _ in images}) == 1:
        depth += 1
    above, paths = shown("/".join(images[0][0][:depth])), [path for _, path in images]
    if depth < deepest:
        if depth:
            notes.append(f"The classes are the folders below {above}.")
        classes, targets = np.unique([parts[depth] for parts, _ in images], return_inverse=True)
        return Contents(paths, targets.astype(np.int64), list(map(shown, classes)), chosen, tuple(notes), folder)
    loose = [path.name for parts, path in images if len(parts) == 1]
    if depth:
        notes.append(f"All images are in one folder, {above}, which gives no labels.")
    elif len(loose) < len(images):
        raise ItaeError(f"the image folder {shown(folder)} holds images beside its class folders, such as "
                        f"{shown(loose[0])}: move them into a class folder or elsewhere")
    return Contents(paths, None, None, chosen, tuple(notes), folder)


def read_files(paths: Sequence[str | Path], split: str | None = None) -> Contents:
    """Return image files as a data set without labels; their names are below the deepest folder that holds them all.

    Raises:
        ItaeError: a path is not that of a file, or a split is given.
    """
    files = [Path(os.path.abspath(os.path.expanduser(path))) for path in paths]
    for path in files:
        if not path.is_file():
            raise ItaeError(f"{shown(path)} is a folder: give files, or the data set imagefolder:{shown(path)}"
                            if path.is_dir() else f"there is no file {shown(path)}: check the path")
    if split is not None:
        raise ItaeError(f"split={split!r} is not available for image files: leave it out")
    once = list(dict.fromkeys(files))
    notes = (f"Paths that are given again: {len(files) - len(once):,}.",) * (len(once) < len(files))
    return Contents(once, None, None, None, notes, Path(os.path.commonpath([path.parent for path in once])))


def _split_level(images: Sequence[Sequence[str]]) -> int | None:
    """Return the level of folders at which all images are in split folders: the first, or below one level of classes.

    At that level, all folders are called like splits, or some are called like different ones.
    """
    levels_of_several = 0
    for level in range(min(map(len, images), default=0) - 1):
        names = {parts[level] for parts in images}
        kinds = {split_kind(name) for name in names}
        if None not in kinds or len(kinds) > 2:
            return level
        levels_of_several += len(names) > 1
        if levels_of_several > 1:
            return None
    return None


def split_kind(name: str) -> str | None:
    """Return "train", "validation" or "test" for the name of a split such as "Training" or "val2017", else None."""
    match = SPLIT_NAME.fullmatch(name)
    return match.lastgroup if match else None


def choose_split(names: Sequence[str], asked: str | None, owner: str) -> str:
    """Return the split that is asked for, in its spelling among `names`; by default the test split.

    Without a test split, the default is the validation split, and else the only one.

    Raises:
        ItaeError: `owner` has no such split, or several that may be meant.
    """
    if asked is None:
        rules = [lambda name: split_kind(name) == "test", lambda name: split_kind(name) == "validation", bool]
    else:
        rules = [asked.__eq__, lambda name: name.casefold() == asked.casefold(),
                 lambda name: split_kind(name) is not None and split_kind(name) == split_kind(asked)]
    found = next(filter(None, ([name for name in names if rule(name)] for rule in rules)), [])
    if len(found) == 1:
        return found[0]
    wanted = f"no split {asked!r}" if not found else "several splits"
    raise ItaeError(f"{owner} has {wanted}: choose one as split, {shown(' or '.join(found or names))}")


def split_note(chosen: str, others: Collection[str]) -> str:
    """Return a sentence that names the split which is read, and what beside it is not."""
    beside = f", not {shown(' or '.join(sorted(others)))}" if others else ""
    return f"The split {shown(chosen)} is read{beside}."


def _by_ending(paths: Sequence[Path]) -> str:
    """Return how many files have which ending, with what would read them, such as "3 .heic (install …), 2 .txt"."""
    counts = Counter(path.suffix.lower() for path in paths)
    order = sorted(counts, key=lambda suffix: (suffix not in READERS, -counts[suffix], suffix))
    parts = [f"{counts[suffix]:,} {shown(suffix) or 'without an ending'}"
             + (f" ({READERS[suffix]})" if suffix in READERS else "") for suffix in order[:MOST_ENDINGS]]
    if rest := sum(counts[suffix] for suffix in order[MOST_ENDINGS:]):
        parts.append(f"{rest:,} others")
    return ", ".join(parts)


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, but not those of hidden folders. Linked folders come last; none is read twice."""
    def refuse(error: OSError) -> None:
        raise ItaeError(f"can't read the folder {shown(error.filename)} ({error.strerror}): change its permissions, or "
                        "move it elsewhere")

    visited, starts = set(), [folder]
    for start in starts:
        for parent, folders, files in os.walk(start, onerror=refuse):  # does not follow links, except `start` itself
            status = os.stat(parent)
            is_output = OUTPUT_MARK in files and parent != os.fspath(folder)
            if (status.st_dev, status.st_ino) in visited or is_output:
                folders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            folders[:] = sorted(filter(_is_users, folders))
            starts += [Path(parent, name) for name in folders if os.path.islink(Path(parent, name))]
            yield from (Path(parent, name) for name in files)


def _is_users(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in SYSTEM_NAMES
