import hashlib
import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from itae_utils.data import fingerprint as fingerprints
from itae_utils.data.fingerprint import file_sha256, files_digest, fingerprint, image_hashes
from itae_utils.errors import ItaeError

IMAGES = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
NAMES = ("b/1.png", "a/2.png", "a/1.png")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ITAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def paths(tmp_path):
    return old_files(tmp_path / "pictures")


def dataset(images, targets=None, name="made"):
    return SimpleNamespace(name=name, images=images, targets=targets)


def old_files(folder: Path) -> list[Path]:
    """Write three files of ten bytes whose modification time is long ago."""
    paths = [folder / name for name in NAMES]
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
    def test_the_fingerprint_is_the_hash_of_names_labels_and_contents_in_order(self, paths, tmp_path):
        labels = [1, 0, 0]
        expected = sha256("".join(f"{name}\t{label}\t{sha256(bytes([number]) * 10)}\n" for number, (name, label) in
                                  enumerate(zip(NAMES, labels, strict=True))).encode())
        assert fingerprint(dataset(paths, labels)) == expected
        assert fingerprint(dataset(list(map(str, paths)), np.array(labels))) == expected
        assert fingerprint(dataset(paths, labels, f"imagefolder:{tmp_path / 'pictures'}")) == expected
        assert fingerprint(dataset(paths[::-1], labels[::-1])) != expected
        copy = tmp_path / "copy"
        assert fingerprint(dataset(old_files(copy), labels, f"imagefolder:{copy}")) == expected

    def test_the_fingerprint_changes_with_a_byte_a_label_a_name_or_the_number(self, paths):
        found = [fingerprint(dataset(paths)), fingerprint(dataset(paths, [0, 1, 2])), fingerprint(dataset(paths[:2]))]
        paths[0].write_bytes(b"other byte")
        found.append(fingerprint(dataset(paths)))
        found.append(fingerprint(dataset([paths[0].rename(paths[0].with_name("3.png")), *paths[1:]])))
        assert len(set(found)) == 5

    def test_the_digest_is_the_hash_of_names_and_contents_in_any_order(self, paths, tmp_path):
        expected = sha256("".join(f"{name}\t{file_sha256(path)}\n" for name, path in
                                  sorted(zip(NAMES, paths, strict=True))).encode())
        assert files_digest(paths, tmp_path / "pictures") == expected
        assert files_digest(map(str, paths[::-1]), str(tmp_path / "pictures")) == expected
        assert files_digest(paths, tmp_path) != expected
        assert files_digest(paths[1:], tmp_path / "pictures") != expected
        assert files_digest([], tmp_path) is None

    def test_the_digest_of_one_file_is_that_of_its_content(self, paths):
        assert [file_sha256(path) for path in paths] == [sha256(bytes([number]) * 10) for number in range(3)]


    def test_relative_paths_and_files_elsewhere(self, paths, tmp_path, monkeypatch):
        expected = fingerprint(dataset(paths))
        monkeypatch.chdir(tmp_path)
        assert fingerprint(dataset([f"pictures/{name}" for name in NAMES])) == expected
        assert fingerprint(dataset(paths, name="imagefolder:pictures")) == expected
        assert fingerprint(dataset(paths, name="imagefolder:another")) == expected

    def test_a_file_that_is_gone_is_named(self, paths):
        paths[2].unlink()
        with pytest.raises(ItaeError, match=re.escape(str(paths[2]))):
            fingerprint(dataset(paths))


