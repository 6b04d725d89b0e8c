"""Data sets of Hugging Face's package `datasets`: from the hub, or from a folder."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import huggingface_hub
import numpy as np
from huggingface_hub.errors import OfflineModeIsEnabled

from itae_utils.data.download import within
from itae_utils.data.folders import Contents, choose_split, split_note
from itae_utils.data.images import EncodedImage, shown
from itae_utils.environment import hides_progress, network_timeout
from itae_utils.errors import ItaeError
from itae_utils.files import in_one_line

PREFIX = "hf:"
ENCODED = {"bytes", "path"}  # the fields of an image that a file does not declare as one
LABEL_NAMES = frozenset({"label", "labels", "fine_label", "target", "targets", "class", "classes", "category", "y"})
SAVED = ("state.json", "dataset_dict.json")  # files that `save_to_disk` writes


class EncodedImages(Sequence):
    """The image files in a column of a `datasets.Dataset`, each read when it is asked for; `numbers` are the rows."""

    def __init__(self, table: Sequence, column: str, owner: str, numbers: np.ndarray) -> None:
        self._table, self._column, self._owner, self.numbers = table, column, owner, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int | np.ndarray) -> EncodedImage | EncodedImages:
        numbers = self.numbers[index]
        if isinstance(numbers, np.ndarray):
            return EncodedImages(self._table, self._column, self._owner, numbers)
        row = self._table[int(numbers)][self._column] or {}
        content = row.get("bytes") or b""
        if not content and row.get("path"):
            with suppress(OSError):  # then the image is empty, which is an error of this image only
                content = Path(row["path"]).read_bytes()
        image = EncodedImage(content)
        image.name = f"in row {numbers} of {self._owner}"
        return image


def place_and_split(name: str, split: str | None = None) -> tuple[str, str | None]:
    """Return NAME or FOLDER of "hf:NAME[:SPLIT]" and its split, which `split` may give instead.

    Raises:
        ItaeError: there is no NAME, or two different splits.
    """
    place = os.path.expanduser(name.partition(":")[2])
    if not os.path.isdir(place):
        head, _, tail = place.rpartition(":")
        if head and tail and split not in (None, tail):
            raise ItaeError(f"{name!r} and split={split!r} name different splits: give one of them")
        place, split = (head, tail or split) if head else (place, split)
    if not place.strip(":"):
        raise ItaeError(f"{name!r} lacks a name: write hf:NAME, hf:NAME:SPLIT or hf:FOLDER")
    return place, split


def read_rows(
    name: str, split: str | None = None, image_column: str | None = None, label_column: str | None = None
) -> Contents:
    """Return the images of a data set called "hf:NAME[:SPLIT]" or "hf:FOLDER[:SPLIT]" with their labels, if any.

    Labels that are text or numbers become classes in sorted order. Rows with a missing label are left out.

    Raises:
        ItaeError: the package `datasets` is missing; the data set can't be loaded; there is no such split or column,
            or several that may be meant.
    """
    place, split = place_and_split(name, split)
    owner = f"{PREFIX}{shown(place)}"
    datasets = _package()
    if os.path.isdir(place):
        data = _loaded(owner, _read_folder, datasets, place)
    else:
        names = _splits_on_hub(datasets, place, owner)
        split = choose_split(names, split, owner)
        data = dict.fromkeys(names, _loaded(owner, datasets.load_dataset, place, split=split))
    if not isinstance(data, dict):  # a single Dataset, which may know the split that it was
        data = {str(data.split or "all"): data}
    chosen = choose_split(list(data), split, owner)
    notes = [split_note(chosen, set(data) - {chosen})] if len(data) > 1 else []
    table = data[chosen].with_format(None)
    if not len(table):
        raise ItaeError(f"{owner} has no rows in the split {chosen}: give another split")
    images, label = _columns(datasets, table.features, owner, image_column, label_column)
    known, targets, classes = np.ones(len(table), dtype=bool), None, None
    if label:
        values = table[label][:]
        present = np.array([value is not None and (isinstance(value, str) or value != -1) for value in values])
        names, codes = np.unique([value for value, ok in zip(values, present, strict=True) if ok], return_inverse=True)
        if isinstance(table.features[label], datasets.ClassLabel):
            names, codes = table.features[label].names, names[codes]
        if len(names) < 2 or not present.any():  # as in a folder, a single class distinguishes nothing
            notes.append(f"The column {label} distinguishes no classes.")
        else:
            known, targets, classes = present, codes.astype(np.int64), list(map(str, names))
    if not known.all():
        notes.append(f"{np.count_nonzero(~known):,} of {len(table):,} rows have no label and are left out.")
    files = table.select_columns(images).cast_column(images, datasets.Image(decode=False))
    return Contents(EncodedImages(files, images, owner, np.flatnonzero(known)), targets, classes, chosen, tuple(notes))


def _columns(
    datasets: ModuleType, features: Mapping[str, object], owner: str, image_column: str | None, label_column: str | None
) -> tuple[str, str | None]:
    """Return the names of the columns of images and, if there is one, of labels."""
    def choose(kind: str, asked: str | None, likely: list[str], possible: list[str]) -> str | None:
        columns = f"its columns are {shown(', '.join(features))}"
        if asked is not None:
            if asked not in possible:
                raise ItaeError(f"{kind}_column={asked!r}: {owner} has no such column of {kind}s; {columns}")
            return asked
        if len(likely) > 1:
            raise ItaeError(f"{owner} has several columns of {kind}s, {shown(', '.join(likely))}: choose one with "
                            f"{kind}_column=")
        if not likely and kind == "image":
            raise ItaeError(f"{owner} has no column of images; {columns}")
        return likely[0] if likely else None

    images = [name for name, feature in features.items()
              if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == ENCODED)]
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    types = {name: str(feature.dtype) for name, feature in features.items() if isinstance(feature, datasets.Value)}
    labels = [name for name, kind in types.items() if re.fullmatch(r"u?int\d+|bool|(large_)?string", kind)]
    named = [name for name in labels if name.lower() in LABEL_NAMES]
    return (choose("image", image_column, images, images + [name for name, kind in types.items() if "binary" in kind]),
            choose("label", label_column, classes or named, classes + labels))


def _package() -> ModuleType:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ItaeError("data sets called hf:NAME need the package datasets: pip install itae-utils[datasets]"
                        ) from error
    if hides_progress():
        datasets.disable_progress_bars()
    return datasets


def _loaded(owner: str, load: object, *arguments: object, **options: object) -> object:
    try:
        return load(*arguments, **options)
    except Exception as error:  # of many types, from several packages
        raise ItaeError(f"can't load {owner} ({type(error).__name__}: {in_one_line(error)}): check its name or files"
                        ) from error


def _read_folder(datasets: ModuleType, folder: str) -> object:
    if any(os.path.isfile(os.path.join(folder, name)) for name in SAVED):
        return datasets.load_from_disk(folder)
    return datasets.load_dataset(folder)


def _splits_on_hub(datasets: ModuleType, name: str, owner: str) -> list[str]:
    """Return the names of a data set's splits. The hub must answer in time: `datasets` would try for 20 seconds."""
    if os.path.exists(name) or name.startswith(("/", "~", ".")):
        raise ItaeError(f"{owner} is not a folder: give one that exists, or the name of a data set on the hub")
    seconds = network_timeout()
    try:
        with suppress(OfflineModeIsEnabled):  # then `datasets` uses its cache
            within(seconds, huggingface_hub.HfApi().dataset_info, name, timeout=seconds)
    except Exception as error:  # the client and its HTTP library have no common exception class
        raise ItaeError(f"can't get {owner} from the hub ({type(error).__name__}: {in_one_line(error)}): check the "
                        "name and the network, or set HF_HUB_OFFLINE=1 to use an earlier download") from error
    return _loaded(owner, datasets.get_dataset_split_names, name)
