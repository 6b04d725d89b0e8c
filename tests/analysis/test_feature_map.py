import warnings

import numpy as np
import pytest

from itae_utils.analysis.feature_map import MOST_IMAGES, describe_map, feature_map
from itae_utils.analysis.kmeans import cluster_seeds
from itae_utils.analysis.remembered import tsne

RNG = np.random.default_rng(0)
BEFORE = (RNG.normal(size=(60, 8)) + 4 * np.eye(8)[np.arange(60) % 3]).astype(np.float32)
AFTER = BEFORE.copy()
AFTER[:9] = np.roll(BEFORE[:9], 1, axis=0)  # these images take the places of others
SETTINGS = {"seed": 0, "kmeans_seed": 3, "store": None}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_neighbours_and_change_equal_a_slow_reference():
    found = feature_map({"baseline": BEFORE, "itae": AFTER}, 3, sample=40, **SETTINGS)
    assert len(found.indices) == 40
    for rows, neighbours in zip((BEFORE[found.indices], AFTER[found.indices]), found.neighbours, strict=True):
        for place in range(40):
            others = sorted((other for other in range(40) if other != place),
                            key=lambda other, place=place, rows=rows: -cosine(rows[place], rows[other]))
            assert neighbours[place].tolist() == others[:5]
    change = [1 - cosine(BEFORE[index], AFTER[index]) for index in found.indices]
    assert np.allclose(found.change, change, atol=1e-6)
    kept = [len(set(a) & set(b)) for a, b in zip(*map(np.ndarray.tolist, found.neighbours), strict=True)]
    assert found.kept.tolist() == kept
    assert f"{found.moved.sum()} change their cluster" in describe_map(found)


def test_clusters_are_those_of_all_images_with_the_numbers_of_the_baseline():
    found = feature_map({"baseline": BEFORE, "itae": AFTER}, 3, sample=60, **SETTINGS)
    before, after = (cluster_seeds(rows, 3, seeds=[3], n_init=10)[0][0] for rows in (BEFORE, AFTER))
    assert np.array_equal(found.clusters[0], before)
    for number in range(3):
        assert len(np.unique(after[found.clusters[1] == number])) == 1, "only the numbers differ"
    assert (found.moved == (np.arange(60) < 9)).all()


def test_equal_features_have_one_map_and_constant_ones_none():
    found = feature_map({"baseline": BEFORE, "itae": BEFORE}, 3, sample=30, **SETTINGS)
    assert found.points[0] is found.points[1]
    assert (found.kept == 5).all()
    assert not found.moved.any()
    assert found.change.max() < 1e-6
    constant = np.ones_like(BEFORE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = feature_map({"baseline": constant, "itae": constant}, 2, sample=30, **SETTINGS)
    assert found.points is None
    assert not np.any(found.clusters)


def test_a_shift_of_the_whole_map_is_taken_back():
    found = feature_map({"baseline": BEFORE, "itae": AFTER}, 3, sample=60, **SETTINGS)
    moved = found.points[1] - found.points[0]
    assert np.allclose(np.median(moved, axis=0), 0, atol=1e-5)
    start = tsne(BEFORE, perplexity=59 / 3, seed=0, store=None)
    shift = tsne(AFTER, perplexity=59 / 3, seed=0, start=start, store=None) - found.points[1]
    assert np.allclose(shift, shift[0], atol=1e-4), "the map is the same but for one shift"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fewer_than_four_images_have_no_map(count):
    features = {"baseline": BEFORE[:count], "itae": AFTER[:count]}
    found = feature_map(features, None if count < 4 else 2, sample=60, **SETTINGS)
    assert (found.points is None) == (count < 4)
    assert [each.shape for each in found.neighbours] == [(count, count - 1)] * 2
    assert found.change.shape == (count,)
    drawn = feature_map({"baseline": BEFORE, "itae": AFTER}, 3, sample=count, **SETTINGS)
    assert len(drawn.indices) == count
    assert (drawn.points is None) == (count < 4)


def test_given_points_stay():
    points = (BEFORE[:30, :2], AFTER[:30, :2])
    found = feature_map({"baseline": BEFORE, "itae": AFTER}, 3, sample=30, points=points, **SETTINGS)
    assert found.points is points


def test_the_maps_are_those_of_notebook_03_and_one_that_starts_from_it():
    found = feature_map({"baseline": BEFORE, "itae": AFTER}, 3, sample=60, **SETTINGS)
    first = tsne(BEFORE, perplexity=59 / 3, seed=0, store=None)
    assert np.array_equal(found.points[0], first)
    stays = np.arange(60) >= 9

    def agreement(points: np.ndarray, others: np.ndarray) -> float:
        """Return the correlation of the places of the images whose features stay."""
        centred = [(each[stays] - each[stays].mean(axis=0)).ravel() for each in (points, others)]
        return float(np.corrcoef(*centred)[0, 1])

    turned = first[:, ::-1].copy()
    assert agreement(found.points[1], first) > 0.8
    assert agreement(tsne(AFTER, perplexity=59 / 3, seed=0, start=turned, store=None), turned) > 0.8
    assert agreement(turned, first) < 0.5


def test_there_are_at_most_2000_images(monkeypatch):
    assert MOST_IMAGES == 2000
    monkeypatch.setattr("itae_utils.analysis.feature_map.MOST_IMAGES", 20)
    assert len(feature_map({"baseline": BEFORE, "itae": AFTER}, 3, sample=50, **SETTINGS).indices) == 20


def test_the_start_of_a_map_is_in_its_cache_key(tmp_path):
    settings = {"perplexity": 5, "seed": 0, "store": tmp_path}
    plain = tsne(BEFORE, **settings)
    started = tsne(BEFORE, start=plain[::-1], **settings)
    assert not np.allclose(plain, started)
    assert np.array_equal(tsne(BEFORE, **settings), plain)
    assert np.array_equal(tsne(BEFORE, start=plain[::-1], **settings), started)


@pytest.mark.parametrize("count", [4, 6])
def test_few_images(count):
    found = feature_map({"baseline": BEFORE[:count], "itae": AFTER[:count]}, 2, sample=800, **SETTINGS)
    assert found.neighbours[0].shape == (count, min(5, count - 1))
