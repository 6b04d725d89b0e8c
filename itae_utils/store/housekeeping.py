"""The entries of a feature store with their sizes, and the removal of old ones (`itae store`)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from itae_utils.errors import ItaeError
from itae_utils.store.store import Store

STALE = 3600  # seconds after which no process can still be writing a half-written file
PREFIXES = "KMGT"


@dataclass
class Entry:
    """An entry of features, or one remembered result.

    Attributes:
        path: path in the store.
        about: its metadata; empty if they are damaged.
        variants: number of variants of an entry of features; 0 for a remembered result.
        size: bytes.
        used: time of last use (in a folder) or of writing, in seconds since 1970.
    """

    path: str
    about: Mapping[str, object] = field(default_factory=dict)
    variants: int = 0
    size: int = 0
    used: float = 0.0


def list_entries(store: Store) -> list[Entry]:
    """Return all entries of a store, the longest unused first.

    Raises:
        ItaeError: the store can't be read.
    """
    found: dict[str, Entry] = {}
    variants: dict[str, set[str]] = {}
    with store.reading():
        for path, size, changed in _files(store):
            kind, *names = path.split("/")
            depth = {"features": 2, "remembered": 3}.get(kind)
            if depth is None or len(names) < depth:
                continue
            key = "/".join([kind, *names[:depth - 1]])
            entry = found.setdefault(key, Entry(key))
            entry.size += size
            entry.used = max(entry.used, changed)
            if kind == "features" and len(names) > 2:
                variants.setdefault(key, set()).add(names[1])
        for key, entry in found.items():
            entry.variants, entry.about = len(variants.get(key, ())), _attributes(store, key)
    return sorted(found.values(), key=lambda entry: (entry.used, entry.path))


def prune(store: Store, *, older_than: float | None = None, max_size: float | None = None,
          dry_run: bool = False) -> list[Entry]:
    """Remove entries that have not been used for long, then the longest unused until the rest fits.

    Half-written files of more than an hour ago are removed as well.

    Args:
        store: must not be in use: a run whose features are removed fails, and has to be started again.
        older_than: seconds since the last use.
        max_size: bytes that the store may take.
        dry_run: whether to remove nothing.

    Returns:
        The entries that were removed, or that would be.

    Raises:
        ItaeError: the store can't be read or written.
    """
    everything, now = list_entries(store), time.time()
    removed = [entry for entry in everything if older_than is not None and now - entry.used >= older_than]
    rest = [entry for entry in everything if entry not in removed]
    while max_size is not None and rest and sum(entry.size for entry in rest) > max_size:
        removed.append(rest.pop(0))
    if not dry_run:
        for entry in removed:
            store.remove(entry.path)
        with store.writing():
            _remove_half_written(store, now)
    return removed


def parse_size(text: str) -> float:
    """Return the number of bytes that a text such as "500 MB", "20GB" or "1e9" names.

    Raises:
        ItaeError: the text is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:E\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not found:
        raise ItaeError(f"{text!r} is not a size: write a number and a unit, as in 500MB or 20GB")
    return float(found[1]) * 1000 ** (1 + PREFIXES.index(found[2]) if found[2] else 0)


def format_size(size: float) -> str:
    """Return a number of bytes as text, such as "12.3 MB"."""
    power = min(4, (len(f"{size:.0f}") - 1) // 3)
    return f"{size / 1000**power:.{1 if power else 0}f} {['', *PREFIXES][power]}B"


def table(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of a table for a terminal: a row per entry of features and per remembered kind."""
    rows, kinds = [], {}
    for entry in entries:
        if entry.path.startswith("remembered/"):
            kinds.setdefault(entry.path.split("/")[1], []).append(entry)
            continue
        about = {"backbone": "damaged", **entry.about}
        words = [str(about[name]) for name in ("device", "precision") if name in about]
        rows.append([entry.path.removeprefix("features/"), str(about["backbone"]),
                     str(about.get("about", {}).get("dataset", "–")), f"{about.get('size', 0):,}", " ".join(words),
                     str(about.get("batch_size", "–")), str(entry.variants), format_size(entry.size),
                     _day(entry.used)])
    for kind, results in kinds.items():
        rows.append([f"remembered {kind}", "", "", "", "", "", str(len(results)),
                     format_size(sum(each.size for each in results)), _day(max(each.used for each in results))])
    return ["entry", "backbone", "data set", "images", "made on", "batch", "variants", "size", "last used"], rows


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _files(store: Store) -> Iterator[tuple[str, int, float]]:
    """Yield the path in the store, the size and the time of change of every file."""
    system, root = store.files
    if not system.exists(root):
        return
    for path, about in system.find(root, detail=True).items():
        changed = next((about[name] for name in ("mtime", "LastModified", "updated", "created") if name in about), 0.0)
        changed = changed.timestamp() if isinstance(changed, datetime) else float(changed)
        yield path.removeprefix(root).lstrip("/"), int(about.get("size") or 0), changed


def _attributes(store: Store, path: str) -> dict[str, object]:
    system, root = store.files
    try:
        attributes = json.loads(system.cat_file(f"{root}/{path}/zarr.json"))["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return attributes if isinstance(attributes, dict) else {}


def _remove_half_written(store: Store, now: float) -> None:
    system, root = store.files
    for path, _, changed in list(_files(store)):
        if path.endswith(".partial") and now - changed > STALE:
            system.rm_file(f"{root}/{path}")
