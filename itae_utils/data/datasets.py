"""Image data sets by name: the object, its loader, and their size."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from itae_utils.data.folders import Contents, image_folder, read_files, read_folder, readable, split_kind, take
from itae_utils.data.huggingface import PREFIX, place_and_split, read_rows
from itae_utils.data.images import open_image, shown
from itae_utils.data.published import DATASETS, unpacked_folder
from itae_utils.environment import data_folder
from itae_utils.errors import ItaeError, unknown_name, whole_number

FILES = "image files"  # the name of a data set from a list of paths


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """A map-style data set of (PIL RGB image, int label) for torch's `DataLoader`; the label is -1 without labels.

    Attributes:
        name: the name of the data set, as `dataset_name` writes it.
        split: a description of the part of the data used, with its size.
        source: a description of where the images come from.
        images: uint8 arrays (H, W) or (H, W, 3), paths of files, or contents of files.
        targets: (n,) int64, or None without labels.
        classes: the name of each label, or None without labels.
        skipped: unreadable files that were left out.
        notes: sentences on what was chosen and what was left out.
        names: the path of each file below the data set's folder, or None for images that are not files.
    """

    name: str
    split: str
    source: str
    images: Sequence
    targets: np.ndarray | None
    classes: list[str] | None
    skipped: list[Path | str] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    names: list[str] | None = None

    def __repr__(self) -> str:
        labels = "no labels" if self.classes is None else f"{len(self.classes):,} classes"
        return f"<ImageDataset {self.name}: {len(self):,} images, {labels}>"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = self.images[index]
        image = open_image(image) if isinstance(image, (Path, bytes)) else Image.fromarray(image).convert("RGB")
        return image, -1 if self.targets is None else int(self.targets[index])


def load_dataset(
    name: str | Path | Sequence[str | Path],
    *,
    split: str | None = None,
    root: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageDataset:
    """Load one of `DATASETS`, a folder of images or a Hugging Face data set; downloads are made on first use.

    Args:
        name: a key of `DATASETS`; capitals, dashes and underscores do not matter. The path of a folder, or
            `imagefolder:PATH`, reads class folders, or images without labels. `hf:NAME` or `hf:FOLDER` reads a data set
            of the package `datasets`. A list of paths is a data set of these image files, without labels.
        split: "train" is the training split of CIFAR-10, CIFAR-100, STL-10 and Tiny-ImageNet; their default is the test
            split, or validation for Tiny-ImageNet. Of a folder or a Hugging Face data set, any split; by default the
            test split, else the validation split, else the only one. "digits" has one split.
        root: the folder for downloads, by default ITAE_DATA or ~/.cache/itae/data.
        limit: the largest number of images. The subset keeps the images' order and each class's share, to within one
            image.
        seed: seed of the random choice that `limit` makes.
        on_error: "skip" decodes every file first and leaves out unreadable ones, see `.skipped`. "raise" checks the
            headers first; a file that is damaged further on raises when it is decoded.
        image_column: the column of images of a Hugging Face data set, needed if it has several.
        label_column: the column of labels, likewise.

    Raises:
        ItaeError: an argument is not valid; the folder is missing, holds no image, or holds images beside class
            folders; there is no such split or column; an image is unreadable; a download fails.
    """
    if on_error not in ("raise", "skip"):
        raise ItaeError(f"on_error={on_error!r} is not valid: use 'raise' or 'skip'")
    limit, seed = limit if limit is None else whole_number("limit", limit, 1), whole_number("seed", seed, 0)
    for option, value in (("split", split), ("image_column", image_column), ("label_column", label_column)):
        if not isinstance(value, str | None):
            raise ItaeError(f"{option}={value!r} is not a name: give text")
    if not isinstance(root, str | Path | None):
        raise ItaeError(f"root={root!r} is not a folder: give a path")
    if name and isinstance(name, (list, tuple)) and all(isinstance(each, str | Path) for each in name):
        part = _part(FILES, split, image_column=image_column, label_column=label_column)
        name, contents = FILES, read_files(name, part)
    else:
        name = dataset_name(name)
        contents = read_contents(name, split, root, image_column, label_column)
    images, targets, skipped, notes = contents.images, contents.targets, [], contents.notes
    if isinstance(images[0], (Path, bytes)):
        images, targets, unreadable, more = readable(images, targets, on_error)
        skipped = [image if isinstance(image, Path) else image.name for image in unreadable]
        notes += more
    left_out = f" of {len(images) + len(skipped):,} files, the others unreadable" if skipped else ""
    info = DATASETS.get(name)
    split = f"{contents.split or 'all'} ({len(images):,}{left_out})"
    if limit is not None and limit < len(images):
        chosen = _choose(len(images), targets, limit, seed)
        images = take(images, chosen)
        targets = None if targets is None else targets[chosen]
        split = f"{limit:,} of {split}, drawn with seed {seed}"
    if name.startswith(PREFIX):
        source = f"the Hugging Face data set {shown(place_and_split(name)[0])}"
    else:
        source = info.origin if info else f"the folder {shown(contents.folder)}"
    names = contents.folder and [shown(path.relative_to(contents.folder).as_posix()) for path in images]
    return ImageDataset(name, split, source, images, targets, contents.classes, skipped, notes, names)


def dataset_name(text: str | Path) -> str:
    """Return the name of a data set in its one spelling: "cifar10" for "CIFAR-10", "imagefolder:PATH" for a folder.

    Raises:
        ItaeError: there is no such data set or folder, or both.
    """
    if not isinstance(text, str | os.PathLike) or not os.fspath(text):
        raise ItaeError(f"{str(text)[:80]!r} ({type(text).__name__}) does not name a data set: give a name of `itae "
                        "datasets`, or the path of a folder")
    is_path, text = isinstance(text, os.PathLike), os.fspath(text)
    path, (kind, _, place) = os.path.abspath(os.path.expanduser(text)), text.partition(":")
    same = None if is_path or place else next((name for name in DATASETS if _plain(name) == _plain(text)), None)
    if text == same:
        return text
    if kind.casefold() == "imagefolder" and place:
        return f"imagefolder:{image_folder(f'imagefolder:{place}')}"
    if kind.casefold() == "hf" and place:
        place, split = place_and_split(f"{PREFIX}{place}")
        place = os.path.abspath(place) if os.path.isdir(place) else place
        return f"{PREFIX}{place}:{split}" if split else f"{PREFIX}{place}"
    if os.path.isdir(path):
        if same:
            raise ItaeError(f"{text!r} is a folder here and a spelling of {same}: write imagefolder:{text} or {same}")
        return f"imagefolder:{path}"
    if same:
        return same
    if os.path.exists(path):
        raise ItaeError(f"{text!r} is a file: give the folder of the images, or a name of `itae datasets`")
    if is_path or os.sep in text:
        raise ItaeError(f"there is no folder {text!r}: check the path, or write hf:NAME for a data set of the Hugging "
                        "Face hub")
    raise unknown_name("data set", text, DATASETS, see="`itae datasets` lists them all")


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]", "", name).casefold()


def read_contents(
    name: str, split: str | None = None, root: str | Path | None = None, image_column: str | None = None,
    label_column: str | None = None,
) -> Contents:
    """Return what the data set holds, its images not decoded; `name` is from `dataset_name`."""
    if name.startswith(PREFIX):
        return read_rows(name, split, image_column, label_column)
    part = _part(name, split, image_column=image_column, label_column=label_column)
    if folder := image_folder(name):
        return read_folder(folder, split)
    root = data_folder() if root is None else Path(os.path.expanduser(root))
    return DATASETS[name].read(root, part)._replace(split=part)


def _part(name: str, split: str | None, **columns: str | None) -> str | None:
    """Return the split of a data set of `DATASETS`, or `split` for others.

    Raises:
        ItaeError: there is no such split, or columns are given for a data set that has none.
    """
    for option, value in columns.items():
        if value is not None:
            raise ItaeError(f"{option}={value!r} is for Hugging Face data sets, not for {name}: leave it out")
    info = DATASETS.get(name)
    if info is None:
        return split
    parts = [info.split, *(["train"] if info.train else [])]
    for part in parts:
        if split is None or (split_kind(split) or split) == (split_kind(part) or part):
            return part
    known = " or ".join(map(repr, parts))
    raise ItaeError(f"split={split!r} is not available for {name}: use {known}, or leave it out")


def _choose(total: int, targets: np.ndarray | None, limit: int, seed: int) -> np.ndarray:
    """Return sorted indices of `limit` images, stratified by largest remainders; ties are broken at random."""
    rng = np.random.default_rng(seed)
    if targets is None:
        return np.sort(rng.permutation(total)[:limit])
    classes, counts = np.unique(targets, return_counts=True)
    quotas, remainders = np.divmod(counts * limit, total)
    largest = np.lexsort((rng.random(len(classes)), -remainders))
    quotas[largest[: limit - quotas.sum()]] += 1
    chosen = [rng.permutation(np.flatnonzero(targets == c))[:quota] for c, quota in zip(classes, quotas, strict=True)]
    return np.sort(np.concatenate(chosen))


def size(
    name: str, limit: int | None = None, split: str | None = None, **columns: str | None
) -> tuple[int | None, int | None]:
    """Return the numbers of images, at most `limit`, and of classes; None where they are unknown without the hub."""
    name = dataset_name(name)
    if _is_on_hub(name):
        place_and_split(name, split)  # refuses two different splits
        return None, None
    if name in DATASETS:
        info = DATASETS[name]
        images = info.train if _part(name, split, **columns) == "train" else info.images
        classes = info.classes
    else:
        contents = read_contents(name, split, **columns)
        images, classes = len(contents.images), contents.classes and len(contents.classes)
    return min(images, limit or images), classes


def download(name: str, split: str | None = None, **columns: str | None) -> None:
    """Download a data set into `data_folder()`, or into the cache of `datasets`, unless it is there.

    Raises:
        ItaeError: the download fails.
    """
    name = dataset_name(name)
    folder = unpacked_folder(name)
    is_train = name in DATASETS and _part(name, split, **columns) == "train"  # Tiny-ImageNet's is unpacked by itself
    if _is_on_hub(name) or is_train or (folder and not folder.is_dir()):
        read_contents(name, split, **columns)


def _is_on_hub(name: str) -> bool:
    return name.startswith(PREFIX) and not os.path.isdir(place_and_split(name)[0])
