"""Image data sets by name: the registry, the loader, and how each one is downloaded and read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from itae_utils.data.download import Archive, fetch, one_at_a_time, unpack
from itae_utils.data.folders import Contents, image_folder, read_folder, readable
from itae_utils.data.images import open_image
from itae_utils.environment import data_folder
from itae_utils.errors import ItaeError, unknown_name


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A map-style data set of (PIL RGB image, int label) for torch's `DataLoader`; the label is -1 without labels.

    Attributes:
        name: the name given to `load_dataset`.
        split: a description of the part of the data used, with its size.
        source: a description of where the images come from.
        images: uint8 arrays (H, W) or (H, W, 3), or paths of files.
        targets: (n,) int64, or None without labels.
        classes: the name of each label, or None without labels.
        skipped: unreadable files that were left out.
    """

    name: str
    split: str
    source: str
    images: Sequence
    targets: np.ndarray | None
    classes: list[str] | None
    skipped: list[Path] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = self.images[index]
        image = open_image(image) if isinstance(image, Path) else Image.fromarray(image).convert("RGB")
        return image, -1 if self.targets is None else int(self.targets[index])


def load_dataset(
    name: str,
    *,
    root: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
) -> ImageDataset:
    """Load the test split of one of `DATASETS`, downloading it on first use.

    Args:
        name: a key of `DATASETS`. `imagefolder:PATH` is a folder of class folders, or a flat folder of images; a flat
            folder or a single class folder gives no labels.
        root: the folder for downloads, by default ITAE_DATA or ~/.cache/itae/data.
        limit: the largest number of images. The subset keeps the images' order and each class's share, to within one
            image.
        seed: seed of the random choice that `limit` makes.
        on_error: "skip" decodes every file first and leaves out unreadable ones, see `.skipped`. "raise" checks the
            headers first; a file that is damaged further on raises when it is decoded.

    Raises:
        ItaeError: the name, limit or on_error is not valid; the folder is missing, holds no image, or holds images
            beside class folders; an image is unreadable; a download fails.
    """
    if on_error not in ("raise", "skip"):
        raise ItaeError(f"on_error={on_error!r} is not valid: use 'raise' or 'skip'")
    if limit is not None and (not isinstance(limit, Integral) or isinstance(limit, bool) or limit < 1):
        raise ItaeError(f"limit={limit!r} is not a number of images: use a whole number from 1, or None for all")
    if name == "imagefolder:":
        raise ItaeError(f"{name!r} lacks a folder: write imagefolder:PATH")
    folder = image_folder(name)
    if folder is None and name not in DATASETS:
        raise unknown_name("data set", name, DATASETS, see="itae datasets")
    info = DATASETS[name if folder is None else "imagefolder:PATH"]
    images, targets, classes = info.read(folder or (data_folder() if root is None else Path(root).expanduser()))
    skipped = []
    if isinstance(images[0], Path):
        images, targets, skipped = readable(images, targets, on_error)
    left_out = f" of {len(images) + len(skipped):,} files, the others unreadable" if skipped else ""
    split = f"{info.split} ({len(images):,}{left_out})"
    if limit is not None and limit < len(images):
        chosen = _choose(len(images), targets, limit, seed)
        images = images[chosen] if isinstance(images, np.ndarray) else [images[index] for index in chosen]
        targets = None if targets is None else targets[chosen]
        split = f"{limit:,} of {split}, drawn with seed {seed}"
    source = info.origin if folder is None else f"the folder {name.partition(':')[2]}"
    return ImageDataset(name, split, source, images, targets, classes, skipped)


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


def _read_digits(_root: Path) -> Contents:
    # imported here, like torchvision below: `itae datasets` needs neither and answers at once without them
    from sklearn.datasets import load_digits

    digits = load_digits()
    # do not change this conversion: the demo backbone was trained on its output
    images = np.stack([np.round(image * (255 / 16)).astype(np.uint8) for image in digits.images])
    return images, digits.target.astype(np.int64), [str(name) for name in digits.target_names]


