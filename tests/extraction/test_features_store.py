"""Extraction with a store computes nothing twice, never uses stale features and loses nothing."""

import gc
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from itae_utils.data.datasets import load_dataset
from itae_utils.errors import ItaeError
from itae_utils.extraction import job
from itae_utils.extraction.features import extract_features
from itae_utils.method.setting import ITAE
from itae_utils.store.housekeeping import list_entries
from itae_utils.store.store import open_store
from tests.conftest import MadeDataset, array_dataset, as_backbone, tiny_vit
from tests.data.test_datasets import picture, save

BATCH = 2


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(job, "SHARD_IMAGES", 4)  # of two batches


@pytest.fixture
def backbone():
    return as_backbone(tiny_vit("registers"))


@pytest.fixture
def dataset():
    return array_dataset(11)


def grid(count: int) -> dict[str, ITAE | None]:
    """Return the baseline and count - 1 settings that find artifacts."""
    return {"baseline": None} | {f"v{number}": ITAE("key", 8 + number / 20) for number in range(1, count)}


@pytest.fixture
def batches(monkeypatch):
    """A list that grows by the number of images of each batch that a model runs on."""
    sizes, call = [], job.OnePass.__call__
    monkeypatch.setattr(job.OnePass, "__call__", lambda self, images, first: sizes.append(len(images)) or call(
        self, images, first))
    return sizes


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_a_warm_store_gives_the_same_bytes_without_a_pass(backbone, dataset, tmp_path, place, batches):
    store = tmp_path if place == "folder" else f"memory://{tmp_path.name}"
    in_memory = extract_features(backbone, dataset, grid(10), batch_size=BATCH, store=None)
    cold = extract_features(backbone, dataset, grid(10), batch_size=BATCH, store=store)
    batches.clear()
    warm = extract_features(backbone, dataset, grid(10), batch_size=BATCH, store=store)
    assert not batches
    for features in (cold, warm):
        for name in grid(10):
            assert np.array_equal(features[name], in_memory[name]), name
            assert np.array_equal(features.artifact_counts[name], in_memory.artifact_counts[name]), name
            assert np.array_equal(np.concatenate(list(features.parts(name))), in_memory[name])
    assert in_memory.artifact_counts["v9"].any()
    assert set(in_memory.computed.values()) == set(cold.computed.values()) == {11}
    assert set(warm.computed.values()) == {0}
    assert (in_memory.settings["store"], warm.settings["store"]) == (None, open_store(store).place)


def test_only_what_is_missing_is_computed_and_in_one_pass(backbone, dataset, tmp_path, batches):
    extract_features(backbone, dataset, grid(30), batch_size=BATCH, store=tmp_path)
    batches.clear()
    features = extract_features(backbone, dataset, grid(40), batch_size=BATCH, store=tmp_path)
    assert sum(batches) == 11
    assert [name for name, count in features.computed.items() if count] == [f"v{number}" for number in range(30, 40)]
    assert np.array_equal(features["v35"], extract_features(backbone, dataset, {"v": grid(40)["v35"]}, store=None,
                                                            batch_size=BATCH)["v"])


def test_equal_settings_are_stored_and_computed_once(backbone, dataset, tmp_path):
    same = {"a": ITAE("key", 9.0), "b": ITAE("key", 9.0, alpha=0.7), "c": ITAE("key", 9.0, seed=4), "plain": None,
            "again": None, "other": ITAE("key", 9.0, "mask")}
    features = extract_features(backbone, dataset, same, batch_size=BATCH, store=tmp_path)
    assert len(list_entries(open_store(tmp_path))[0].variants) == 3
    assert len(set(extract_features(backbone, dataset, same, store=None).stored.values())) == 3
    assert np.array_equal(features["a"], features["c"])
    assert features.computed == dict.fromkeys(same, 11)
    assert list(features) == list(same)


def test_features_in_memory_are_private_to_a_call_and_freed_with_them(backbone, dataset):
    first, second = (extract_features(backbone, dataset, grid(3), batch_size=BATCH, store=None) for _ in range(2))
    assert first.computed == second.computed == dict.fromkeys(grid(3), 11)
    content = weakref.ref(first.stored["v1"].store.zarr)
    del first, second
    gc.collect()
    assert content() is None


