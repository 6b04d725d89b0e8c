"""Features of one variant, shard by shard: in a store, or in memory.

In a store an entry is one model on one set of images in one way of running it, a variant one setting of the method:

    features/<entry>/<variant>/features          (n, dim) float32, a chunk a shard
    features/<entry>/<variant>/artifact_counts   (n,) int32, likewise

A shard counts as done only when both its chunks are there, fit their checksum and hold no fill value. It is written
whole, the counts first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import metadata
from typing import Protocol

import numpy as np
import zarr
from torch.utils.data import Dataset

from itae_utils.data.fingerprint import fingerprint
from itae_utils.errors import ItaeError
from itae_utils.files import in_one_line
from itae_utils.method.artifacts import FiringRule
from itae_utils.method.setting import ITAE
from itae_utils.models.backbones import Backbone
from itae_utils.store.store import ArrayKind, Store, digest

METHOD = 2  # raise it when a change of the code changes what is computed
DECIDING = ("torch", "torchvision", "timm", "pillow")  # packages whose releases may change the last bits


def entry_key(backbone: Backbone, dataset: Dataset, batch_size: int | str) -> dict[str, object] | None:
    """Everything beside the variant that decides features; None where the data set says nothing of its images.

    The number of threads, and which of two cards of one kind, are not in it: they can change the last bits.

    Raises:
        ItaeError: `.images` that can't be those of the data set.
    """
    images = fingerprint(dataset)
    if images and len(dataset) != len(dataset.images):
        raise ItaeError(f"a data set of {len(dataset):,} items has {len(dataset.images):,} .images: give it as many")
    return images and {
        "method": METHOD,
        "versions": {name: metadata.version(name) for name in DECIDING},
        "backbone": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "heads": backbone.model.blocks[0].attn.num_heads,  # which no weight's shape tells
        "preprocessing": " ".join(repr(backbone.transform).split()),
        "resize": backbone.resize,
        "pos_embed": backbone.pos_embed,
        "images": images,
        "device": backbone.device.type,
        "precision": backbone.precision,
        "compiled": backbone.compiled,
        "batch_size": batch_size,
    }


def setting_key(itae: ITAE | None, truth: FiringRule | None = None) -> dict[str, object]:
    """A variant with numeric thresholds, without what doesn't act in it; the model as it is has an empty key."""
    if itae is None:
        return {}
    key = asdict(itae)
    if itae.attenuation != "scale":
        del key["alpha"]
    if itae.select != "random":
        del key["seed"]
    if itae.select == "oracle":
        del key["source"], key["threshold"]
        return key | {"truth": asdict(truth)}
    return key | {"threshold": [None if value is None else float(value) for value in itae.thresholds]}


class KeptVariant(Protocol):
    """Features (n, dim) float32 and artifact counts (n,) of one variant, read and written shard by shard."""

    @property
    def shards(self) -> range:
        """Numbers of the shards."""

    def rows(self, shard: int) -> slice:
        """The images of a shard, by their numbers in the data set."""

    def missing(self) -> list[int]:
        """Shards that are not done."""

    def prepare(self) -> None:
        """Whatever must be there before `save`; what fails is told before any work is done."""

    def save(self, shard: int, features: np.ndarray, counts: np.ndarray) -> None:
        """Keep a whole shard: (m, dim) and (m,)."""

    def part(self, shard: int) -> np.ndarray:
        """The features of one shard, (m, dim)."""

    def features(self) -> np.ndarray:
        """All features, (n, dim)."""

    def counts(self) -> np.ndarray:
        """Patches attenuated in the last block, (n,) int64."""


