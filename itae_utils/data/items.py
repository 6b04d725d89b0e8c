"""What a data set may be, and what its items may be: pictures in several forms, with or without labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Integral
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from itae_utils.data.datasets import ImageDataset
from itae_utils.data.folders import take
from itae_utils.data.huggingface import ENCODED, LABEL_NAMES
from itae_utils.data.images import EncodedImage, open_image, to_rgb
from itae_utils.errors import ItaeError
from itae_utils.files import in_one_line

CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
PICTURES = ("image", "img")  # names in rows of Hugging Face data sets


def as_dataset(dataset: Dataset) -> Dataset:
    """Return a map-style data set as it is, and a torch `Subset` of an `ImageDataset` as an `ImageDataset`.

    Raises:
        ItaeError: the object is not a map-style data set, or it has no item.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, (str, bytes, Path)):
        raise ItaeError(f"dataset={dataset!r} is a name: pass load_dataset({str(dataset)!r})")
    if isinstance(dataset, DataLoader):
        raise ItaeError("a DataLoader makes batches of its own: pass the data set in it, its .dataset")
    if isinstance(dataset, Mapping):
        names = ", ".join(map(repr, dataset)) or "nothing"
        raise ItaeError(f"a {kind} of {names} is not one data set: pass one of its values, such as a split")
    if isinstance(dataset, (np.ndarray, Tensor)) and dataset.ndim != 4:
        raise ItaeError(f"an array of shape {tuple(dataset.shape)} is not a data set: pass images (n, H, W, C), or a "
                        "tensor (n, C, H, W)")
    try:
        size = len(dataset) if hasattr(dataset, "__getitem__") and not isinstance(dataset, type) else None
    except TypeError:
        size = None
    if size is None:
        raise ItaeError(f"{kind if not isinstance(dataset, type) else dataset.__name__} is not a map-style data set: "
                        "pass an object with len() whose items are read by number, such as load_dataset('digits')")
    if size == 0:
        raise ItaeError(f"the data set ({kind}) is empty: pass one with at least one image")
    if type(dataset) is Subset and type(whole := as_dataset(dataset.dataset)) is ImageDataset:
        return _chosen(whole, np.asarray(dataset.indices, dtype=np.int64))
    return dataset


def _chosen(dataset: ImageDataset, indices: np.ndarray) -> ImageDataset:
    if ((indices < -len(dataset)) | (indices >= len(dataset))).any():
        raise ItaeError(f"a Subset has indices up to {indices.max()}, and its data set {len(dataset):,} images: use "
                        "smaller ones")
    parts = {name: None if values is None else take(values, indices) for name, values in [
        ("images", dataset.images), ("targets", dataset.targets), ("names", dataset.names)]}
    return replace(dataset, split=f"{len(indices):,} of {dataset.split}", **parts)