def test_a_stopped_run_resumes_after_its_last_whole_shard(backbone, dataset, tmp_path, batches, monkeypatch):
    whole = extract_features(backbone, dataset, grid(3), batch_size=BATCH, store=None)
    call = job.OnePass.__call__

    def stopping(self, images, first):
        if first >= 6:
            raise KeyboardInterrupt
        return call(self, images, first)

    monkeypatch.setattr(job.OnePass, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        extract_features(backbone, dataset, grid(3), batch_size=BATCH, store=tmp_path)
    monkeypatch.setattr(job.OnePass, "__call__", call)
    batches.clear()
    features = extract_features(backbone, dataset, grid(3), batch_size=BATCH, store=tmp_path)
    assert sum(batches) == 11 - 4
    assert set(features.computed.values()) == {7}
    for name in whole:
        assert np.array_equal(features[name], whole[name])


def test_shards_that_lack_different_variants_share_a_pass(backbone, dataset, tmp_path, batches):
    extract_features(backbone, dataset, grid(3), batch_size=BATCH, store=tmp_path)
    chunks = {name: Path(tmp_path, variant.path) for name, variant in
              extract_features(backbone, dataset, grid(3), batch_size=BATCH, store=tmp_path).stored.items()}
    (chunks["v1"] / "features/c/0/0").write_bytes(b"")
    (chunks["v2"] / "features/c/2/0").unlink()
    batches.clear()
    features = extract_features(backbone, dataset, grid(3), batch_size=BATCH, store=tmp_path)
    assert features.computed == {"baseline": 0, "v1": 4, "v2": 3}
    assert batches == [2, 2, 2, 1]
    assert np.array_equal(features["v1"], extract_features(backbone, dataset, grid(3), batch_size=BATCH,
                                                           store=None)["v1"])


@pytest.mark.parametrize("change", ["edited", "renamed"])
def test_a_folder_that_changed_between_runs_is_computed_again(backbone, tmp_path, change):
    folder = tmp_path / "pictures"
    for number in range(4):
        save(folder / "ab"[number % 2] / f"{number}.png", picture(number))

    def run(store):
        images = load_dataset(f"imagefolder:{folder}")
        return extract_features(backbone, images, grid(2), batch_size=BATCH, store=store)

    run(tmp_path / "store")
    if change == "edited":
        save(folder / "a" / "0.png", picture(9))
    else:
        (folder / "a" / "0.png").rename(folder / "a" / "7.png")
    after, fresh = run(tmp_path / "store"), run(None)
    assert set(after.computed.values()) == {4}
    for name in fresh:
        assert np.array_equal(after[name], fresh[name])


def test_features_are_read_on_access(backbone, dataset, tmp_path):
    features = extract_features(backbone, dataset, grid(3), batch_size=BATCH, store=tmp_path)
    Path(tmp_path, features.stored["v2"].path, "features/c/1/0").unlink()
    assert len(features["v1"]) == 11
    assert len(next(features.parts("v2"))) == 4
    with pytest.raises(ItaeError, match="shard 1 "):
        features["v2"]
    with pytest.raises(KeyError):
        features["v3"]


def test_a_data_set_without_images_is_computed_in_memory_unless_a_store_is_given(backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("ITAE_STORE", str(tmp_path))
    assert extract_features(backbone, MadeDataset(3), {"it": None}).settings["store"] is None
    with pytest.raises(ItaeError, match=r"'made'.*\.images"):
        extract_features(backbone, MadeDataset(3), {"it": None}, store=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_default_store_that_fails_is_replaced_by_memory(backbone, dataset, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("ITAE_STORE")
    monkeypatch.setenv("ITAE_CACHE", str(tmp_path / "file"))
    features = extract_features(backbone, dataset, {"it": None}, batch_size=BATCH)
    assert features.settings["store"] is None
    assert np.array_equal(features["it"], extract_features(backbone, dataset, {"it": None}, batch_size=BATCH,
                                                           store=None)["it"])
    assert "Not a directory" in caplog.text
    with pytest.raises(ItaeError, match="Not a directory"):
        extract_features(backbone, dataset, {"it": None}, store=tmp_path / "file" / "store")
    monkeypatch.setenv("ITAE_STORE", str(tmp_path / "file" / "store"))
    with pytest.raises(ItaeError, match="Not a directory"):
        extract_features(backbone, dataset, {"it": None})


@pytest.mark.parametrize("in_memory", [False, True])
def test_memory_is_bounded_by_a_shard(backbone, tmp_path, in_memory, monkeypatch):
    """NumPy holds one shard beside the data set, and the features themselves without a store."""
    monkeypatch.setattr(job, "SHARD_IMAGES", 50)

    def peak(count: int) -> int:
        dataset = array_dataset(count)
        tracemalloc.start()
        features = extract_features(backbone, dataset, grid(9), batch_size=50,
                                    store=None if in_memory else tmp_path / str(count))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(features) == 9
        return found

    peak(50)  # imports and caches are loaded once
    few, many = peak(200), peak(1000)
    further = 800 * 9 * (backbone.dim + 1) * 4
    assert many - few < further * in_memory + further / 4


def test_a_torch_data_set_of_one_s_own_can_be_stored(backbone, tmp_path, monkeypatch):
    class Own(torch.utils.data.Dataset):
        images = array_dataset(5).images

        def __len__(self):
            return 5

        def __getitem__(self, index):
            return Image.fromarray(self.images[index]), 0

    monkeypatch.setenv("ITAE_STORE", str(tmp_path))
    first, again = (extract_features(backbone, Own(), grid(2), batch_size=BATCH) for _ in range(2))
    assert first.settings["store"] == str(tmp_path)
    assert first.computed == {"baseline": 5, "v1": 5}
    assert again.computed == {"baseline": 0, "v1": 0}
    assert first.targets is None
