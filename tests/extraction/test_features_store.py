"""Extraction over a store: nothing twice, nothing stale, nothing lost."""

import tracemalloc
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
from itae_utils.store.housekeeping import holdings
from itae_utils.store.store import open_store
from tests.conftest import MadeDataset, array_dataset, as_backbone, tiny_vit

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
    """The baseline and count - 1 settings that find something."""
    return {"baseline": None} | {f"v{number}": ITAE("key", 8 + number / 20) for number in range(1, count)}


class Counter:
    """Images that went through the model, batch by batch."""

    def __init__(self, model):
        self.batches = []
        model.patch_embed.register_forward_hook(lambda _module, args, _out: self.batches.append(len(args[0])))

    @property
    def images(self) -> int:
        return sum(self.batches)


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_a_warm_store_gives_the_same_bytes_without_a_pass(backbone, dataset, tmp_path, place):
    store = tmp_path if place == "folder" else f"memory://{tmp_path.name}"
    in_memory = extract_features(backbone, dataset, grid(10), batch_size=BATCH, store=None)
    cold = extract_features(backbone, dataset, grid(10), batch_size=BATCH, store=store)
    counter = Counter(backbone.model)
    warm = extract_features(backbone, dataset, grid(10), batch_size=BATCH, store=store)
    assert counter.images == 0
    for features in (cold, warm):
        for name in grid(10):
            assert np.array_equal(features[name], in_memory[name]), name
            assert np.array_equal(features.artifact_counts[name], in_memory.artifact_counts[name]), name
            assert np.array_equal(np.concatenate(list(features.parts(name))), in_memory[name])
    assert in_memory.artifact_counts["v9"].any()
    assert set(in_memory.computed.values()) == set(cold.computed.values()) == {11}
    assert set(warm.computed.values()) == {0}
    assert (in_memory.settings["store"], warm.settings["store"]) == (None, open_store(store).place)


def test_only_what_is_missing_is_computed_and_in_one_pass(backbone, dataset, tmp_path):
    extract_features(backbone, dataset, grid(30), batch_size=BATCH, store=tmp_path)
    counter = Counter(backbone.model)
    features = extract_features(backbone, dataset, grid(40), batch_size=BATCH, store=tmp_path)
    assert counter.images == 11
    assert [name for name, count in features.computed.items() if count] == [f"v{number}" for number in range(30, 40)]
    assert np.array_equal(features["v35"], extract_features(backbone, dataset, {"v": grid(40)["v35"]}, store=None,
                                                            batch_size=BATCH)["v"])


def test_equal_settings_are_kept_and_run_once(backbone, dataset, tmp_path):
    same = {"a": ITAE("key", 9.0), "b": ITAE("key", 9.0, alpha=0.7), "c": ITAE("key", 9.0, seed=4), "plain": None,
            "again": None, "other": ITAE("key", 9.0, "mask")}
    features = extract_features(backbone, dataset, same, batch_size=BATCH, store=tmp_path)
    assert holdings(open_store(tmp_path))[0].variants == 3
    assert len({id(kept) for kept in extract_features(backbone, dataset, same, store=None).kept.values()}) == 3
    assert np.array_equal(features["a"], features["c"])
    assert list(features) == list(same)


def test_a_stopped_run_goes_on_after_its_last_whole_shard(backbone, dataset, tmp_path):
    whole = extract_features(backbone, dataset, grid(3), batch_size=BATCH, store=None)
    counter = Counter(backbone.model)
    stop = backbone.model.blocks[0].register_forward_hook(
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt) if counter.images > 6 else None)
    with pytest.raises(KeyboardInterrupt):
        extract_features(backbone, dataset, grid(3), batch_size=BATCH, store=tmp_path)
    stop.remove()
    counter.batches.clear()
    features = extract_features(backbone, dataset, grid(3), batch_size=BATCH, store=tmp_path)
    assert counter.images == 11 - 4
    assert set(features.computed.values()) == {7}
    for name in whole:
        assert np.array_equal(features[name], whole[name])


def test_shards_that_lack_different_variants_share_a_pass(backbone, dataset, tmp_path):
    extract_features(backbone, dataset, grid(3), batch_size=BATCH, store=tmp_path)
    chunks = {name: Path(tmp_path, kept.path) for name, kept in
              extract_features(backbone, dataset, grid(3), batch_size=BATCH, store=tmp_path).kept.items()}
    (chunks["v1"] / "features/c/0/0").write_bytes(b"")
    (chunks["v2"] / "features/c/2/0").unlink()
    counter = Counter(backbone.model)
    features = extract_features(backbone, dataset, grid(3), batch_size=BATCH, store=tmp_path)
    assert features.computed == {"baseline": 0, "v1": 4, "v2": 3}
    assert counter.batches == [2, 2, 2, 1]
    assert np.array_equal(features["v1"], extract_features(backbone, dataset, grid(3), batch_size=BATCH,
                                                           store=None)["v1"])