class TestCache:
    @pytest.fixture
    def opened(self, paths, monkeypatch):
        """Return the names of files that are read; clocks are as fine as in practice, so that entries are kept."""
        found, read = [], hashlib.file_digest
        monkeypatch.setattr(fingerprints, "RACY", 0)
        monkeypatch.setattr(hashlib, "file_digest", lambda file, *kind: found.append(Path(file.name).name)
                            or read(file, *kind))
        time.sleep(0.02)  # longer than a tick of the file system's clock
        return found

    def test_an_unchanged_file_is_read_once(self, paths, opened, tmp_path):
        before = fingerprint(dataset(paths))
        assert sorted(opened) == ["1.png", "1.png", "2.png"]
        assert fingerprint(dataset(paths)) == fingerprint(dataset(paths)) == before
        assert files_digest(paths, tmp_path / "pictures")
        assert len(opened) == 3

    @pytest.mark.parametrize("change", ["in place", "another inode", "a link"])
    def test_a_change_is_seen_though_size_and_modification_time_are_kept(self, paths, opened, change):
        before, path = fingerprint(dataset(paths)), paths[1]
        if change == "in place":
            overwrite(path, b"other byte")
        else:
            other = path.with_name("other")
            other.write_bytes(b"other byte")
            os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
            if change == "a link":
                path.unlink()
                path.symlink_to(other)
            else:
                other.replace(path)
        assert fingerprint(dataset(paths)) != before
        assert opened[3:] == ["2.png"]

    def test_an_entry_without_the_time_of_change_is_read_again(self, paths, opened, cache):
        before = fingerprint(dataset(paths))
        (file,) = (cache / "fingerprints").iterdir()
        entries = {name: [size, modified, inode, "0" * 64] for name, (size, modified, _, inode, _) in
                   json.loads(file.read_text(encoding="utf-8")).items()}
        file.write_text(json.dumps(entries), encoding="utf-8")
        assert fingerprint(dataset(paths)) == before

    def test_a_file_changed_just_now_is_read_again(self, paths):
        paths[0].write_bytes(b"first.....")
        before = fingerprint(dataset(paths))
        overwrite(paths[0], b"second....")  # within the resolution of a coarse clock
        assert fingerprint(dataset(paths)) != before

    @pytest.mark.parametrize("text", ["", "[1]", '{"a/1.png": 3}', "{"])
    @pytest.mark.usefixtures("opened")
    def test_a_damaged_cache_is_replaced(self, paths, cache, text):
        before = fingerprint(dataset(paths))
        (file,) = (cache / "fingerprints").iterdir()
        file.write_text(text, encoding="utf-8")
        assert fingerprint(dataset(paths)) == before
        assert len(json.loads(file.read_text(encoding="utf-8"))) == 3

    def test_a_cache_that_cannot_be_written_is_not_needed(self, paths, tmp_path, monkeypatch):
        expected = fingerprint(dataset(paths))
        (tmp_path / "file").touch()
        monkeypatch.setenv("ITAE_CACHE", str(tmp_path / "file"))
        assert fingerprint(dataset(paths)) == expected


class TestArrays:
    def test_they_are_identified_by_content_shape_type_order_and_label(self):
        whole = fingerprint(dataset(IMAGES, np.array([0, 1, 0])))
        assert whole == fingerprint(dataset(list(IMAGES.copy()), [0, 1, 0]))
        others = [dataset(IMAGES), dataset(IMAGES[::-1], [0, 1, 0]), dataset(IMAGES.reshape(3, 2, 8), [0, 1, 0]),
                  dataset(IMAGES.view(np.int8), [0, 1, 0]), dataset(IMAGES[:2], [0, 1])]
        assert len({whole, *map(fingerprint, others)}) == 6

    def test_each_image_has_a_hash_of_its_own_content_and_label(self):
        whole = image_hashes(dataset(IMAGES, [0, 1, 0]))
        other = IMAGES.copy()
        other[1] += 1
        changed = image_hashes(dataset(other, [0, 1, 1]))
        assert [one == other for one, other in zip(whole, changed, strict=True)] == [True, False, False]
        assert len(set(whole)) == 3
        assert image_hashes(dataset([])) == []

    def test_a_custom_data_set_needs_images_only(self):
        assert fingerprint(SimpleNamespace(images=IMAGES)) == fingerprint(dataset(IMAGES))
        assert fingerprint(SimpleNamespace(name="x", targets=None)) is None
        assert fingerprint(dataset([])) is None

    def test_contents_of_files_are_identified_by_content_order_and_label(self):
        whole = fingerprint(dataset([b"one", b"two"], [0, 1]))
        assert whole == fingerprint(dataset([b"one", b"two"], np.array([0, 1])))
        others = [dataset([b"two", b"one"], [0, 1]), dataset([b"one", b"two"], [1, 0]), dataset([b"one", b"2"], [0, 1])]
        assert len({whole, *map(fingerprint, others)}) == 4

    @pytest.mark.parametrize(("images", "targets", "message"), [
        ([b"one", "two"], None, "str"),
        ([[1, 2]], None, r"\.images.* list"), (np.zeros((2, 4, 4)), [0, 1, 0], r"2 \.images.* 3 \.targets")])
    def test_images_of_another_type_or_number_are_refused(self, images, targets, message):
        with pytest.raises(ItaeError, match=message):
            fingerprint(dataset(images, targets))
