"""The feature store: a Zarr v3 store in a folder, at a URL or in memory.

    features/<entry>/<variant>/…   features and artifact counts, see `itae_utils.store.variants`
    remembered/<kind>/<key>        small results computed from them: cluster labels, t-SNE, norms

Every chunk has a checksum, which reveals damage by a killed process, a full disk or a flipped bit. A damaged chunk is
computed again. Complete chunks never change, and two processes that write the same chunk write the same bytes.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TypeVar

import fsspec
import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.errors import ContainsArrayError, ContainsGroupError
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from itae_utils.environment import cache_folder, named_store
from itae_utils.errors import ItaeError
from itae_utils.files import in_one_line

T = TypeVar("T")
log = logging.getLogger("itae_utils")


def open_store(place: str | Path | Store | None = "auto") -> Store | None:
    """Return the store at a folder or at an fsspec URL (`s3://…`, `memory://…`); for None and "none", return None.

    "auto" takes ITAE_STORE from the environment, or else a folder in the user's cache.

    Raises:
        ItaeError: the place is neither, or its `~name` is unknown.
    """
    if isinstance(place, Store):
        return place
    if place == "auto":
        place = named_store() or cache_folder() / "store"
    if place is None or str(place) == "none":
        return None
    if not isinstance(place, (str, os.PathLike)) or not str(place).strip():
        raise ItaeError(f"store={place!r} is not a place: name a folder or a URL, or use None")
    place = str(place).removeprefix("file://")  # such a URL names a folder of this machine
    if "://" in place:
        return Store(place.rstrip("/") if place.partition("://")[2].strip("/") else place)
    try:
        return Store(str(Path(place).expanduser().resolve()))
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, an unknown user, a null character
        raise ItaeError(f"feature store {place!r} can't be found ({in_one_line(error)}): name another") from error


def store_in_use(place: str | Path | Store | None = "auto") -> Store:
    """Return the store that `open_store` returns, or raise an `ItaeError` if that is None."""
    store = open_store(place)
    if store is None:
        raise ItaeError("no feature store is in use (ITAE_STORE or --store is 'none'): name one with --store")
    return store


@dataclass(frozen=True)
class ArrayKind:
    """Shape, chunks and type of an array; missing chunks read as `fill`."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    fill: float