class InMemory:
    """A variant without a store: gone with the process."""

    def __init__(self, size: int, dim: int, shard_size: int) -> None:
        self.size, self.shard_size = size, shard_size
        self._features = np.empty((size, dim), dtype=np.float32)
        self._counts = np.zeros(size, dtype=np.int64)

    @property
    def shards(self) -> range:
        """See `KeptVariant`."""
        return range(-(-self.size // self.shard_size))

    def rows(self, shard: int) -> slice:
        """See `KeptVariant`."""
        return slice(shard * self.shard_size, min((shard + 1) * self.shard_size, self.size))

    def missing(self) -> list[int]:
        """All of them."""
        return list(self.shards)

    def prepare(self) -> None:
        """Nothing to do."""

    def save(self, shard: int, features: np.ndarray, counts: np.ndarray) -> None:
        """See `KeptVariant`."""
        self._features[self.rows(shard)], self._counts[self.rows(shard)] = features, counts

    def part(self, shard: int) -> np.ndarray:
        """See `KeptVariant`."""
        return self._features[self.rows(shard)]

    def features(self) -> np.ndarray:
        """See `KeptVariant`."""
        return self._features

    def counts(self) -> np.ndarray:
        """See `KeptVariant`."""
        return self._counts


@dataclass(frozen=True)
class InStore:
    """A variant in a store.

    Attributes:
        store: where.
        entry: what decides the features beside the variant, in JSON's types; with `size`, `dim` and `shard_size`.
        setting: the variant, likewise.
        about: what else is worth telling of the entry.
    """

    store: Store
    entry: Mapping[str, object]
    setting: Mapping[str, object]
    about: Mapping[str, object] = field(default_factory=dict)

    def __reduce__(self) -> tuple:
        return InStore, (self.store, self.entry, self.setting, self.about)  # without its open arrays

    @property
    def folder(self) -> str:
        """Of the entry in the store."""
        return f"features/{digest(self.entry)}"

    @property
    def path(self) -> str:
        """Of the variant in the store."""
        return f"{self.folder}/{digest(self.setting)}"

    @property
    def shards(self) -> range:
        """See `KeptVariant`."""
        return range(-(-self.entry["size"] // self.entry["shard_size"]))

    def rows(self, shard: int) -> slice:
        """See `KeptVariant`."""
        first = shard * self.entry["shard_size"]
        return slice(first, min(first + self.entry["shard_size"], self.entry["size"]))

    def missing(self) -> list[int]:
        """Shards that are not done; those that are there but damaged are named in the log.

        Raises:
            ItaeError: the store can't be read.
        """
        self.store.touch(self.folder)
        with self.store.reading():
            try:
                arrays = self._arrays
            except FileNotFoundError:
                return list(self.shards)
            except (OSError, ItaeError):
                raise
            except Exception as error:  # zarr and its codecs raise whatever they stumble over
                self.store.tell_damage(self.path, error)
                return list(self.shards)
            return [shard for shard in self.shards if not self._is_done(shard, *arrays)]

    def _is_done(self, shard: int, features: zarr.Array, counts: zarr.Array) -> bool:
        rows = self.rows(shard)
        try:
            return bool(np.isfinite(features[rows]).all() and (counts[rows] >= 0).all())
        except OSError:
            raise
        except Exception as error:  # as in `missing`
            self.store.tell_damage(f"shard {shard} (images {rows.start} to {rows.stop - 1}) of {self.path}", error)
            return False

    def prepare(self) -> None:
        """Make the arrays where they are missing or damaged, so that what can't be written is told before any work.

        Raises:
            ItaeError: the store can't be written.
        """
        self.store.make_group(self.folder, {**self.entry, "about": dict(self.about)})
        self.store.make_group(self.path, self.setting)
        self.__dict__["_arrays"] = tuple(self.store.make_array(f"{self.path}/{name}", kind)
                                         for name, kind in self._kinds().items())

    @cached_property
    def _arrays(self) -> tuple[zarr.Array, zarr.Array]:
        features, counts = (self.store.array(f"{self.path}/{name}", kind) for name, kind in self._kinds().items())
        return features, counts

    def _kinds(self) -> dict[str, ArrayKind]:
        size, dim = self.entry["size"], self.entry["dim"]
        rows = min(size, self.entry["shard_size"])
        return {"features": ArrayKind((size, dim), (rows, dim), "float32", np.nan),
                "artifact_counts": ArrayKind((size,), (rows,), "int32", -1)}

    def save(self, shard: int, features: np.ndarray, counts: np.ndarray) -> None:
        """See `KeptVariant`; raises an `ItaeError` when the store can't be written."""
        kept_features, kept_counts = self._arrays
        with self.store.writing():
            kept_counts[self.rows(shard)] = counts
            kept_features[self.rows(shard)] = features

    def part(self, shard: int) -> np.ndarray:
        """See `KeptVariant`.

        Raises:
            ItaeError: it was damaged or removed since it was found whole.
        """
        return self._read(0, shard)

    def features(self) -> np.ndarray:
        """See `KeptVariant`; raises as `part`."""
        whole = np.empty((self.entry["size"], self.entry["dim"]), dtype=np.float32)
        for shard in self.shards:
            whole[self.rows(shard)] = self.part(shard)
        return whole

    def counts(self) -> np.ndarray:
        """See `KeptVariant`; raises as `part`."""
        return np.concatenate([self._read(1, shard) for shard in self.shards]).astype(np.int64)

    def _read(self, which: int, shard: int) -> np.ndarray:
        try:
            values = self._arrays[which][self.rows(shard)]
            why = None if np.isfinite(values).all() and (which == 0 or (values >= 0).all()) else "it is gone"
        except Exception as error:  # as in `missing`
            why = in_one_line(error)
        if why:
            raise ItaeError(f"shard {shard} of {self.path} in the feature store {self.store.place} can't be read any "
                            f"more ({why}): extract the features again, only what is lost is computed")
        return values
