import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from itae_utils.errors import ItaeError
from itae_utils.store.store import open_store
from itae_utils.store.variants import InMemory, InStore

SIZE, DIM, SHARD = 50, 4, 20
ENTRY = {"backbone": "tiny", "size": SIZE, "dim": DIM, "shard_size": SHARD}
FEATURES = np.random.default_rng(0).normal(size=(SIZE, DIM)).astype(np.float32)
COUNTS = np.arange(SIZE)


@pytest.fixture(params=["folder", "memory://", "in memory"])
def variant(request, tmp_path):
    if request.param == "in memory":
        return InMemory(SIZE, DIM, SHARD)
    place = f"memory://{tmp_path.name}" if request.param == "memory://" else tmp_path / "store"
    return InStore(open_store(place), ENTRY, {"source": "key"})


@pytest.fixture
def stored(tmp_path):
    """A whole variant in a folder."""
    made = InStore(open_store(tmp_path / "store"), ENTRY, {"source": "key"})
    save(made)
    return made


def save(variant, shards=None):
    variant.prepare()
    for shard in variant.shards if shards is None else shards:
        rows = variant.rows(shard)
        variant.save(shard, FEATURES[rows], COUNTS[rows])


def again(variant: InStore) -> InStore:
    """As another process sees it."""
    return InStore(open_store(variant.store.place), variant.entry, variant.setting)


def chunk(variant: InStore, shard: int, name: str = "features") -> Path:
    return Path(variant.store.place, variant.path, name, "c", str(shard), *["0"] * (name == "features"))


def test_what_is_saved_is_read(variant):
    assert [(rows.start, rows.stop) for rows in map(variant.rows, variant.shards)] == [(0, 20), (20, 40), (40, 50)]
    assert variant.missing() == [0, 1, 2]
    save(variant)
    assert np.array_equal(variant.features(), FEATURES)
    assert variant.features().dtype == np.float32
    assert np.array_equal(np.concatenate([variant.part(shard) for shard in variant.shards]), FEATURES)
    assert variant.counts().tolist() == COUNTS.tolist()


def test_a_variant_in_memory_is_never_found():
    variant = InMemory(SIZE, DIM, SHARD)
    save(variant)
    assert variant.missing() == [0, 1, 2]


def test_shards_are_found_by_others(tmp_path):
    variant = InStore(open_store(tmp_path), ENTRY, {"source": "key"})
    save(variant, [0, 2])
    assert again(variant).missing() == variant.missing() == [1]
    save(again(variant), [1])
    assert np.array_equal(variant.features(), FEATURES)
    for entry, setting in [(ENTRY | {"backbone": "other"}, variant.setting), (ENTRY, {"source": "value"})]:
        assert InStore(variant.store, entry, setting).missing() == [0, 1, 2]


def test_a_shard_counts_only_with_both_its_parts(stored):
    chunk(stored, 1, "artifact_counts").unlink()
    chunk(stored, 2).unlink()
    assert again(stored).missing() == [1, 2]


def test_a_shard_with_a_number_that_is_not_finite_does_not_count(stored):
    features = FEATURES[stored.rows(1)].copy()
    features[3, 1] = np.inf
    stored.save(1, features, COUNTS[stored.rows(1)])
    assert again(stored).missing() == [1]


@pytest.mark.parametrize("name", ["features", "artifact_counts"])
def test_every_damaged_shard_is_found_named_and_mended(stored, name, caplog):
    """50 shards with a flipped bit; others cut short or empty."""
    rng = random.Random(0)
    for trial, kind in enumerate(["flipped"] * 50 + ["cut short"] * 10 + ["empty"] * 5):
        shard = trial % 3
        path = chunk(stored, shard, name)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        cut = whole[:rng.randrange(1, len(whole))]
        path.write_bytes({"flipped": bytes(damaged), "cut short": cut, "empty": b""}[kind])
        caplog.clear()
        assert again(stored).missing() == [shard], kind
        rows = stored.rows(shard)
        assert (f"shard {shard} (images {rows.start} to {rows.stop - 1}) of {stored.path} in the feature store "
                f"{stored.store.place} is damaged") in caplog.text
        with pytest.raises(ItaeError, match=f"shard {shard} of .* can't be read any more .*: extract the features"):
            again(stored).features() if name == "features" else again(stored).counts()
        save(again(stored), [shard])
        assert path.read_bytes() == whole
    assert again(stored).missing() == []


@pytest.mark.parametrize("where", ["", "features", "features/ENTRY", "PATH", "PATH/features", "PATH/artifact_counts"])
@pytest.mark.parametrize("content", [b"", b"{", b'{"zarr_format": 3, "node_type": "array"}'])
def test_damaged_metadata_never_loses_more_than_the_variant(stored, where, content):
    where = where.replace("PATH", stored.path).replace("features/ENTRY", stored.folder)
    Path(stored.store.place, where, "zarr.json").write_bytes(content)
    found = again(stored)
    missing = found.missing()
    assert missing in ([], [0, 1, 2])
    save(found, missing)
    assert np.array_equal(again(stored).features(), FEATURES)


def test_a_lost_variant_is_an_error_where_it_is_read(stored):
    found = again(stored)
    assert found.missing() == []
    shutil.rmtree(stored.store.place)
    with pytest.raises(ItaeError, match="it is gone"):
        found.part(1)
    with pytest.raises(ItaeError, match="can't be read any more"):
        again(stored).features()


def test_the_same_bytes_whoever_writes(tmp_path):
    for place in ("a", "b"):
        save(InStore(open_store(tmp_path / place), ENTRY, {}))
    first, second = ({path.relative_to(tmp_path / place): path.read_bytes()
                      for path in (tmp_path / place).rglob("*") if path.is_file()} for place in ("a", "b"))
    assert first == second


def test_half_written_files_are_not_taken_for_shards(stored):
    path = chunk(stored, 1)
    path.rename(path.with_name(f"{path.name}.0123.partial"))
    assert again(stored).missing() == [1]


def test_it_can_be_sent_to_another_process(stored):
    _ = stored.missing()
    assert np.array_equal(pickle.loads(pickle.dumps(stored)).features(), FEATURES)


@pytest.mark.parametrize("call", [lambda variant: variant.prepare(), lambda variant: save(variant)])
def test_a_store_that_can_t_be_made_is_told_before_any_work(tmp_path, call):
    (tmp_path / "file").write_text("")
    variant = InStore(open_store(tmp_path / "file" / "store"), ENTRY, {})
    with pytest.raises(ItaeError, match="can't be written"):
        call(variant)


def test_a_full_disk_is_one_line_and_loses_nothing(stored, monkeypatch):
    """The shard that was being written counts as missing, the others stay."""
    import zarr

    put = zarr.Array.__setitem__

    def full(array, rows, values):
        if array.path.endswith("features"):
            raise OSError(28, "No space left on device")
        put(array, rows, values)

    other = InStore(stored.store, ENTRY, {"source": "value"})
    save(other, [0])
    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    with pytest.raises(ItaeError, match=r"can't be written \(No space left on device\): free space"):
        save(other, [1])
    monkeypatch.undo()
    assert again(other).missing() == [1, 2]
    assert again(stored).missing() == []