@dataclass(frozen=True)
class Store:
    """A feature store at `place`, which is opened when it is first used.

    Attributes:
        place: a folder, an fsspec URL, or None for memory that belongs to this object and is freed with it.
    """

    place: str | None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ if self.place is None else {"place": self.place}  # open connections can't be pickled

    @property
    def is_folder(self) -> bool:
        """Whether the store is a folder on this machine."""
        return self.place is not None and "://" not in self.place

    @property
    def is_shared(self) -> bool:
        """Whether other processes can use the store."""
        return self.place is not None and not self.place.startswith("memory:")

    @cached_property
    def zarr(self) -> zarr.abc.store.Store:
        """The zarr store object.

        Raises:
            ItaeError: the place is a file, or a URL of a kind that doesn't exist or isn't installed.
        """
        if self.place is None:
            return MemoryStore()
        if self.is_folder and Path(self.place).is_file():
            raise ItaeError(f"feature store {self.place!r} is a file: name a folder with --store or ITAE_STORE")
        return LocalStore(self.place) if self.is_folder else self._opened(FsspecStore.from_url)

    @cached_property
    def files(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """The store's file system and path, as fsspec opens them; raises as `zarr`."""
        return self._opened(fsspec.url_to_fs)

    def _opened(self, opener: Callable[[str], T]) -> T:
        try:
            return opener(self.place)
        except (ImportError, ValueError) as error:
            raise ItaeError(f"feature store {self.place!r} can't be opened ({in_one_line(error)}): install the fsspec "
                            "package for that kind of URL, or name a folder") from error

    def array(self, path: str, kind: ArrayKind) -> zarr.Array:
        """Return the array at `path`.

        Raises:
            FileNotFoundError: the array does not exist.
            Exception: the array is damaged or of another kind; zarr raises many kinds of errors for damaged files.
        """
        found = zarr.open_array(self.zarr, path=path, mode="r+")
        has_checksum = found.metadata.codecs[-1].to_dict()["name"] == "crc32c"
        same_fill = np.array_equal(found.fill_value, kind.fill, equal_nan=True)
        same = (found.shape, found.chunks, str(found.dtype)) == (kind.shape, kind.chunks, kind.dtype)
        if not (same and has_checksum and same_fill):
            raise ValueError("an array of another kind")
        return found

    def make_array(self, path: str, kind: ArrayKind, about: Mapping[str, object] | None = None) -> zarr.Array:
        """Return the array at `path`; create it if it is missing, and replace it if it is damaged."""
        with self.writing():
            with suppress(FileNotFoundError):
                with self.logging_damage(path):
                    return self.array(path, kind)
                self.remove(path)  # damaged
            with suppress(ContainsArrayError):  # another process has just created it with the same contents
                # With the checksum as the last codec every flipped bit is found; zarr alone would miss most of them.
                zarr.create_array(self.zarr, name=path, shape=kind.shape, chunks=kind.chunks, dtype=kind.dtype,
                                  fill_value=kind.fill, compressors=[Crc32cCodec()], attributes=about)
            return self.array(path, kind)

    def make_group(self, path: str, about: Mapping[str, object]) -> None:
        """Create the group at `path` if it is missing or damaged; everything below it stays."""
        with self.writing():
            with self.logging_damage(path):
                with suppress(ContainsGroupError):
                    zarr.create_group(self.zarr, path=path, attributes=dict(about))
                return
            self.remove(f"{path}/zarr.json")
            with suppress(ContainsGroupError):  # as in `make_array`
                zarr.create_group(self.zarr, path=path, attributes=dict(about))

    def remembered(self, kind: str, key: Mapping[str, object],
                   compute: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the arrays of `compute` by name. The first call stores them; later calls read them from the store.

        `key` holds everything that decides a result of this kind, in JSON's types. A damaged result is computed again.
        A result that can't be stored is returned nevertheless.
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
        except Exception as error:  # OSError too: the result can be computed without the store
            self._log_damage(path, error)
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
        """Delete `path` and everything below it."""
        system, root = self.files
        with self.writing(), suppress(FileNotFoundError):
            system.rm(f"{root}/{path}", recursive=True)

    def touch(self, path: str) -> None:
        """Record that `path` is in use, for `prune`; only in a folder that can be written."""
        if self.is_folder:
            with suppress(OSError):
                os.utime(Path(self.place, path, "zarr.json"))

    @contextmanager
    def logging_damage(self, name: str) -> Iterator[None]:
        """Log and suppress every error but OSError and ItaeError: zarr raises many kinds for damaged files."""
        try:
            yield
        except (OSError, ItaeError):  # an OSError does not mean that the file is damaged
            raise
        except Exception as error:
            self._log_damage(name, error)

    def _log_damage(self, name: str, error: Exception) -> None:
        log.warning("%s in the feature store %s is damaged (%s): it is computed again", name, self.place,
                    in_one_line(error))

    def reading(self) -> AbstractContextManager[None]:
        """Turn an OSError, such as a missing permission, into an `ItaeError`."""
        return self._access("read")

    def writing(self) -> AbstractContextManager[None]:
        """Turn an OSError, such as a full disk, into an `ItaeError`."""
        return self._access("written")

    @contextmanager
    def _access(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or in_one_line(error)
            raise ItaeError(f"feature store {self.place} can't be {verb} ({reason}): fix this, or name another place "
                            "with --store or ITAE_STORE ('none' holds features in memory)") from error


def digest(content: Mapping[str, object]) -> str:
    """Return 20 hexadecimal digits of the SHA-256 of a mapping in JSON's types."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:20]


_PARSING = Lock()  # Python's parser fails at times if two threads make syntax trees at once


def code_digest(modules: Iterable[Path]) -> str:
    """Return the SHA-256 of the code of Python modules; comments, docstrings and formatting do not change it.

    The hash is of the syntax trees, which differ between versions of Python.
    """
    with _PARSING:
        trees = [_WithoutStrings().visit(ast.parse(module.read_bytes())) for module in modules]
    return hashlib.sha256("".join(map(ast.dump, trees)).encode()).hexdigest()


class _WithoutStrings(ast.NodeTransformer):
    """Removes statements that are only a string: docstrings."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_string = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_string else node