def write(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize("change", ["added", "removed", "edited", "renamed", "moved to another class"])
def test_a_folder_that_changed_between_runs_gives_nothing_stale(backbone, tmp_path, change):
    folder = tmp_path / "pictures"
    for number in range(6):
        write(folder / "ab"[number % 2] / f"{number}.png", number)

    def run(store):
        images = load_dataset(f"imagefolder:{folder}")
        return extract_features(backbone, images, grid(2), batch_size=BATCH, store=store)

    before = run(tmp_path / "store")
    {
        "added": lambda: write(folder / "a" / "1.png", 9),
        "removed": lambda: (folder / "a" / "0.png").unlink(),
        "edited": lambda: write(folder / "a" / "0.png", 9),
        "renamed": lambda: (folder / "a" / "0.png").rename(folder / "a" / "7.png"),
        "moved to another class": lambda: (folder / "a" / "0.png").rename(folder / "b" / "0.png"),
    }[change]()
    after, fresh = run(tmp_path / "store"), run(None)
    assert set(after.computed.values()) == {len(fresh["baseline"])}
    for name in fresh:
        assert np.array_equal(after[name], fresh[name])
    assert not np.array_equal(before["baseline"], after["baseline"])


def test_features_are_read_when_they_are_asked_for(backbone, dataset, tmp_path):
    features = extract_features(backbone, dataset, grid(3), batch_size=BATCH, store=tmp_path)
    gone = Path(tmp_path, features.kept["v2"].path, "features/c/1/0")
    gone.unlink()
    assert len(features["v1"]) == 11
    assert len(next(features.parts("v2"))) == 4
    with pytest.raises(ItaeError, match=r"shard 1 of .* can't be read any more"):
        features["v2"]
    with pytest.raises(KeyError):
        features["v3"]


def test_images_that_can_t_be_told_need_no_store_or_say_so(backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("ITAE_STORE", str(tmp_path))
    assert extract_features(backbone, MadeDataset(3), {"it": None}).settings["store"] is None
    with pytest.raises(ItaeError, match=r"'made' says nothing of its images.*store=None"):
        extract_features(backbone, MadeDataset(3), {"it": None}, store=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_default_store_that_can_t_be_used_is_done_without(backbone, dataset, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("ITAE_STORE")
    monkeypatch.setenv("ITAE_CACHE", str(tmp_path / "file"))
    features = extract_features(backbone, dataset, {"it": None}, batch_size=BATCH)
    assert features.settings["store"] is None
    assert np.array_equal(features["it"], extract_features(backbone, dataset, {"it": None}, batch_size=BATCH,
                                                           store=None)["it"])
    assert "Not a directory" in caplog.text
    assert "kept in memory" in caplog.text
    with pytest.raises(ItaeError, match=r"can't be \w+ \(Not a directory\)"):
        extract_features(backbone, dataset, {"it": None}, store=tmp_path / "file" / "store")
    monkeypatch.setenv("ITAE_STORE", str(tmp_path / "file" / "store"))
    with pytest.raises(ItaeError, match=r"can't be \w+ \(Not a directory\)"):
        extract_features(backbone, dataset, {"it": None})


def test_the_environment_names_the_store(backbone, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("ITAE_STORE", str(tmp_path / "here"))
    assert extract_features(backbone, dataset, {"it": None}).settings["store"] == str(tmp_path / "here")


def test_memory_is_bounded_by_a_shard(backbone, tmp_path):
    """However many images: what NumPy holds beside the data set itself."""
    def peak(count: int) -> int:
        dataset = array_dataset(count)
        extract_features(backbone, dataset, grid(9), batch_size=BATCH, store=tmp_path / "warm-up")
        tracemalloc.start()
        extract_features(backbone, dataset, grid(9), batch_size=BATCH, store=tmp_path / str(count))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(40), peak(400)
    assert many - few < 360 * 9 * backbone.dim * 4 / 4  # a quarter of what the further features take


def test_a_torch_data_set_of_one_s_own_can_be_kept(backbone, tmp_path):
    class Own(torch.utils.data.Dataset):
        images = array_dataset(5).images

        def __len__(self):
            return 5

        def __getitem__(self, index):
            return Image.fromarray(self.images[index]), 0

    dataset = Own()
    first, again = (extract_features(backbone, dataset, grid(2), batch_size=BATCH, store=tmp_path) for _ in range(2))
    assert first.computed == {"baseline": 5, "v1": 5}
    assert again.computed == {"baseline": 0, "v1": 0}
    assert first.targets is None


def test_a_url_that_needs_another_package_is_no_damage(backbone, dataset, caplog):
    with pytest.raises(ItaeError, match="can't be opened"):
        extract_features(backbone, dataset, grid(2), batch_size=BATCH, store="nonsense://x")
    assert not caplog.records


def test_a_file_is_no_store(backbone, dataset, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ItaeError, match=r"file' is a file: name a folder"):
        extract_features(backbone, dataset, grid(2), batch_size=BATCH, store=tmp_path / "file")
