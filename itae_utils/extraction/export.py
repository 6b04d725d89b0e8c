"""Write features to one file that other programs read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet
from torch.utils.data import Dataset

from itae_utils.extraction.features import Features
from itae_utils.files import replacing

FORMATS = (".npz", ".parquet")


def save_features(path: Path, features: Features, dataset: Dataset, points: Sequence[np.ndarray] = (),
                  **more: object) -> None:
    """Write features, labels and names of files in one step, each as an array or a column.

    Args:
        path: ends in one of `FORMATS`.
        features: by variant.
        dataset: the one they belong to; `targets` and `names` are written if it has them.
        points: (n, 2) each, the maps of the baseline and of ITAE; with them, paths of files are written too.
        more: entries of `about`, beside the settings of the features and the data set; it is written as JSON.
    """
    about = json.dumps({
        **features.settings, "thresholds": features.thresholds, "dataset": dataset.name, "split": dataset.split,
        "classes": dataset.classes, "notes": dataset.notes, **more,
    })
    columns = {name: np.asarray(values) for name, values in (("targets", features.targets), ("names", dataset.names))
               if values is not None}
    for prefix, each in zip(("", "itae_"), points, strict=False):
        columns |= {f"{prefix}x": each[:, 0], f"{prefix}y": each[:, 1]}
    if len(points) and isinstance(dataset.images[0], Path):
        columns["path"] = np.asarray([os.path.abspath(image) for image in dataset.images])
    with replacing(path) as part, part.open("wb") as file:
        if path.suffix == ".npz":
            np.savez(file, about=about, **features, **columns)
        else:
            vectors = {name: pyarrow.FixedSizeListArray.from_arrays(array.ravel(), array.shape[1])
                       for name, array in features.items()}
            parquet.write_table(pyarrow.table({**vectors, **columns}, metadata={"about": about}), file)
