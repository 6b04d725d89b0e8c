import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr

from itae_utils.errors import ItaeError
from itae_utils.store.store import ArrayKind, Store, digest, open_store

KIND = ArrayKind((50, 4), (20, 4), "float32", np.nan)


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path):
    return open_store(tmp_path / "store" if request.param == "folder" else f"memory://{tmp_path.name}/store")


@pytest.fixture
def folder(tmp_path):
    return open_store(tmp_path / "store")


def fail():
    raise AssertionError("computed again")


class TestPlace:
    def test_none_is_no_store(self, monkeypatch):
        monkeypatch.setenv("ITAE_STORE", "none")
        assert open_store() is open_store("none") is open_store(None) is None

    def test_auto_is_the_environment_s_store_or_the_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ITAE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("ITAE_STORE", "memory://a")
        assert open_store() == Store("memory://a")
        monkeypatch.delenv("ITAE_STORE")
        assert open_store() == Store(str(tmp_path / "cache" / "store"))

    def test_folders_are_absolute_and_a_store_stays_itself(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert open_store("x").place == str(tmp_path / "x")
        assert open_store("~/x").place == str(tmp_path / "home" / "x")
        assert open_store(Store("memory://b")) == Store("memory://b")

    def test_a_url_of_a_local_file_is_a_folder(self, tmp_path):
        for place in (f"file://{tmp_path}/new/store", f"{tmp_path}/new/store/", Path(tmp_path, "new", ".", "store")):
            assert open_store(place) == Store(str(tmp_path / "new" / "store"))
        open_store(f"file://{tmp_path}/new/store").make_group("g", {})
        assert (tmp_path / "new" / "store" / "g").is_dir()

    def test_a_slash_at_the_end_of_a_url_does_not_matter(self):
        assert open_store("memory://a/b/") == open_store("memory://a/b")

    @pytest.mark.parametrize("place", ["", " ", 3, True, False, [], {"store": 1}, b"x", "~nobody-here/x", "a\0b"])
    def test_what_is_no_place_is_one_line(self, place):
        with pytest.raises(ItaeError, match="store") as caught:
            open_store(place)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["file", "file/below", "file://{}/file"])
    def test_a_file_in_its_place_is_one_line(self, name, tmp_path):
        (tmp_path / "file").write_text("")
        store = open_store(name.format(tmp_path) if "{" in name else tmp_path / name)
        with pytest.raises(ItaeError, match="file"):
            store.make_group("g", {})

    @pytest.mark.parametrize("url", ["nonsense://x", "abfs://x"])
    @pytest.mark.parametrize("call", [
        lambda store: store.make_array("a", KIND), lambda store: store.make_group("g", {}),
        lambda store: store.remembered("labels", {}, fail), lambda store: store.files])
    def test_an_unknown_kind_of_url_is_one_line_and_no_damage(self, url, call, caplog):
        with pytest.raises(ItaeError, match=url) as caught:
            call(open_store(url))
        assert "\n" not in str(caught.value)
        assert not caplog.records

    def test_reading_creates_nothing(self, folder):
        with pytest.raises(FileNotFoundError):
            folder.array("features/a", KIND)
        assert not list(Path(folder.place).rglob("*"))


class TestArray:
    def test_made_once_and_found_again(self, store):
        values = np.arange(200, dtype=np.float32).reshape(50, 4)
        store.make_array("a/b", KIND)[:] = values
        assert np.array_equal(store.make_array("a/b", KIND)[:], values)
        assert np.array_equal(Store(store.place).array("a/b", KIND)[:], values)

    @pytest.mark.parametrize("other", [
        ArrayKind((51, 4), (20, 4), "float32", np.nan), ArrayKind((50, 4), (10, 4), "float32", np.nan),
        ArrayKind((50, 4), (20, 4), "float64", np.nan), ArrayKind((50, 4), (20, 4), "float32", 0.0)])
    def test_another_kind_is_damage(self, store, other, caplog):
        store.make_array("a", other)[:] = 1
        with pytest.raises(ValueError, match="kind"):
            store.array("a", KIND)
        assert np.isnan(store.make_array("a", KIND)[:]).all()
        assert store.place in caplog.text

    def test_an_array_without_a_checksum_is_damage(self, folder):
        zarr.create_array(folder.zarr, name="a", shape=(50, 4), chunks=(20, 4), dtype="float32", fill_value=np.nan)
        with pytest.raises(ValueError, match="kind"):
            folder.array("a", KIND)

    def test_any_flipped_bit_is_found(self, folder):
        folder.make_array("a", KIND)[:] = np.random.default_rng(0).normal(size=(50, 4))
        chunk, rng = Path(folder.place, "a/c/1/0"), random.Random(0)
        whole = chunk.read_bytes()
        for _ in range(300):
            bit = rng.randrange(8 * len(whole))
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            chunk.write_bytes(damaged)
            with pytest.raises(ValueError, match="checksum"):
                folder.array("a", KIND)[20:40]
        for length in (0, 1, 4, 100, len(whole) - 1):
            chunk.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="checksum"):
                folder.array("a", KIND)[20:40]

    @pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b'{"zarr_format": 3}', b"\xff\xfe"])
    def test_damaged_metadata_is_replaced(self, store, content, caplog):
        system, root = store.files
        store.make_group("g", {"x": 1})
        for name in "ab":
            store.make_array(f"g/{name}", KIND)[:] = 1
        for path in ("g/a", "g"):
            system.pipe_file(f"{root}/{path}/zarr.json", content)
        store.make_group("g", {"x": 1})
        assert np.isnan(store.make_array("g/a", KIND)[:]).all()
        assert (store.array("g/b", KIND)[:] == 1).all()
        assert "g/a " in caplog.text
        assert json.loads(system.cat_file(f"{root}/g/zarr.json"))["attributes"] == {"x": 1}

    def test_remove(self, store):
        store.make_array("g/a", KIND)[:] = 1
        for _ in range(2):
            store.remove("g")
        with pytest.raises(FileNotFoundError):
            store.array("g/a", KIND)


