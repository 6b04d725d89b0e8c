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
DEPTHS = {"features": 2, "remembered": 3}  # number of names in the path of an entry
PREFIXES = "KMGT"


@dataclass
class Entry:
    """An entry of features, or one remembered result."""

    path: str  # in the store
    about: Mapping[str, object]  # metadata; empty if they are damaged
    variants: set[str] = field(default_factory=set)  # names of the variants' folders
    size: int = 0  # bytes
    used: float = 0.0  # time of last use (in a folder) or of writing, in seconds since 1970


def list_entries(store: Store) -> list[Entry]:
    """Return all entries of a store, the longest unused first, or raise an `ItaeError` if it can't be read."""
    entries: dict[str, Entry] = {}
    with store.reading():
        for file, size, changed in _files(store):
            names = file.split("/")
            depth = DEPTHS.get(names[0], len(names))
            if len(names) <= depth:
                continue
            path = "/".join(names[:depth])
            if path not in entries:
                entries[path] = Entry(path, _attributes(store, path))
            entries[path].size += size
            entries[path].used = max(entries[path].used, changed)
            if names[0] == "features" and len(names) > 3:
                entries[path].variants.add(names[2])
    return sorted(entries.values(), key=lambda entry: (entry.used, entry.path))


def prune(store: Store, *, older_than: float | None = None, max_size: float | None = None,
          dry_run: bool = False) -> list[Entry]:
    """Remove the entries that were last used long ago, then the longest unused until the others fit.

    Half-written files that are more than an hour old are removed as well.

    Args:
        store: must not be in use: a run whose features are removed fails.
        older_than: seconds since the last use.
        max_size: bytes that the store may take.
        dry_run: whether to remove nothing.

    Returns:
        The entries that were removed, or that would be.

    Raises:
        ItaeError: the store can't be read or written.
    """
    rest, removed, now = list_entries(store), [], time.time()
    while older_than is not None and rest and now - rest[0].used >= older_than:
        removed.append(rest.pop(0))
    while max_size is not None and rest and sum(entry.size for entry in rest) > max_size:
        removed.append(rest.pop(0))
    if not dry_run:
        for entry in removed:
            store.remove(entry.path)
        system, root = store.files
        with store.writing():
            for path, _, changed in list(_files(store)):
                if path.endswith(".partial") and now - changed > STALE:
                    system.rm_file(f"{root}/{path}")
    return removed


def parse_size(text: str) -> float:
    """Return the number of bytes in a text such as "500 MB", "20GB" or "1e9".

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
    """Return the header and rows of a table: a row per entry of features and per kind of remembered results."""
    rows, kinds = [], {}
    for entry in entries:
        if entry.path.startswith("remembered/"):
            kinds.setdefault(entry.path.split("/")[1], []).append(entry)
            continue
        about = {"backbone": "damaged", **entry.about}
        words = [str(about[name]) for name in ("device", "precision") if name in about]
        rows.append([entry.path.removeprefix("features/"), str(about["backbone"]),
                     str(about.get("about", {}).get("dataset", "–")), f"{about.get('size', 0):,}", " ".join(words),
                     str(about.get("batch_size", "–")), str(len(entry.variants)), format_size(entry.size),
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
