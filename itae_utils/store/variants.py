"""The features of one variant in a store, shard by shard.

An entry is one model on one set of images, run in one way; a variant is one setting of the method:

    features/<entry>/<variant>/features          (n, dim) float32, a chunk per shard
    features/<entry>/<variant>/artifact_counts   (n,) int32, a chunk per shard

A shard is complete if both of its chunks exist, match their checksums and contain no fill value. It is written whole,
the counts first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import zarr
from torch.utils.data import Dataset

from itae_utils.errors import ItaeError
from itae_utils.files import PACKAGE, in_one_line
from itae_utils.method.artifacts import FiringRule
from itae_utils.method.register_setting import Variant, parted
from itae_utils.models.backbones import Backbone
from itae_utils.store.identity import Unidentified, images_identity, model_identity
from itae_utils.store.store import ArrayKind, Store, code_digest, digest

# Modules and packages that can change norms and features: a change of their code makes stored ones invalid.
CODE = ("data/datasets.py", "data/folders.py", "data/huggingface.py", "data/images.py", "data/items.py",
        "data/published.py", "models/*.py", "models/demo/__init__.py", "method/*.py", "extraction/batches.py",
        "extraction/fitting.py", "extraction/job.py", "extraction/neurons.py", "extraction/observation.py",
        "extraction/pooling.py")
PACKAGES = ("torch", "torchvision", "timm", "pillow")  # a new release may change the last bits


def entry_key(backbone: Backbone, dataset: Dataset) -> dict[str, object]:
    """Return everything that decides features, except the variant and the batch size.

    The number of threads and the choice among GPUs of the same name are left out, although they can change the last
    bits.

    Raises:
        Unidentified: something that decides features is not known by its value, see `itae_utils.store.identity`.
    """
    return {
        "code": deciding_code(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "heads": backbone.model.blocks[0].attn.num_heads,  # the weights' shapes do not show it
        "model": model_identity(backbone),
        "resize": backbone.resize,
        "pos_embed": backbone.pos_embed,
        **images_identity(backbone, dataset),
        "device": device_name(backbone.device),
        "precision": backbone.precision,
        "compiled": backbone.compiled,
    }


@dataclass
class Place:
    """A backbone and a data set in a store, or in none. Their key is made once, because it reads images and weights."""

    store: Store | None
    backbone: Backbone
    dataset: Dataset

    @cached_property
    def key(self) -> dict[str, object]:
        """The `entry_key` of the backbone and the data set; raises as it does."""
        return entry_key(self.backbone, self.dataset)

    def remembered(self, kind: str, options: Mapping[str, object], compute: Callable[[], Mapping[str, np.ndarray]]
                   ) -> Mapping[str, np.ndarray]:
        """Return `Store.remembered` under the key with `options`; if there is no store or no key, only compute."""
        with suppress(Unidentified):
            if self.store is not None:
                return self.store.remembered(kind, self.key | options, compute)
        return compute()

    def under(self, registers: Mapping[str, object]) -> Place:
        """Return the place of the same model with registers, whose hooks must not be open yet."""
        place = copy(self)
        with suppress(Unidentified):
            if self.store is not None:
                place.key = self.key | registers
        return place

    def remembered_of_model(self, kind: str, options: Mapping[str, object],
                            compute: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """Return `remembered` for what depends on the model alone, not on the images."""
        with suppress(Unidentified):
            if self.store is not None:
                key = {name: self.key[name] for name in ("code", "versions", "weights_sha256", "model", "heads")}
                return self.store.remembered(kind, key | options, compute)
        return compute()


def device_name(device: torch.device) -> str:
    """Return the model name of a GPU, such as "NVIDIA A100-SXM4-40GB", or the type of another device, such as "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def deciding_code() -> str:
    """Return the hash of the code that can change norms and features; computed once per process."""
    return code_digest(deciding_modules())


def deciding_modules() -> list[Path]:
    """Return the files of the modules in `CODE`."""
    return [path for pattern in CODE for path in sorted(PACKAGE.glob(pattern))]


def setting_key(variant: Variant, truth: FiringRule | None = None) -> dict[str, object]:
    """Return the settings that have an effect on a variant, with numeric thresholds; {} for the unmodified model."""
    registers, itae = parted(variant)
    if registers is not None:
        key = {name: getattr(registers, name) for name in ("neurons", "form", "insert")}
        key |= {"means": registers.means} if registers.form == "bias" else {}
        return {"registers": key} | setting_key(itae, truth)
    if itae is None:
        return {}
    key = asdict(itae) | {"tail": itae.side}
    unused = [name for name, used in (("alpha", itae.attenuation == "scale"), ("seed", itae.select == "random"),
                                      ("rank", itae.source == "direction"), ("substitutes", itae.substitutes))
              if not used]
    if itae.select == "oracle":
        unused += ["source", "threshold", "tail", "rank"]
        key["truth"] = asdict(truth)
    else:
        key["threshold"] = [None if value is None else float(value) for value in itae.thresholds]
    return {name: value for name, value in key.items() if name not in unused}