class TestFailures:
    @pytest.mark.parametrize("name", ["writing", "reading"])
    def test_an_operating_system_s_error_names_the_store_and_the_remedy(self, store, name):
        with pytest.raises(ItaeError, match=f"{store.place}.*No space left.*--store"), getattr(store, name)():
            raise OSError(28, "No space left on device")

    @pytest.mark.parametrize("place", ["file", "file/store"])
    def test_a_place_that_is_a_file(self, tmp_path, place):
        (tmp_path / "file").write_text("")
        with pytest.raises(ItaeError, match=str(tmp_path / place)):
            open_store(tmp_path / place).make_group("g", {})


class TestRemembered:
    def test_computed_once(self, store):
        made = {"labels": np.arange(6).reshape(2, 3), "text": np.array("x"), "none": np.empty((0, 2))}
        for compute in (lambda: made, fail):
            found = Store(store.place).remembered("labels", {"seed": 1}, compute)
            assert list(found) == list(made)
            assert all(np.array_equal(found[name], made[name]) for name in made)
        assert store.remembered("labels", {"seed": 2}, lambda: {"a": np.ones(1)})["a"] == 1

    @pytest.mark.parametrize("damage", [
        lambda chunk: chunk.write_bytes(chunk.read_bytes()[:-1] + b"x"),
        lambda chunk: chunk.write_bytes(b""),
        lambda chunk: chunk.unlink(),
        lambda chunk: (chunk.parents[1] / "zarr.json").write_text("{"),
    ])
    def test_damage_is_logged_and_computed_again(self, folder, caplog, damage):
        folder.remembered("labels", {"seed": 1}, lambda: {"a": np.zeros(3)})
        chunk, = (path for path in Path(folder.place, "remembered").rglob("0") if path.is_file())
        damage(chunk)
        assert folder.remembered("labels", {"seed": 1}, lambda: {"a": np.ones(5)})["a"].tolist() == [1] * 5
        assert f"remembered/labels/{digest({'seed': 1})}" in caplog.text
        assert folder.remembered("labels", {"seed": 1}, fail)["a"].tolist() == [1] * 5

    def test_a_result_that_can_t_be_stored_is_returned(self, folder, monkeypatch, caplog):
        def full(*_arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Store, "make_array", full)
        assert folder.remembered("labels", {}, lambda: {"a": np.ones(2)})["a"].tolist() == [1, 1]
        assert "No space left on device" in caplog.text

    def test_only_plain_arrays_are_read(self, folder, tmp_path, caplog):
        """A pickle in a shared store must not run."""
        folder.remembered("labels", {}, lambda: {"a": np.zeros(1)})
        evil = tmp_path / "evil.npz"
        np.savez(evil, a=np.array([Path("x")], dtype=object))
        assert zipfile.is_zipfile(evil)
        path = f"remembered/labels/{digest({})}"
        blob = np.frombuffer(evil.read_bytes(), dtype=np.uint8)
        folder.remove(path)
        folder.make_array(path, ArrayKind(blob.shape, blob.shape, "uint8", 0))[:] = blob
        assert folder.remembered("labels", {}, lambda: {"a": np.ones(1)})["a"] == 1
        assert "allow_pickle" in caplog.text


def test_digests_differ_by_content_and_not_by_order():
    contents = [{}, {"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": None}, {"a": [1]}, {"b": 1}, {"a": 1, "b": 1}]
    assert len({digest(content) for content in contents}) == len(contents)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"threshold": [0.1 + 0.2]}) != digest({"threshold": [0.3]})
