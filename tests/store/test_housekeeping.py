import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from itae_utils.errors import ItaeError
from itae_utils.store.housekeeping import format_size, list_entries, parse_size, prune, table
from itae_utils.store.store import open_store
from itae_utils.store.variants import StoredVariant


def fill(store, backbone: str, variants: int = 1, dim: int = 4) -> str:
    """Store the features of 10 images; return the path of their entry."""
    entry = {"backbone": backbone, "device": "cpu", "precision": "fp32", "batch_size": 5, "size": 10, "dim": dim,
             "shard_size": 5}
    for number in range(variants):
        variant = StoredVariant(store, entry, {"number": number}, {"dataset": "digits"})
        variant.prepare()
        for shard in variant.shards:
            variant.save(shard, np.zeros((5, dim)), np.zeros(5))
    return variant.folder


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path):
    return open_store(tmp_path / "store" if request.param == "folder" else f"memory://{tmp_path.name}/store")


@pytest.fixture
def aged(tmp_path):
    """Three entries, used three, two and one hours ago, of about 1, 2 and 4 MB."""
    store = open_store(tmp_path / "store")
    paths = [fill(store, f"b{megabytes}", dim=megabytes * 25_000) for megabytes in (1, 2, 4)]
    for hours, path in zip((3, 2, 1), paths, strict=True):
        for file in Path(store.place, path).rglob("*"):
            os.utime(file, (time.time() - 3600 * hours,) * 2)
    return store, paths


def test_an_empty_store_has_no_entries(store):
    assert list_entries(store) == []
    assert prune(store, older_than=0) == []


def test_entries_and_their_sizes(store):
    small, big = fill(store, "tiny"), fill(store, "wide", variants=3, dim=100)
    store.remembered("clusters", {"k": 3}, lambda: {"labels": np.zeros(10)})
    found = {entry.path: entry for entry in list_entries(store)}
    assert set(found) >= {small, big}
    assert [path.split("/")[:2] for path in found if path not in (small, big)] == [["remembered", "clusters"]]
    assert (len(found[small].variants), len(found[big].variants)) == (1, 3)
    assert (found[small].about["backbone"], found[big].about["about"]) == ("tiny", {"dataset": "digits"})
    system, root = store.files
    for path, entry in found.items():
        assert entry.size == system.du(f"{root}/{path}")
        assert time.time() - 600 < entry.used <= time.time() + 1


def test_prune_by_age(aged):
    store, paths = aged
    assert [entry.path for entry in prune(store, older_than=1.5 * 3600)] == paths[:2]
    assert [entry.path for entry in list_entries(store)] == paths[2:]
    assert fill(store, "b1", dim=25_000) == paths[0]
    assert [entry.path for entry in list_entries(store)] == [paths[2], paths[0]]


def test_prune_by_size_removes_the_longest_unused_first(aged):
    store, paths = aged
    assert [entry.path for entry in prune(store, max_size=6.5e6)] == paths[:1]
    assert prune(store, max_size=6.5e6) == []
    assert [entry.path for entry in prune(store, max_size=1e6)] == paths[1:]


def test_an_entry_in_use_is_not_pruned(aged):
    store, paths = aged
    about = next(entry.about for entry in list_entries(store) if entry.path == paths[0])
    entry = {name: value for name, value in about.items() if name != "about"}
    assert StoredVariant(store, entry, {"number": 0}).missing() == []
    assert [entry.path for entry in prune(store, older_than=1.5 * 3600)] == paths[1:2]


def test_only_stale_half_written_files_are_removed(aged):
    store, paths = aged
    old, new = (Path(store.place, paths[0], f"{name}.partial") for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    assert prune(store, max_size=1e9) == []
    assert (old.exists(), new.exists()) == (False, True)


def test_a_damaged_entry_is_listed_and_can_be_pruned(aged):
    store, paths = aged
    Path(store.place, paths[0], "zarr.json").write_text("{")
    assert sorted(row[1] for row in table(list_entries(store))[1]) == ["b2", "b4", "damaged"]
    assert len(prune(store, older_than=0)) == 3


def test_table(store):
    path = fill(store, "tiny", variants=2)
    store.remembered("clusters", {"k": 3}, lambda: {"labels": np.zeros(10)})
    store.remembered("clusters", {"k": 4}, lambda: {"labels": np.zeros(10)})
    header, rows = table(list_entries(store))
    assert rows[0][:7] == [path.removeprefix("features/"), "tiny", "digits", "10", "cpu fp32", "5", "2"]
    assert (rows[1][0], rows[1][6]) == ("remembered clusters", "2")
    assert {len(row) for row in rows} == {len(header)}


@pytest.mark.parametrize(("text", "size"), [
    ("5", 5), ("1e9", 1e9), ("500MB", 5e8), ("500 mb", 5e8), ("1.5G", 1.5e9), ("20GB", 2e10), ("2 TB", 2e12),
    ("7B", 7), ("3kB", 3e3), ("3k", 3e3)])
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-5MB", "5PB", "1.2.3MB", "MB", ".", "nan"])
def test_invalid_sizes_are_refused(text):
    with pytest.raises(ItaeError, match=re.escape(repr(text))):
        parse_size(text)


@pytest.mark.parametrize(("size", "words"), [
    (0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (12_345_678, "12.3 MB"), (2.5e9, "2.5 GB"), (3e15, "3000.0 TB")])
def test_format_size(size, words):
    assert format_size(size) == words
