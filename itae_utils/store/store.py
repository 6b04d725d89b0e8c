"""Where features are kept: a Zarr v3 store in a folder or at a URL, of checked arrays, written a whole chunk at a time.

    features/<entry>/<variant>/…   features and artifact counts, see `itae_utils.stored_variant`
    remembered/<kind>/<key>        small results computed from them: cluster labels, t-SNE, norms

Whatever a killed process, a full disk or a flipped bit leaves behind is found by its checksum and computed again.
Nothing is changed once written: two processes that write the same chunk write the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import fsspec
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.core.sync import sync
from zarr.errors import ContainsArrayError, ContainsGroupError
from zarr.storage import FsspecStore, LocalStore

from itae_utils.environment import cache_folder, named_store
from itae_utils.errors import ItaeError
from itae_utils.files import in_one_line

T = TypeVar("T")
log = logging.getLogger("itae_utils")
REMEDY = "free space there, or name another place with --store or ITAE_STORE ('none' keeps features in memory)"


def open_store(place: str | Path | Store | None = "auto") -> Store | None:
    """The store at a folder or an fsspec URL (`s3://…`, `memory://…`).

    Args:
        place: "auto" is the environment's ITAE_STORE, else a folder in the user's cache; None and "none" are no store.
    """
    if isinstance(place, Store):
        return place
    if place == "auto":
        place = named_store() or cache_folder() / "store"
    if place is None or str(place) == "none":
        return None
    return Store(str(place) if "://" in str(place) else str(Path(place).expanduser().resolve()))


def store_in_use() -> Store:
    """The store that `open_store()` finds.

    Raises:
        ItaeError: features are kept in memory.
    """
    place = open_store()
    if place is None:
        raise ItaeError("no feature store is in use (ITAE_STORE or --store is 'none'): name one with --store")
    return place


@dataclass(frozen=True)
class ArrayKind:
    """Shape, chunks and type of an array; a chunk that isn't there reads as `fill`."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    fill: float