class StoredVariant:
    """Features (n, dim) and artifact counts (n,) of one variant in a store, read and written shard by shard.

    Methods raise an `ItaeError` if the store can't be read or written, or if a shard was damaged or removed after
    `missing` had found it complete.

    Args:
        store: a store; nothing in it is read or created before the first call.
        entry: from `entry_key`, with `size`, `dim` and `shard_size`.
        setting: from `setting_key`.
        about: further metadata of the entry, which has no effect on features.
    """

    def __init__(self, store: Store, entry: Mapping[str, object], setting: Mapping[str, object],
                 about: Mapping[str, object] | None = None) -> None:
        self.store, self.entry, self.setting, self.about = store, entry, setting, about or {}
        self.folder = f"features/{digest(entry)}"
        self.path = f"{self.folder}/{digest(setting)}"
        self._arrays: tuple[zarr.Array, zarr.Array] | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_arrays": None}  # each process opens its own

    @property
    def shards(self) -> range:
        """The numbers of the shards."""
        return range(-(-self.entry["size"] // self.entry["shard_size"]))

    def rows(self, shard: int) -> slice:
        """Return the images of a shard, as indices into the data set."""
        first = shard * self.entry["shard_size"]
        return slice(first, min(first + self.entry["shard_size"], self.entry["size"]))

    def missing(self) -> list[int]:
        """Return the shards that are not complete; log the damaged ones."""
        self.store.touch(self.folder)
        with self.store.reading(), suppress(FileNotFoundError), self.store.logging_damage(self.path):
            return [shard for shard in self.shards if not self._is_complete(shard, *self.arrays)]
        return list(self.shards)

    def _is_complete(self, shard: int, features: zarr.Array, counts: zarr.Array) -> bool:
        rows = self.rows(shard)
        with self.store.logging_damage(f"shard {shard} (images {rows.start} to {rows.stop - 1}) of {self.path}"):
            return bool(np.isfinite(features[rows]).all() and (counts[rows] >= 0).all())
        return False

    def prepare(self) -> None:
        """Create the arrays; replace damaged ones.

        An extraction calls this before any other work, so that a store that can't be written costs no time.
        """
        self.store.make_group(self.folder, {**self.entry, "about": dict(self.about)})
        self.store.make_group(self.path, self.setting)
        self._arrays = self._open(self.store.make_array)

    @property
    def arrays(self) -> tuple[zarr.Array, zarr.Array]:
        """The arrays of features and of counts, opened on first access; raises as `Store.array`."""
        if self._arrays is None:
            self._arrays = self._open(self.store.array)
        return self._arrays

    def _open(self, open_array: Callable[[str, ArrayKind], zarr.Array]) -> tuple[zarr.Array, zarr.Array]:
        size, dim = self.entry["size"], self.entry["dim"]
        rows = min(size, self.entry["shard_size"])
        return (open_array(f"{self.path}/features", ArrayKind((size, dim), (rows, dim), "float32", np.nan)),
                open_array(f"{self.path}/artifact_counts", ArrayKind((size,), (rows,), "int32", -1)))

    def save(self, shard: int, features: np.ndarray, counts: np.ndarray) -> None:
        """Write a whole shard: features (m, dim) and counts (m,)."""
        stored_features, stored_counts = self.arrays
        with self.store.writing():
            stored_counts[self.rows(shard)] = counts
            stored_features[self.rows(shard)] = features

    def part(self, shard: int) -> np.ndarray:
        """Return the features of one shard, (m, dim) float32."""
        return self._read(0, shard)

    def features(self) -> np.ndarray:
        """Return all features, (n, dim) float32."""
        whole = np.empty((self.entry["size"], self.entry["dim"]), dtype=np.float32)
        for shard in self.shards:
            whole[self.rows(shard)] = self.part(shard)
        return whole

    def counts(self) -> np.ndarray:
        """Return the number of patches attenuated in the last block, (n,) int64."""
        return np.concatenate([self._read(1, shard) for shard in self.shards]).astype(np.int64)

    def _read(self, which: int, shard: int) -> np.ndarray:
        try:
            values = self.arrays[which][self.rows(shard)]
            reason = None if np.isfinite(values).all() and (which == 0 or (values >= 0).all()) else "removed"
        except Exception as error:  # zarr and its codecs raise many kinds
            reason = in_one_line(error)
        if reason:
            raise ItaeError(f"shard {shard} of {self.path} in the feature store {self.store.place} can't be read any "
                            f"more ({reason}): extract the features again, only lost shards are recomputed")
        return values
