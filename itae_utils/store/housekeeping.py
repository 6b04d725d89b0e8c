"""What a feature store holds, how big it is, and making room in it (`itae store`)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from itae_utils.errors import ItaeError
from itae_utils.store.store import Store

STALE = 3600  # seconds after which a half-written file can't be some process's at work
PREFIXES = "KMGT"


@dataclass
class Holding:
    """One entry of features, or one kind of remembered results' one result.

    Attributes:
        path: in the store.
        about: what its metadata says of it; empty where that is damaged.
        variants: number of variants of an entry; 0 for remembered results.
        size: bytes.
        used: when it was last used (in a folder) or written, in seconds since 1970.
    """

    path: str
    about: Mapping[str, object] = field(default_factory=dict)
    variants: int = 0
    size: int = 0
    used: float = 0.0


def holdings(store: Store) -> list[Holding]:
    """Everything in a store, the longest unused first.

    Raises:
        ItaeError: the store can't be read.
    """
    found: dict[str, Holding] = {}
    variants: dict[str, set[str]] = {}
    with store.reading():
        for path, size, changed in _files(store):
            kind, *names = path.split("/")
            depth = {"features": 2, "remembered": 3}.get(kind)
            if depth is None or len(names) < depth:
                continue
            key = "/".join([kind, *names[:depth - 1]])
            holding = found.setdefault(key, Holding(key))
            holding.size += size
            holding.used = max(holding.used, changed)
            if kind == "features" and len(names) > 2:
                variants.setdefault(key, set()).add(names[1])
        for key, holding in found.items():
            holding.variants, holding.about = len(variants.get(key, ())), _attributes(store, key)
    return sorted(found.values(), key=lambda holding: (holding.used, holding.path))


def prune(store: Store, *, older_than: float | None = None, max_size: float | None = None,
          dry_run: bool = False) -> list[Holding]:
    """Remove what wasn't used for long, then the longest unused until the rest fits; also stale half-written files.

    Args:
        store: which must not be in use: a run whose features go is told so, and has to be started again.
        older_than: seconds.
        max_size: bytes.
        dry_run: remove nothing, only tell.

    Returns:
        What was removed.

    Raises:
        ItaeError: the store can't be read or written.
    """
    everything, now = holdings(store), time.time()
    gone = [holding for holding in everything if older_than is not None and now - holding.used >= older_than]
    kept = [holding for holding in everything if holding not in gone]
    while max_size is not None and kept and sum(holding.size for holding in kept) > max_size:
        gone.append(kept.pop(0))
    if not dry_run:
        for holding in gone:
            store.remove(holding.path)
        with store.writing():
            _remove_half_written(store, now)
    return gone


def parse_size(text: str) -> float:
    """Bytes from "500 MB", "20GB", "1e9".

    Raises:
        ItaeError: not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:E\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not found:
        raise ItaeError(f"{text!r} is not a size: write it like 500MB or 20GB")
    return float(found[1]) * 1000 ** (1 + PREFIXES.index(found[2]) if found[2] else 0)


def format_size(size: float) -> str:
    """Bytes in words: "12.3 MB"."""
    power = min(4, (len(f"{size:.0f}") - 1) // 3)
    return f"{size / 1000**power:.{1 if power else 0}f} {['', *PREFIXES][power]}B"


def table(found: Sequence[Holding]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for a terminal: an entry a line, remembered results a line a kind."""
    rows, kinds = [], {}
    for holding in found:
        if holding.path.startswith("remembered/"):
            kinds.setdefault(holding.path.split("/")[1], []).append(holding)
            continue
        about = {"backbone": "damaged", **holding.about}
        words = [str(about[name]) for name in ("device", "precision") if name in about]
        rows.append([holding.path.removeprefix("features/"), str(about["backbone"]),
                     str(about.get("about", {}).get("dataset", "–")), f"{about.get('size', 0):,}", " ".join(words),
                     str(about.get("batch_size", "–")), str(holding.variants), format_size(holding.size),
                     _day(holding.used)])
    for kind, results in kinds.items():
        rows.append([f"remembered {kind}", "", "", "", "", "", str(len(results)),
                     format_size(sum(each.size for each in results)), _day(max(each.used for each in results))])
    return ["entry", "backbone", "data set", "images", "made on", "batch", "variants", "size", "last used"], rows


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _files(store: Store) -> Iterator[tuple[str, int, float]]:
    """Path in the store, size and time of change of every file."""
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
