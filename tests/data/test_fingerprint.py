import hashlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from itae_utils.data.fingerprint import files_digest, fingerprint
from itae_utils.errors import ItaeError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ITAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def dataset(images, targets=None, name="made"):
    return SimpleNamespace(name=name, images=images, targets=targets)


def old_files(folder: Path) -> list[Path]:
    """Write three files of ten bytes whose modification time is long ago."""
    paths = [folder / name for name in ("b/1.png", "a/2.png", "a/1.png")]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * 10)
        long_ago = time.time_ns() - 10**11
        os.utime(path, ns=(long_ago, long_ago))
    return paths


def overwrite(path: Path, content: bytes) -> None:
    """Change a file's content but neither its inode nor its modification time."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class TestFiles:
    def test_it_is_the_hash_of_names_labels_and_contents_in_order(self, tmp_path):
        paths, labels = old_files(tmp_path / "pictures"), [1, 0, 0]
        expected = sha256("".join(f"{name}\t{label}\t{sha256(bytes([number]) * 10)}\n" for number, (name, label) in
                                  enumerate(zip(("b/1.png", "a/2.png", "a/1.png"), labels, strict=True))).encode())
        assert fingerprint(dataset(paths, labels)) == expected
        assert fingerprint(dataset(list(map(str, paths)), np.array(labels))) == expected
        assert fingerprint(dataset(paths, labels, f"imagefolder:{tmp_path / 'pictures'}")) == expected
        assert fingerprint(dataset(paths[::-1], labels[::-1])) != expected

    def test_a_copy_of_a_folder_has_the_same_one(self, tmp_path):
        first, second = (dataset(old_files(tmp_path / name), name=f"imagefolder:{tmp_path / name}") for name in "xy")
        assert fingerprint(first) == fingerprint(second)

    def test_a_changed_byte_label_name_or_number_changes_it(self, tmp_path):
        paths = old_files(tmp_path / "pictures")
        found = [fingerprint(dataset(paths)), fingerprint(dataset(paths, [0, 1, 2])), fingerprint(dataset(paths[:2]))]
        paths[0].write_bytes(b"other byte")
        found.append(fingerprint(dataset(paths)))
        found.append(fingerprint(dataset([paths[0].rename(paths[0].with_name("3.png")), *paths[1:]])))
        assert len(set(found)) == 5


class TestFilesDigest:
    def test_it_is_the_hash_of_names_and_contents_in_any_order(self, tmp_path):
        paths = old_files(tmp_path / "pictures")
        expected = sha256("".join(f"{name}\t{sha256(bytes([number]) * 10)}\n" for name, number in
                                  (("a/1.png", 2), ("a/2.png", 1), ("b/1.png", 0))).encode())
        assert files_digest(paths, tmp_path / "pictures") == expected
        assert files_digest(map(str, paths[::-1]), str(tmp_path / "pictures")) == expected
        assert files_digest(paths, tmp_path) != expected
        assert files_digest(paths[1:], tmp_path / "pictures") != expected

    def test_no_files_have_none(self, tmp_path):
        assert files_digest([], tmp_path) is None

    def test_it_shares_the_cache_of_fingerprints(self, tmp_path):
        paths = old_files(tmp_path / "pictures")
        fingerprint(dataset(paths))
        overwrite(paths[0], b"unnoticed.")
        unchanged = old_files(tmp_path / "copy")
        assert files_digest(paths, tmp_path / "pictures") == files_digest(unchanged, tmp_path / "copy")


class TestCache:
    def test_an_unchanged_file_is_read_once(self, tmp_path):
        paths = old_files(tmp_path / "pictures")
        before = fingerprint(dataset(paths))
        overwrite(paths[0], b"unnoticed.")
        assert fingerprint(dataset(paths)) == before, "size, time and inode are the same: not read again"
        other = paths[0].with_name("other")  # same size and time, another inode
        other.write_bytes(b"x" * 10)
        status = paths[0].stat()
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(paths[0])
        assert fingerprint(dataset(paths)) != before

    def test_a_file_changed_just_now_is_read_again(self, tmp_path):
        paths = old_files(tmp_path / "pictures")
        paths[0].write_bytes(b"first.....")
        before = fingerprint(dataset(paths))
        overwrite(paths[0], b"second....")  # within the resolution of a coarse clock
        assert fingerprint(dataset(paths)) != before

    @pytest.mark.parametrize("text", ["", "[1]", '{"a/1.png": 3}', "{"])
    def test_a_damaged_cache_is_replaced(self, tmp_path, cache, text):
        paths = old_files(tmp_path / "pictures")
        before = fingerprint(dataset(paths))
        (file,) = (cache / "fingerprints").iterdir()
        file.write_text(text, encoding="utf-8")
        assert fingerprint(dataset(paths)) == before
        assert len(json.loads(file.read_text(encoding="utf-8"))) == 3

    def test_a_cache_that_cannot_be_written_is_not_needed(self, tmp_path, monkeypatch):
        paths = old_files(tmp_path / "pictures")
        expected = fingerprint(dataset(paths))
        (tmp_path / "file").write_text("", encoding="utf-8")
        monkeypatch.setenv("ITAE_CACHE", str(tmp_path / "file"))
        assert fingerprint(dataset(paths)) == expected


def test_arrays_are_identified_by_content_shape_type_order_and_label():
    images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    whole = fingerprint(dataset(images, np.array([0, 1, 0])))
    assert whole == fingerprint(dataset(list(images.copy()), [0, 1, 0]))
    others = [dataset(images), dataset(images[::-1], [0, 1, 0]), dataset(images.reshape(3, 2, 8), [0, 1, 0]),
              dataset(images.view(np.int8), [0, 1, 0]), dataset(images[:2], [0, 1])]
    assert len({whole, *map(fingerprint, others)}) == 6


def test_a_custom_data_set_needs_images_only():
    images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    assert fingerprint(SimpleNamespace(images=images)) == fingerprint(dataset(images))


def test_a_data_set_without_images_has_none():
    assert fingerprint(SimpleNamespace(name="x", targets=None)) is None
    assert fingerprint(dataset([])) is None


def test_images_of_another_type_or_number_are_refused():
    with pytest.raises(ItaeError, match=r"\.images.* list"):
        fingerprint(dataset([[1, 2]]))
    with pytest.raises(ItaeError, match=r"2 \.images.* 3 \.targets"):
        fingerprint(dataset(np.zeros((2, 4, 4)), [0, 1, 0]))