def targets_of(dataset: Dataset) -> np.ndarray | None:
    """Return the labels of a data set, (n,), without loading an image; None if it has none, or not one per item.

    They are its `.targets` or `.labels`, the label column of a Hugging Face data set, or the labels in a list of
    (image, label). Those of a `Subset` or `ConcatDataset` come from the data sets in it, unless these have different
    classes.
    """
    if isinstance(dataset, Subset):
        whole = targets_of(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [targets_of(part) for part in dataset.datasets]
        classes = {tuple(getattr(part, "classes", None) or ()) for part in dataset.datasets}
        return None if any(part is None for part in parts) or len(classes) > 1 else np.concatenate(parts)
    columns = getattr(dataset, "column_names", None)
    if isinstance(dataset, TensorDataset):
        found = dataset.tensors[1] if len(dataset.tensors) == 2 else None
    elif isinstance(dataset, (list, tuple)):
        found = [_parts(item)[1] for item in dataset]
    elif isinstance(columns, list):
        name = _label_name(columns)
        found = None if name is None else list(dataset[name])
    else:
        found = getattr(dataset, "targets", None)
        found = getattr(dataset, "labels", None) if found is None else found
    try:
        labels = found.numpy(force=True) if isinstance(found, Tensor) else np.asarray(found)
    except ValueError:  # of different lengths
        return None
    is_per_item = labels.shape == (len(dataset),) and labels.dtype.kind != "O"
    return labels if is_per_item else None


def read_item(dataset: Dataset, index: int) -> tuple[Image.Image, object]:
    """Return the RGB picture of an item of a data set, and the item itself.

    Raises:
        ItaeError: as `picture_of`; or the item can't be read.
    """
    try:
        item = dataset[index]
        picture = picture_of(item, index)
        picture.load()  # Pillow reads the pixels of an open file when they are needed
    except (OSError, LookupError) as error:
        reason = f"{type(error).__name__}: {in_one_line(error)}"
        raise ItaeError(f"item {index} of the data set can't be read ({reason}): repair it, or leave it out") from error
    return picture, item


def picture_of(item: object, index: int) -> Image.Image:
    """Return the RGB picture of item `index` of a data set.

    An item is a picture, (picture, label), or a row such as {"image": picture, "label": label}. A picture is a PIL
    image of any mode, the path or the bytes of a file, an array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W).
    Arrays and tensors hold uint8, or floats from 0 to 1, which are rounded to 256 levels.

    Raises:
        ItaeError: the item is anything else, such as a normalised tensor, or its picture can't be read.
    """
    picture = _parts(item)[0]
    if isinstance(picture, Image.Image) and picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if isinstance(picture, Mapping) and picture.keys() == ENCODED:  # an image that Hugging Face did not decode
        picture = picture["bytes"] or picture["path"]
    try:
        if isinstance(picture, Image.Image):
            return to_rgb(picture)
        if isinstance(picture, (str, Path)):
            return open_image(Path(picture).expanduser())
        if isinstance(picture, bytes):
            return open_image(EncodedImage(picture))
        if isinstance(picture, (np.ndarray, Tensor)):
            return to_rgb(Image.fromarray(_levels(picture)))
    except ItaeError as error:
        raise ItaeError(f"item {index} of the data set: {error}") from error
    if isinstance(item, Mapping):
        kinds = ", ".join(f"{name!r}: {type(value).__name__}" for name, value in item.items())
        raise ItaeError(f"item {index} of the data set is {{{kinds}}}: give its picture the name 'image'")
    parts = item if isinstance(item, (tuple, list)) else (item,)
    kinds = ", ".join(type(part).__name__ for part in parts)
    raise ItaeError(f"item {index} of the data set is ({kinds}): it must be (picture, label) or a picture, where a "
                    "picture is a PIL image, a file, an array (H, W, C) or a tensor (C, H, W)")


def label_of(item: object, index: int) -> int:
    """Return the label of item `index` of a data set, -1 for None or no label.

    Raises:
        ItaeError: the label is not a whole number.
    """
    label = _parts(item)[1]
    if isinstance(label, (np.ndarray, Tensor)) and label.ndim == 0:
        label = label.item()
    if label is None:
        return -1
    if not isinstance(label, Integral):
        raise ItaeError(f"the label of item {index} of the data set is {label!r}: use whole numbers, or None")
    return int(label)


def _parts(item: object) -> tuple[object, object]:
    """Return an item's picture and its label, None for what it lacks."""
    if isinstance(item, Mapping):
        names = [name for name in item if name in PICTURES]
        names = names or [name for name, value in item.items() if isinstance(value, Image.Image)]
        label = _label_name(item)
        return item[names[0]] if len(names) == 1 else None, None if label is None else item[label]
    if isinstance(item, (tuple, list)):
        return (item[0] if len(item) in (1, 2) else None), (item[1] if len(item) == 2 else None)
    return item, None


def _label_name(names: Iterable[str]) -> str | None:
    """Return the name of the label among those in a row, such as "label" or "fine_label"; None if several may be."""
    found = [name for name in names if name in LABEL_NAMES or str(name).endswith("_label")]
    return "label" if "label" in found else found[0] if len(found) == 1 else None


def _levels(picture: np.ndarray | Tensor) -> np.ndarray:
    """Return an array or a tensor as an array (H, W) or (H, W, 3 or 4) of uint8."""
    shape, is_tensor = tuple(picture.shape), isinstance(picture, Tensor)
    values = (picture.float() if picture.is_floating_point() else picture).numpy(force=True) if is_tensor else picture
    if is_tensor and values.ndim == 3:
        values = np.moveaxis(values, 0, -1)
    if not values.size or not (values.ndim == 2 or (values.ndim == 3 and values.shape[-1] in CHANNELS)):
        expected = "a tensor (C, H, W)" if is_tensor else "an array (H, W, C)"
        raise ItaeError(f"shape {shape} is not that of a picture: give {expected} of 1, 3 or 4 channels")
    if np.issubdtype(values.dtype, np.floating):
        low, high = values.min(), values.max()
        if not 0 <= low <= high <= 1:
            raise ItaeError(f"floats from {low:.3g} to {high:.3g}: give uint8 or floats from 0 to 1, before any "
                            "normalisation; the backbone's transform normalises")
        values = np.round(values * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise ItaeError(f"values of type {values.dtype}: give uint8, or floats from 0 to 1")
    return np.ascontiguousarray(values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values)
