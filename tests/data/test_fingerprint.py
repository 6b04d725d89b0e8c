import hashlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from itae_utils.data import fingerprint as module
from itae_utils.data.fingerprint import fingerprint
from itae_utils.errors import ItaeError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ITAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def of(images, targets, name="made"):
    return SimpleNamespace(name=name, images=images, targets=targets)


def folder_of(tmp_path, name="pictures") -> list[Path]:
    paths = [tmp_path / name / place for place in ("b/1.png", "a/2.png", "a/1.png")]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * 10)
        long_ago = time.time_ns() - 10**11
        os.utime(path, ns=(long_ago, long_ago))
    return paths


def test_files_are_hashed_as_said(tmp_path):
    paths = folder_of(tmp_path)
    lines = [f"{path.relative_to(tmp_path / 'pictures').as_posix()}\t{label}\t"
             f"{hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path, label in zip(paths, (1, 0, 0), strict=True)]
    expected = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    assert fingerprint(of(paths, np.array([1, 0, 0]))) == expected
    assert fingerprint(of(paths[::-1], np.array([0, 0, 1]))) == expected, "the order of reading doesn't matter"
    assert fingerprint(of(paths, np.array([1, 0, 0]), f"imagefolder:{tmp_path / 'pictures'}")) == expected


def test_a_copy_of_a_folder_has_its_fingerprint(tmp_path):
    first, second = (of(folder_of(tmp_path, name), None, f"imagefolder:{tmp_path / name}") for name in "xy")
    assert fingerprint(first) == fingerprint(second)


def test_a_changed_byte_label_name_or_number_changes_it(tmp_path):
    paths = folder_of(tmp_path)
    found = [fingerprint(of(paths, None)), fingerprint(of(paths, [0, 1, 2])), fingerprint(of(paths[:2], None))]
    paths[0].write_bytes(b"other byte")
    found.append(fingerprint(of(paths, None)))
    found.append(fingerprint(of([paths[0].rename(paths[0].with_name("3.png")), *paths[1:]], None)))
    assert len(set(found)) == 5


def test_unchanged_files_are_read_once(tmp_path, monkeypatch):
    paths = folder_of(tmp_path)
    before = fingerprint(of(paths, None))
    read = []
    monkeypatch.setattr(module.hashlib, "file_digest",
                        lambda file, kind: read.append(Path(file.name)) or hashlib.new(kind, file.read()))
    assert fingerprint(of(paths, None)) == before
    assert read == []
    inode = paths[0].with_name("new")  # same size and time, another file
    inode.write_bytes(b"x" * 10)
    status = paths[0].stat()
    os.utime(inode, ns=(status.st_atime_ns, status.st_mtime_ns))
    inode.replace(paths[0])
    assert fingerprint(of(paths, None)) != before
    assert read == [paths[0]]


def test_files_changed_just_now_are_read_again(tmp_path):
    paths = folder_of(tmp_path)
    paths[0].write_bytes(b"first.....")
    before, status = fingerprint(of(paths, None)), paths[0].stat()
    paths[0].write_bytes(b"second....")
    os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns))  # as a coarse clock would have it
    assert fingerprint(of(paths, None)) != before


@pytest.mark.parametrize("text", ["", "[1]", '{"a/1.png": 3}', "{"])
def test_a_damaged_cache_costs_nothing_but_time(tmp_path, cache, text):
    paths = folder_of(tmp_path)
    before = fingerprint(of(paths, None))
    (memory,) = (cache / "fingerprints").iterdir()
    memory.write_text(text, encoding="utf-8")
    assert fingerprint(of(paths, None)) == before
    assert len(json.loads(memory.read_text(encoding="utf-8"))) == 3


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("ITAE_CACHE", str(tmp_path / "file"))
    assert len(fingerprint(of(folder_of(tmp_path), None))) == 64


def test_arrays():
    images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    whole = fingerprint(of(images, np.array([0, 1, 0])))
    assert whole == fingerprint(of(list(images.copy()), [0, 1, 0]))
    others = [of(images, None), of(images[::-1], [0, 1, 0]), of(images.reshape(3, 2, 8), [0, 1, 0]),
              of(images.view(np.int8), [0, 1, 0]), of(images[:2], [0, 1])]
    assert len({whole, *map(fingerprint, others)}) == 6


def test_a_data_set_of_one_s_own_needs_nothing_but_images(tmp_path):
    images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    assert fingerprint(SimpleNamespace(images=images)) == fingerprint(of(images, None))
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path in paths:
        path.write_bytes(path.name.encode())
    by_text = SimpleNamespace(images=list(map(str, paths)), targets=[0, 1])
    assert fingerprint(by_text) == fingerprint(SimpleNamespace(images=paths, targets=[0, 1]))


def test_images_that_cannot_be_told_or_counted():
    with pytest.raises(ItaeError, match=r"\.images must be paths or arrays, not list"):
        fingerprint(of([[1, 2]], None))
    with pytest.raises(ItaeError, match=r"has 2 \.images and 3 \.targets"):
        fingerprint(of(np.zeros((2, 4, 4)), [0, 1, 0]))


def test_a_data_set_of_another_kind_has_none():
    assert fingerprint(SimpleNamespace(name="x", targets=None)) is None
    assert fingerprint(of([], None)) is None
