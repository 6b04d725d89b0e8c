import os
import tracemalloc

import numpy as np
import pytest
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import normalize

from itae_utils.analysis import kmeans
from itae_utils.analysis.kmeans import cluster, cluster_parts, cluster_seeds
from itae_utils.analysis.metrics import accuracy
from itae_utils.errors import ItaeError
from tests.analysis.test_metrics import blobs


def peak_memory(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def cut(features, size):
    """The features as `cluster_parts` takes them, in parts of `size` rows."""
    return lambda: (features[first : first + size] for first in range(0, len(features), size))


def inertia_about_means(features, labels):
    return sum(((features[labels == c] - features[labels == c].mean(axis=0)) ** 2).sum() for c in np.unique(labels))


class TestCluster:

    def test_rows_of_zeros_are_no_error(self):
        features, _ = blobs()
        features[0] = 0
        assert cluster(features, 3)[0].shape == (60,)

    @pytest.mark.parametrize("unit", [True, False])
    def test_digits_are_clustered_as_plain_k_means_does(self, unit):
        pixels = load_digits().data.astype(np.float32)
        found, inertias = cluster_seeds(pixels, 10, seeds=3, n_init=2, normalize=unit)
        for seed in range(3):
            plain = KMeans(10, n_init=2, random_state=seed).fit(normalize(pixels) if unit else pixels)
            np.testing.assert_array_equal(found[seed], plain.labels_)
            assert inertias[seed] == plain.inertia_

    def test_a_seed_does_not_feel_those_before_it(self):
        """K-means takes the mean off the copy; small numbers beside a large mean would not come back as they were."""
        features = np.exp(2 * np.random.default_rng(0).normal(size=(2000, 16))).astype(np.float32)
        labels, inertias = cluster_seeds(features, 6, seeds=5, n_init=1, normalize=False)
        for run, seed in enumerate(range(5)):
            alone, inertia = cluster(features, 6, seed=seed, n_init=1, normalize=False)
            np.testing.assert_array_equal(labels[run], alone)
            assert inertias[run] == inertia

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    @pytest.mark.parametrize("unit", [True, False])
    def test_features_of_any_float_type_stay_as_they_are(self, dtype, unit, monkeypatch):
        monkeypatch.setattr(kmeans, "BLOCK", 7)
        features = np.asfortranarray(blobs(spread=1.0)[0].astype(dtype))
        before = features.copy()
        labels, _ = cluster(features, 3, normalize=unit)
        np.testing.assert_array_equal(features, before)
        single = before.astype(np.float32)
        plain = KMeans(3, n_init=10, random_state=0).fit(normalize(single) if unit else single)
        np.testing.assert_array_equal(labels, plain.labels_)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_one_float32_copy_is_held(self, dtype):
        features = blobs(classes=4, each=10_000, dim=512)[0].astype(dtype)
        cluster(features[:100], 4)  # imports that it causes do not count
        peak = peak_memory(lambda: cluster_seeds(features, 4, seeds=3, n_init=2))
        assert peak <= 1.2 * features.size * 4

    def test_a_copy_above_max_memory(self):
        features, _ = blobs()
        cluster(features.astype(np.float64), 3, max_memory=60 * 5 * 4)
        message = r"60 × 5 takes 1,200 bytes, more than max_memory, 1,199: use cluster_parts\(.*MiniBatchKMeans"
        for call in (cluster, cluster_seeds):
            with pytest.raises(ItaeError, match=message):
                call(features, 3, max_memory=1199)

    def test_half_of_the_memory_is_the_bound(self, monkeypatch):
        features, _ = blobs()
        sizes = {"SC_PAGE_SIZE": 100, "SC_PHYS_PAGES": 24}
        monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
        cluster(features, 3)
        sizes["SC_PHYS_PAGES"] = 23
        with pytest.raises(ItaeError, match="more than half of this machine's memory, 1,150: use cluster_parts"):
            cluster(features, 3)
        monkeypatch.delattr(os, "sysconf")
        cluster(features, 3)

    @pytest.mark.parametrize(("change", "message"), [
        ({"k": 1}, "k=1 "),
        ({"k": 61}, "k=61 .* 60"),
        ({"n_init": 0}, "n_init=0"),
        ({"features": np.zeros(60)}, r"shape \(60,\)"),
    ])
    def test_bad_input(self, change, message):
        with pytest.raises(ItaeError, match=message):
            cluster(**{"features": blobs()[0], "k": 3, **change})

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_features_that_are_not_finite(self, value):
        features, _ = blobs()
        features[[7, 9], 2] = value
        with pytest.raises(ItaeError, match="image 7 "):
            cluster(features, 3)


class TestParts:
    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch):
        monkeypatch.setattr(kmeans, "BLOCK", 256)
        monkeypatch.setattr(kmeans, "BATCH", 64)

    @pytest.mark.parametrize("mixed", [True, False])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_clear_clusters_are_those_of_full_k_means(self, mixed, dtype):
        features, targets = blobs(classes=6, each=500, dim=16)
        if mixed:
            order = np.random.default_rng(0).permutation(len(targets))
            features, targets = features[order], targets[order]
        labels, inertia = cluster_parts(cut(features.astype(dtype), 200), 6)
        full, full_inertia = cluster(features, 6)
        assert accuracy(targets, labels) == accuracy(targets, full) == 1
        assert labels.dtype == full.dtype
        assert inertia == pytest.approx(full_inertia, rel=0.01)

    @pytest.mark.parametrize("mixed", [True, False])
    def test_overlapping_clusters_end_near_a_minimum(self, mixed):
        features, targets = blobs(classes=20, each=200, dim=16, spread=0.5)
        if mixed:
            features = features[np.random.default_rng(0).permutation(len(targets))]
        labels, inertia = cluster_parts(cut(features, 200), 20, n_init=10)
        unit = normalize(features)
        assert inertia_about_means(unit, labels) <= inertia <= 1.01 * inertia_about_means(unit, labels)
        assert inertia <= 1.05 * cluster(features, 20)[1]

    def test_a_small_cluster_far_from_the_others_is_kept(self, monkeypatch):
        monkeypatch.setattr(kmeans, "BLOCK", 1024)
        features = np.random.default_rng(0).normal(size=(6040, 4)).astype(np.float32)
        features[::151] += 20
        labels, _ = cluster_parts(cut(features, 500), 2, normalize=False)
        assert np.bincount(labels).min() == 40

    def test_how_the_parts_are_cut_changes_nothing(self):
        features, _ = blobs(classes=5, each=200, spread=1.0)
        whole = cluster_parts(lambda: [features], 5)
        uneven = np.split(features, [0, 1, 50, 50, 999])
        for parts in (cut(features, 1), cut(features, 256), cut(features, 300), lambda: uneven):
            labels, inertia = cluster_parts(parts, 5)
            np.testing.assert_array_equal(labels, whole[0])
            assert inertia == whole[1]

    def test_the_seed_decides(self):
        features = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)
        first, again, other = (cluster_parts(cut(features, 300), 8, seed=seed)[0] for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert adjusted_rand_score(first, other) < 1

    @pytest.mark.parametrize(("name", "few", "many"), [("n_init", 1, 6), ("passes", 1, 8)])
    def test_more_starts_and_more_passes_cluster_tighter(self, name, few, many):
        features = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)
        inertias = [np.mean([cluster_parts(cut(features, 300), 20, seed=seed, **{name: value})[1] for seed in range(5)])
                    for value in (few, many)]
        assert inertias[1] < inertias[0]

    def test_normalize_makes_the_length_of_rows_irrelevant(self):
        features, targets = blobs(each=300)
        features *= np.random.default_rng(1).uniform(0.01, 100, size=(900, 1)).astype(np.float32)
        before = features.copy()
        assert accuracy(targets, cluster_parts(cut(features, 200), 3)[0]) == 1
        assert accuracy(targets, cluster_parts(cut(features, 200), 3, normalize=False)[0]) < 1
        np.testing.assert_array_equal(features, before)

    def test_parts_are_read_once_a_pass_and_twice_more(self):
        features, _ = blobs()
        reads = []

        def parts():
            reads.append(1)
            return iter([features])

        cluster_parts(parts, 3, passes=4)
        assert len(reads) == 6

    def test_every_pass_sees_each_image_once_shuffled_within_a_block(self, monkeypatch):
        seen, learn = [], MiniBatchKMeans.partial_fit

        def watched(model, batch):
            seen.append(batch[:, 0].copy())
            return learn(model, batch)

        monkeypatch.setattr(MiniBatchKMeans, "partial_fit", watched)
        cluster_parts(lambda: [np.arange(600.0)[:, None]], 2, n_init=1, passes=2, normalize=False)
        assert [len(batch) for batch in seen] == [256, *2 * [64, 64, 64, 64, 64, 64, 64, 64, 64, 24]]
        for first in (1, 11):
            for count, block in ((4, range(256)), (4, range(256, 512)), (2, range(512, 600))):
                rows, first = np.concatenate(seen[first : first + count]), first + count
                assert sorted(rows) == list(block)
                assert list(rows) != list(block)

    def test_memory_does_not_grow_with_the_images(self):
        def parts():
            rng = np.random.default_rng(0)
            return (rng.normal(size=(256, 512)).astype(np.float32) for _ in range(40))

        cluster_parts(lambda: [np.eye(5)], 2)  # imports that it causes do not count
        peak = peak_memory(lambda: cluster_parts(parts, 3, passes=1))
        assert peak <= 10 * 256 * 512 * 4

    def test_the_sample_favours_no_row(self):
        rows = np.arange(50.0)[:, None]
        blocks = [(first, rows[first : first + 10]) for first in range(0, 50, 10)]
        times = np.zeros(50)
        for seed in range(2000):
            sample, count = kmeans._sample(blocks, np.random.default_rng(seed))
            assert (len(np.unique(sample)), count) == (10, 50)
            times[sample.astype(int)] += 1
        assert np.abs(times - 400).max() < 90  # 5 standard deviations

    @pytest.mark.parametrize(("change", "message"), [
        ({"k": 1}, "k=1 "),
        ({"k": 61}, "k=61 .* 60"),
        ({"n_init": 0}, "n_init=0"),
        ({"passes": 0}, "passes=0"),
        ({"parts": list}, "k=3 .* 0"),
        ({"parts": iter([])}, "list_iterator"),
        ({"parts": lambda: [np.zeros(60)]}, r"part of shape \(60,\) .*\(images, dim\)"),
        ({"parts": lambda: [np.eye(60), np.zeros((3, 61))]}, r"part of shape \(3, 61\) .*\(images, 60\)"),
    ])
    def test_bad_input(self, change, message):
        with pytest.raises(ItaeError, match=message):
            cluster_parts(**{"parts": cut(blobs()[0], 25), "k": 3, **change})

    @pytest.mark.parametrize("sizes", [(60, 0, 0), (60, 60, 59), (60, 60, 61)])
    def test_parts_that_do_not_start_over(self, sizes):
        features, sizes = blobs(each=21)[0], iter(sizes)
        with pytest.raises(ItaeError, match="60 images"):
            cluster_parts(lambda: [features[: next(sizes)]], 3, passes=1)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_parts_that_are_not_finite(self, value):
        features, _ = blobs(each=200)
        features[[401, 500], 2] = value
        with pytest.raises(ItaeError, match="image 401 "):
            cluster_parts(cut(features, 150), 3)
