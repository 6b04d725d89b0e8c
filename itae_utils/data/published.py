"""The registry of data sets: what is known of each, and how the published ones are downloaded and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from itae_utils.data.download import Archive, fetch, one_at_a_time, unpack
from itae_utils.data.folders import Contents
from itae_utils.environment import data_folder
from itae_utils.errors import ItaeError

TINY = "tiny-imagenet-200"  # the folder in the archive
TINY_IMAGENET = Archive(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de",
    248_100_043)


@dataclass(frozen=True)
class DatasetInfo:
    """Metadata of a data set, and how to read it.

    Attributes:
        images: number of images; None if it depends on the user's folder.
        classes: number of classes, or None likewise.
        split: the part of the data used by default.
        megabytes: size of the download; 0 if there is none.
        origin: a description of the source.
        read: takes the download folder and the split; None for a folder or a data set of the hub.
        unpacked: name of the unpacked folder below the download folder.
        train: number of images of the training split; None if there is none.
    """

    images: int | None
    classes: int | None
    split: str
    megabytes: int
    origin: str
    read: Callable[[Path, str], Contents] | None = None
    unpacked: str | None = None
    train: int | None = None


def _read_digits(_root: Path, _split: str) -> Contents:
    # imported here, like torchvision below: `itae datasets` needs neither and answers at once without them
    from sklearn.datasets import load_digits

    digits = load_digits()
    # do not change this conversion: the demo backbone was trained on its output
    images = np.stack([np.round(image * (255 / 16)).astype(np.uint8) for image in digits.images])
    return Contents(images, digits.target.astype(np.int64), [str(name) for name in digits.target_names])


def _read_torchvision(class_name: str, root: Path, split: str) -> Contents:
    """Read one of torchvision's data sets. Torchvision unpacks and checks it; `fetch` can also time out and resume."""
    from torchvision import datasets

    reader = getattr(datasets, class_name)
    part = {"split": split} if class_name == "STL10" else {"train": split == "train"}
    try:
        data = reader(root, **part)
    except RuntimeError:  # missing or damaged
        with one_at_a_time(root, class_name):
            try:
                data = reader(root, **part)  # another process may have downloaded it by now
            except RuntimeError:
                fetch(Archive(reader.url, reader.filename, reader.tgz_md5), root)
                data = reader(root, **part, download=True)
    targets = data.labels if class_name == "STL10" else data.targets
    images = data.data.transpose(0, 2, 3, 1) if class_name == "STL10" else data.data
    return Contents(images, np.asarray(targets, dtype=np.int64), list(data.classes))


def _read_tiny_imagenet(root: Path, split: str) -> Contents:
    """Read a labelled split; classes are sorted by WordNet id and called by the first of their names."""
    folder = _unpacked(root, TINY, f"{TINY}/val/", f"{TINY}/words.txt")
    annotations, names = folder / "val/val_annotations.txt", folder / "words.txt"
    for needed in (annotations, names):
        if not needed.is_file():
            raise ItaeError(f"{needed} is missing: remove {folder} and run again to unpack it")
    if split == "train":
        train = _unpacked(root, f"{TINY}/train", f"{TINY}/train/")
        rows = [(path, path.parts[-3]) for path in sorted(train.glob("*/images/*.JPEG"))]
        if not rows:
            raise ItaeError(f"{train} holds no image: remove it and run again to unpack it")
    else:
        lines = [line.split("\t") for line in annotations.read_text(encoding="utf-8").splitlines()]
        rows = [(folder / "val/images" / line[0], line[1]) for line in lines]
    words = dict(line.split("\t", 1) for line in names.read_text(encoding="utf-8").splitlines())
    ids, targets = np.unique([wordnet_id for _, wordnet_id in rows], return_inverse=True)
    classes = [words[wordnet_id].split(",")[0] for wordnet_id in ids]
    return Contents([path for path, _ in rows], targets.astype(np.int64), classes, folder=folder)


def _unpacked(root: Path, name: str, *prefixes: str) -> Path:
    """Return the folder `name` of Tiny-ImageNet's archive, unpacked with the members that start with `prefixes`."""
    folder = root / name
    if not folder.is_dir():
        with one_at_a_time(root, TINY):
            if not folder.is_dir():
                unpack(fetch(TINY_IMAGENET, root), prefixes, name)
    return folder


DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo(
        1_797, 10, "all", 0, "handwritten digits of the UCI repository, 8 × 8, inside scikit-learn", _read_digits),
    "cifar10": DatasetInfo(
        10_000, 10, "test", 170, "CIFAR-10 (Krizhevsky, 2009), 32 × 32, by torchvision",
        partial(_read_torchvision, "CIFAR10"), "cifar-10-batches-py", 50_000),
    "cifar100": DatasetInfo(
        10_000, 100, "test", 169, "CIFAR-100 (Krizhevsky, 2009), 32 × 32, by torchvision",
        partial(_read_torchvision, "CIFAR100"), "cifar-100-python", 50_000),
    "stl10": DatasetInfo(
        8_000, 10, "test", 2_640, "STL-10 (Coates, Ng and Lee, 2011), 96 × 96, by torchvision",
        partial(_read_torchvision, "STL10"), "stl10_binary", 5_000),
    "tiny-imagenet": DatasetInfo(
        10_000, 200, "validation", 248, "Tiny-ImageNet (Stanford CS231n), 64 × 64", _read_tiny_imagenet, TINY, 100_000),
    "imagefolder:PATH": DatasetInfo(
        None, None, "all", 0, "a folder of yours: class folders, or images without labels"),
    "hf:NAME": DatasetInfo(
        None, None, "test", 0, "of the Hugging Face hub, or hf:FOLDER; needs the package datasets"),
}


def unpacked_folder(name: str) -> Path | None:
    """Return the folder that a data set's archive is unpacked to, or None if the data set is not downloaded."""
    unpacked = DATASETS[name].unpacked if name in DATASETS else None
    return None if unpacked is None else data_folder() / unpacked
