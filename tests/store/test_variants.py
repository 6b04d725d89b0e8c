import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from itae_utils.errors import ItaeError
from itae_utils.method.artifacts import FiringRule
from itae_utils.method.setting import ITAE
from itae_utils.store.store import Store, digest, open_store
from itae_utils.store.variants import StoredVariant, setting_key

SIZE, DIM, SHARD = 50, 4, 20
ENTRY = {"backbone": "tiny", "size": SIZE, "dim": DIM, "shard_size": SHARD}
FEATURES = np.random.default_rng(0).normal(size=(SIZE, DIM)).astype(np.float32)
COUNTS = np.arange(SIZE)


@pytest.fixture(params=["folder", "memory://", "in memory"])
def variant(request, tmp_path):
    store = {"folder": open_store(tmp_path / "store"), "memory://": open_store(f"memory://{tmp_path.name}"),
             "in memory": Store(None)}[request.param]
    return StoredVariant(store, ENTRY, {"source": "key"})


@pytest.fixture
def stored(tmp_path):
    """Return a complete variant in a folder."""
    variant = StoredVariant(open_store(tmp_path / "store"), ENTRY, {"source": "key"})
    save(variant)
    return variant


def save(variant, shards=None):
    variant.prepare()
    for shard in variant.shards if shards is None else shards:
        rows = variant.rows(shard)
        variant.save(shard, FEATURES[rows], COUNTS[rows])


def again(variant: StoredVariant) -> StoredVariant:
    """Return the variant as another process opens it."""
    return StoredVariant(open_store(variant.store.place), variant.entry, variant.setting)


def chunk(variant: StoredVariant, shard: int, name: str = "features") -> Path:
    return Path(variant.store.place, variant.path, name, "c", str(shard), *["0"] * (name == "features"))


TRUTH = FiringRule(1, (2, 3), 0.5)
ONE, OTHER = (0.5, 1.5), (0.5, 1.75)


@pytest.mark.parametrize("same", [
    [ITAE("key", 9), ITAE("key", 9.0, rank=3), ITAE("key", (9.0,), tail="low"), ITAE("key", 9.0, alpha=0.3, seed=7)],
    [ITAE("token", 9.0), ITAE("token", 9.0, tail="high")],
    [ITAE(select="oracle"), ITAE("direction", "sd:3", select="oracle", rank=2), ITAE("token", 3.0, select="oracle"),
     ITAE("key", 3.0, select="oracle", tail="high")]])
def test_settings_with_the_same_effect_have_one_key(same):
    assert len({digest(setting_key(itae, TRUTH)) for itae in same}) == 1


def test_settings_with_another_effect_have_another_key():
    settings = [None, ITAE(select="oracle"), *(ITAE(source, 9.0) for source in ("key", "token", "direction")),
                ITAE("key", 9.0, tail="high"), ITAE("token", 9.0, tail="low"), ITAE("direction", 9.0, rank=2),
                *(ITAE("key", 9.0, attenuation) for attenuation in ("spread", "clip")),
                *(ITAE("key", (9.0, 9.0), "substitute", blocks=2, substitutes=vectors)
                  for vectors in [(ONE, OTHER), (OTHER, ONE), (None, ONE)])]
    assert len({digest(setting_key(itae, TRUTH)) for itae in settings}) == len(settings)
    assert setting_key(settings[-1])["substitutes"] == (None, ONE)


def test_what_is_saved_is_read(variant):
    assert [(rows.start, rows.stop) for rows in map(variant.rows, variant.shards)] == [(0, 20), (20, 40), (40, 50)]
    assert variant.missing() == [0, 1, 2]
    save(variant)
    assert np.array_equal(variant.features(), FEATURES)
    assert variant.features().dtype == np.float32
    assert np.array_equal(np.concatenate([variant.part(shard) for shard in variant.shards]), FEATURES)
    assert variant.counts().tolist() == COUNTS.tolist()


def test_shards_are_found_by_others(tmp_path):
    variant = StoredVariant(open_store(tmp_path), ENTRY, {"source": "key"})
    save(variant, [0, 2])
    assert again(variant).missing() == variant.missing() == [1]
    save(again(variant), [1])
    assert np.array_equal(variant.features(), FEATURES)
    for entry, setting in [(ENTRY | {"backbone": "other"}, variant.setting), (ENTRY, {"source": "value"})]:
        assert StoredVariant(variant.store, entry, setting).missing() == [0, 1, 2]


def test_a_shard_is_complete_only_with_features_and_counts(stored):
    chunk(stored, 1, "artifact_counts").unlink()
    half_written = chunk(stored, 2)
    half_written.rename(half_written.with_name(f"{half_written.name}.0123.partial"))
    assert again(stored).missing() == [1, 2]


def test_a_shard_with_a_number_that_is_not_finite_is_not_complete(stored):
    features = FEATURES[stored.rows(1)].copy()
    features[3, 1] = np.inf
    stored.save(1, features, COUNTS[stored.rows(1)])
    assert again(stored).missing() == [1]


@pytest.mark.parametrize("name", ["features", "artifact_counts"])
@pytest.mark.parametrize("damage", ["flipped", "cut short", "empty"])
def test_every_damaged_shard_is_found_named_and_recomputed(stored, name, damage, caplog):
    rng = random.Random(0)
    for shard in stored.shards:
        path = chunk(stored, shard, name)
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        cut = whole[:rng.randrange(1, len(whole))]
        path.write_bytes({"flipped": bytes(flipped), "cut short": cut, "empty": b""}[damage])
        caplog.clear()
        assert again(stored).missing() == [shard]
        rows = stored.rows(shard)
        for named in (f"shard {shard} ", f"images {rows.start} to {rows.stop - 1}", stored.path, stored.store.place):
            assert named in caplog.text
        with pytest.raises(ItaeError, match=f"shard {shard} of {stored.path}"):
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


def test_a_variant_removed_meanwhile_is_an_error_when_read(stored):
    found = again(stored)
    assert found.missing() == []
    shutil.rmtree(stored.store.place)
    for variant in (found, again(stored)):
        with pytest.raises(ItaeError, match=f"shard 1 of {stored.path}"):
            variant.part(1)


def test_the_same_bytes_whoever_writes(tmp_path):
    for place in ("a", "b"):
        save(StoredVariant(open_store(tmp_path / place), ENTRY, {}))
    first, second = ({path.relative_to(tmp_path / place): path.read_bytes()
                      for path in (tmp_path / place).rglob("*") if path.is_file()} for place in ("a", "b"))
    assert first == second


def test_variants_can_be_pickled(variant):
    """Features in memory travel with their content."""
    save(variant)
    assert np.array_equal(pickle.loads(pickle.dumps(variant)).features(), FEATURES)