def _read_torchvision(class_name: str, root: Path, **split) -> Contents:
    """Read one of torchvision's data sets. Torchvision unpacks and checks it; `fetch` can also time out and resume."""
    from torchvision import datasets

    reader = getattr(datasets, class_name)
    try:
        data = reader(root, **split)
    except RuntimeError:  # missing or damaged
        with one_at_a_time(root, class_name):
            try:
                data = reader(root, **split)  # another process may have downloaded it by now
            except RuntimeError:
                fetch(Archive(reader.url, reader.filename, reader.tgz_md5), root)
                data = reader(root, **split, download=True)
    targets = data.labels if class_name == "STL10" else data.targets
    images = data.data.transpose(0, 2, 3, 1) if class_name == "STL10" else data.data
    return images, np.asarray(targets, dtype=np.int64), list(data.classes)


def _read_tiny_imagenet(root: Path) -> Contents:
    """Read the labelled validation split; classes are sorted by WordNet id and called by the first of their names."""
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():
        with one_at_a_time(root, folder.name):
            if not folder.is_dir():
                unpack(fetch(TINY_IMAGENET, root), ("tiny-imagenet-200/val/", "tiny-imagenet-200/words.txt"), folder)
    annotations, names = folder / "val/val_annotations.txt", folder / "words.txt"
    for needed in (annotations, names):
        if not needed.is_file():
            raise ItaeError(f"{needed} is missing: remove {folder} and run again to unpack it")
    rows = [line.split("\t") for line in annotations.read_text(encoding="utf-8").splitlines()]
    words = dict(line.split("\t", 1) for line in names.read_text(encoding="utf-8").splitlines())
    ids, targets = np.unique([row[1] for row in rows], return_inverse=True)
    paths = [folder / "val/images" / row[0] for row in rows]
    return paths, targets.astype(np.int64), [words[wordnet_id].split(",")[0] for wordnet_id in ids]


@dataclass(frozen=True)
class DatasetInfo:
    """Metadata of a data set, and how to read it.

    Attributes:
        images: number of images; None if it depends on the user's folder.
        classes: number of classes, or None likewise.
        split: the part of the data used.
        megabytes: size of the download; 0 if there is none.
        origin: a description of the source.
        read: takes the download folder, or the user's; returns images, targets and class names.
        unpacked: name of the unpacked folder below the download folder.
    """

    images: int | None
    classes: int | None
    split: str
    megabytes: int
    origin: str
    read: Callable[[Path], Contents]
    unpacked: str | None = None


DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo(
        1_797, 10, "all", 0, "handwritten digits of the UCI repository, 8 × 8, inside scikit-learn", _read_digits),
    "cifar10": DatasetInfo(
        10_000, 10, "test", 170, "CIFAR-10 (Krizhevsky, 2009), 32 × 32, by torchvision",
        partial(_read_torchvision, "CIFAR10", train=False), "cifar-10-batches-py"),
    "cifar100": DatasetInfo(
        10_000, 100, "test", 169, "CIFAR-100 (Krizhevsky, 2009), 32 × 32, by torchvision",
        partial(_read_torchvision, "CIFAR100", train=False), "cifar-100-python"),
    "stl10": DatasetInfo(
        8_000, 10, "test", 2_640, "STL-10 (Coates, Ng and Lee, 2011), 96 × 96, by torchvision",
        partial(_read_torchvision, "STL10", split="test"), "stl10_binary"),
    "tiny-imagenet": DatasetInfo(
        10_000, 200, "validation", 248, "Tiny-ImageNet (Stanford CS231n), 64 × 64", _read_tiny_imagenet,
        "tiny-imagenet-200"),
    "imagefolder:PATH": DatasetInfo(
        None, None, "all", 0, "a folder of yours: class folders, or images without labels", read_folder),
}


TINY_IMAGENET = Archive(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de",
    248_100_043)


def unpacked_folder(name: str) -> Path | None:
    """Return the folder that a data set's archive is unpacked to, or None if the data set is not downloaded."""
    unpacked = DATASETS[name].unpacked if name in DATASETS else None
    return None if unpacked is None else data_folder() / unpacked


def image_count(name: str, limit: int | None = None) -> int:
    """Return the number of images in a data set, at most `limit`; the images are not loaded."""
    folder = image_folder(name)
    images = len(read_folder(folder)[0]) if folder else DATASETS[name].images
    return min(images, limit or images)