@dataclass(frozen=True)
class Store:
    """A store by its place, a folder or URL; nothing is read or made before it is used."""

    place: str

    def __reduce__(self) -> tuple:
        return Store, (self.place,)  # whatever is open stays here

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of this machine's."""
        return "://" not in self.place

    @cached_property
    def zarr(self) -> zarr.abc.store.Store:
        """As zarr takes it.

        Raises:
            ItaeError: a URL of a kind that doesn't exist or isn't installed; a file.
        """
        if self.is_folder and Path(self.place).is_file():
            raise ItaeError(f"feature store {self.place!r} is a file: name a folder with --store or ITAE_STORE")
        return LocalStore(self.place) if self.is_folder else self._opened(FsspecStore.from_url)

    @cached_property
    def files(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """As fsspec takes it: a file system, and the store's path in it; raises as `zarr`."""
        return self._opened(fsspec.core.url_to_fs)

    def _opened(self, opener: Callable[[str], T]) -> T:
        try:
            return opener(self.place)
        except (ImportError, ValueError) as error:
            raise ItaeError(f"feature store {self.place!r} can't be opened ({in_one_line(error)}): install the fsspec "
                            "package for that kind of URL, or name a folder") from error

    def array(self, path: str, kind: ArrayKind) -> zarr.Array:
        """The array at `path`.

        Raises:
            FileNotFoundError: there is none.
            Exception: what is there is damaged, or of another kind; zarr raises whatever it stumbles over.
        """
        found = zarr.open_array(self.zarr, path=path, mode="r+")
        is_checked = found.metadata.codecs[-1].to_dict()["name"] == "crc32c"
        is_filled = np.array_equal(found.fill_value, kind.fill, equal_nan=True)
        same = (found.shape, found.chunks, str(found.dtype)) == (kind.shape, kind.chunks, kind.dtype)
        if not (same and is_checked and is_filled):
            raise ValueError("an array of another kind")
        return found

    def make_array(self, path: str, kind: ArrayKind, about: Mapping[str, object] | None = None) -> zarr.Array:
        """The array at `path`, made where it is missing, and made anew where it is damaged."""
        with self.writing():
            try:
                return self.array(path, kind)
            except FileNotFoundError:
                pass
            except (OSError, ItaeError):
                raise
            except Exception as error:
                self.tell_damage(path, error)
                self.remove(path)
            with suppress(ContainsArrayError):  # another process was faster, with the same
                # The checksum as the last codec finds every flipped bit; without it most pass unseen.
                zarr.create_array(self.zarr, name=path, shape=kind.shape, chunks=kind.chunks, dtype=kind.dtype,
                                  fill_value=kind.fill, compressors=[Crc32cCodec()], attributes=about)
            return self.array(path, kind)

    def make_group(self, path: str, about: Mapping[str, object]) -> None:
        """Make the group at `path` where it is missing or damaged; what is below it stays."""
        with self.writing():
            try:
                zarr.create_group(self.zarr, path=path, attributes=dict(about))
            except ContainsGroupError:
                return
            except (OSError, ItaeError):
                raise
            except Exception as error:
                self.tell_damage(path, error)
                sync(self.zarr.delete(f"{path}/zarr.json"))
                zarr.create_group(self.zarr, path=path, attributes=dict(about))

    def groups(self, path: str) -> list[dict[str, object]]:
        """What the groups right below `path` say of themselves; those that are damaged are left out."""
        with self.reading():
            try:
                return [dict(group.attrs) for _, group in zarr.open_group(self.zarr, path=path, mode="r").groups()]
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    return []
                raise
            except Exception:  # as in `remembered`
                return []

    def remembered(self, kind: str, key: Mapping[str, object],
                   compute: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays that `compute` gives, from the store where it was asked for the same before.

        A damaged result is computed again; one that can't be written is only not kept.

        Args:
            kind: of result, in a word.
            key: everything that decides the result, in JSON's types.
            compute: gives arrays by name.
        """
        path = f"remembered/{kind}/{digest(key)}"
        try:
            blob = zarr.open_array(self.zarr, path=path, mode="r")[:]
            self.touch(path)
            with np.load(io.BytesIO(blob.tobytes()), allow_pickle=False) as arrays:
                return dict(arrays)
        except FileNotFoundError:
            pass
        except ItaeError:
            raise
        except Exception as error:  # zarr, its codecs and numpy raise whatever they stumble over
            self.tell_damage(path, error)
        arrays = {name: np.asarray(array) for name, array in compute().items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        blob = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
        try:
            with self.writing():
                self.make_array(path, ArrayKind(blob.shape, blob.shape, "uint8", 0), {"about": dict(key)})[:] = blob
        except ItaeError as error:
            log.warning("%s", error)
        return arrays

    def remove(self, path: str) -> None:
        """Delete everything at and below `path`."""
        with self.writing():
            sync(self.zarr.delete_dir(path))

    def touch(self, path: str) -> None:
        """Note that what is at `path` is in use, for `prune`; a URL or a read-only folder takes no such note."""
        if self.is_folder:
            with suppress(OSError):
                os.utime(Path(self.place, path, "zarr.json"))

    def tell_damage(self, what: str, error: Exception) -> None:
        """Name in the log what is damaged; it is computed again."""
        log.warning("%s in the feature store %s is damaged (%s): it is computed again", what, self.place,
                    in_one_line(error))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While open, a failure to read is told in one line.

        Raises:
            ItaeError: no permission, a server that doesn't answer, or the like.
        """
        try:
            yield
        except OSError as error:
            why = error.strerror or in_one_line(error)
            raise ItaeError(f"feature store {self.place} can't be read ({why}): mend it, or name another place with "
                            "--store or ITAE_STORE") from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While open, a failure to write is told in one line.

        Raises:
            ItaeError: the disk is full, the store read-only, or the like.
        """
        try:
            yield
        except OSError as error:
            why = error.strerror or in_one_line(error)
            raise ItaeError(f"feature store {self.place} can't be written ({why}): {REMEDY}") from error


def digest(content: Mapping[str, object]) -> str:
    """A name for what JSON says of `content`: 20 hexadecimal digits of its SHA-256."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:20]
