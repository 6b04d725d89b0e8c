import os
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import normalize

from itae_utils.analysis import kmeans, lloyd, rows
from itae_utils.analysis.kmeans import cluster, cluster_parts, cluster_seeds
from itae_utils.errors import ItaeError
from tests.analysis.test_metrics import blobs


def cut(features, size):
    """The features as `cluster_parts` takes them, in parts of `size` rows."""
    return lambda: (features[first : first + size] for first in range(0, len(features), size))


def inertia_about_means(features, labels):
    features = features.astype(np.float64)
    return sum(((features[labels == c] - features[labels == c].mean(axis=0)) ** 2).sum() for c in np.unique(labels))


def overlapping(n=500, dim=8):
    return np.random.default_rng(0).normal(size=(n, dim)).astype(np.float32)


class TestCluster:
    def test_rows_of_zeros_are_no_error(self):
        features, _ = blobs()
        features[0] = 0
        assert cluster(features, 3)[0].shape == (60,)

    @pytest.mark.parametrize("unit", [True, False])
    def test_digits_are_clustered_as_well_as_by_scikit_learn(self, unit):
        pixels = load_digits().data.astype(np.float32)
        prepared = normalize(pixels) if unit else pixels
        labels, inertias = cluster_seeds(pixels, 10, seeds=5, n_init=10, normalize=unit)
        for run, inertia in zip(labels, inertias, strict=True):
            assert inertia == pytest.approx(inertia_about_means(prepared, run), rel=1e-6)
        plain = [KMeans(10, n_init=10, random_state=seed).fit(prepared).inertia_ for seed in range(5)]
        assert inertias.mean() == pytest.approx(np.mean(plain), rel=1e-3)

    @pytest.mark.parametrize("name", ["scikit-learn", "mini-batch"])
    def test_references_are_direct_calls(self, name):
        features = overlapping()
        labels, inertias = cluster_seeds(features, 7, seeds=[3, 5], n_init=2, algorithm=name)
        for seed, run, inertia in zip([3, 5], labels, inertias, strict=True):
            direct = (KMeans(7, n_init=2, random_state=seed, tol=0) if name == "scikit-learn"
                      else MiniBatchKMeans(7, n_init=2, random_state=seed, batch_size=500)).fit(normalize(features))
            np.testing.assert_array_equal(run, direct.labels_)
            assert inertia == direct.inertia_

    @pytest.mark.parametrize("change", [{"WORK_BYTES": 2**16}, {"WORK_BYTES": 2**10}, {"BLOCK": 500}, {}], ids=str)
    def test_a_start_depends_on_its_seed_and_number_alone(self, change, monkeypatch):
        """Alone, among a hundred, in small groups, or without scores in memory."""
        features = overlapping()
        labels, inertias = cluster_seeds(features, 12, seeds=[7], n_init=1)
        for name, value in change.items():
            monkeypatch.setattr(kmeans if name == "WORK_BYTES" else lloyd, name, value)
        for seeds in ([7], [*range(92), 7, *range(7)]):
            others, inertias_of_others = cluster_seeds(features, 12, seeds=seeds, n_init=1)
            place = seeds.index(7)
            np.testing.assert_array_equal(others[place], labels[0])
            assert inertias_of_others[place] == pytest.approx(inertias[0], rel=1e-6)
        more = [cluster_seeds(features, 12, seeds=[7], n_init=n_init)[1][0] for n_init in (1, 2, 10)]
        assert more == sorted(more, reverse=True)
        assert more[-1] < more[0]

    def test_threads_change_nothing(self):
        features, before = overlapping(), torch.get_num_threads()
        try:
            labels = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                labels.append(cluster_seeds(features, 6, seeds=3, n_init=2)[0])
        finally:
            torch.set_num_threads(before)
        np.testing.assert_array_equal(*labels)

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    @pytest.mark.parametrize("unit", [True, False])
    def test_features_of_any_float_type_stay_as_they_are(self, dtype, unit, monkeypatch):
        monkeypatch.setattr(rows, "BLOCK", 7)
        features = np.asfortranarray(blobs(spread=1.0)[0].astype(dtype))
        before = features.copy()
        labels, inertia = cluster(features, 3, normalize=unit)
        np.testing.assert_array_equal(features, before)
        same, inertia_of_single = cluster(before.astype(np.float32), 3, normalize=unit)
        np.testing.assert_array_equal(labels, same)
        assert inertia == inertia_of_single

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    @pytest.mark.parametrize("shift", [0, 1e3])
    def test_scale_and_shift_change_no_label(self, scale, shift):
        features = blobs(spread=0.3)[0].astype(np.float64)
        labels, inertia = cluster(features, 3, normalize=False)
        others, inertia_of_others = cluster((features + shift) * scale, 3, normalize=False)
        np.testing.assert_array_equal(others, labels)
        assert inertia_of_others == pytest.approx(inertia * scale**2, rel=1e-3)

    def test_one_float32_copy_is_held(self):
        features = blobs(classes=4, each=10_000, dim=512)[0]
        cluster(features[:100], 4)  # imports that it causes do not count
        tracemalloc.start()
        cluster_seeds(features, 4, seeds=2, n_init=1)
        peak = tracemalloc.get_traced_memory()[1]  # numpy's: torch's work is bounded by WORK_BYTES
        tracemalloc.stop()
        assert peak <= 1.3 * features.size * 4

    def test_a_copy_above_max_memory(self):
        features, _ = blobs()
        cluster(features.astype(np.float64), 3, max_memory=60 * 5 * 4)
        for call in (cluster, cluster_seeds):
            with pytest.raises(ItaeError, match=r"1,200 bytes, more than max_memory, 1,199.*cluster_parts"):
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

    def test_a_device_without_memory(self, monkeypatch):
        def fail(*arguments):
            raise torch.cuda.OutOfMemoryError("out of memory")

        monkeypatch.setattr(kmeans, "lloyd", fail)
        with pytest.raises(ItaeError, match=r"k=3 .*cpu.* GB"):
            cluster(blobs()[0], 3)

    def test_fewer_distinct_rows_than_clusters_are_warned_of(self):
        features = np.repeat(np.eye(4), 5, axis=0)
        with pytest.warns(UserWarning, match="k=6 .* 4 distinct"):
            labels, inertia = cluster(features, 6)
        assert len(np.unique(labels)) == 4
        assert inertia == pytest.approx(0, abs=1e-9)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(np.unique(cluster(features, 4)[0])) == 4

    @pytest.mark.parametrize(("change", "message"), [
        ({"k": 1}, "k=1 "),
        ({"k": 61}, "k=61 .* 60"),
        ({"k": 2.0}, "k=2.0"),
        ({"k": "3"}, "k='3'"),
        ({"k": True}, "k=True"),
        ({"n_init": 0}, "n_init=0"),
        ({"n_init": "auto"}, "n_init='auto'"),
        ({"seed": -1}, r"-1"),
        ({"seed": 0.5}, r"0.5"),
        ({"algorithm": "elkan"}, "'elkan'.*exact"),
        ({"device": "gpu"}, "'gpu'.* cpu"),
        ({"features": np.zeros(60)}, r"shape \(60,\)"),
        ({"features": [["a", "b"]] * 5}, "type <U1"),
        ({"features": np.zeros((60, 2), dtype=complex)}, "complex"),
        ({"features": {"baseline": np.zeros((60, 2))}}, r"features\['baseline'\]"),
    ])
    def test_bad_input(self, change, message):
        with pytest.raises(ItaeError, match=message):
            cluster(**{"features": blobs()[0], "k": 3, **change})

    @pytest.mark.parametrize("seeds", [None, [], 0, [-1], "12", 2.5, [True]])
    def test_bad_seeds(self, seeds):
        with pytest.raises(ItaeError, match="seeds="):
            cluster_seeds(blobs()[0], 3, seeds=seeds)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_features_that_are_not_finite(self, value):
        features, _ = blobs()
        features[[7, 9], 2] = value
        with pytest.raises(ItaeError, match="image 7 "):
            cluster(features, 3)


class TestParts:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    @pytest.mark.parametrize("unit", [True, False])
    def test_parts_that_fit_in_memory_are_clustered_as_a_whole(self, dtype, unit):
        features = overlapping().astype(dtype)
        before = features.copy()
        expected = cluster(features, 8, normalize=unit)
        uneven = np.split(features, [0, 1, 50, 50, 499])
        for parts in (lambda: [features], cut(features, 1), cut(features, 300), lambda: uneven):
            labels, inertia = cluster_parts(parts, 8, normalize=unit)
            np.testing.assert_array_equal(labels, expected[0])
            assert inertia == pytest.approx(expected[1], rel=1e-6)
        np.testing.assert_array_equal(features, before)

    @pytest.mark.parametrize("mixed", [True, False])
    def test_larger_ones_start_from_a_sample(self, mixed):
        features, targets = blobs(classes=6, each=500, dim=16)
        if mixed:
            order = np.random.default_rng(0).permutation(len(targets))
            features, targets = features[order], targets[order]
        labels, inertia = cluster_parts(cut(features, 200), 6, max_memory=600 * 16 * 4)
        expected, expected_inertia = cluster(features, 6)
        assert adjusted_rand_score(labels, expected) == 1
        assert labels.dtype == expected.dtype
        assert inertia == pytest.approx(expected_inertia, rel=1e-6)

    def test_a_sample_ends_in_a_minimum_of_all_rows(self):
        features = normalize(overlapping(n=3000))
        labels, inertia = cluster_parts(cut(features, 500), 5, max_memory=300 * 8 * 4)
        means = np.stack([features[labels == c].mean(axis=0) for c in range(5)])
        nearest = ((features[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
        assert (nearest == labels).mean() > 0.999
        assert inertia == pytest.approx(inertia_about_means(features, labels), rel=1e-6)
        assert inertia <= 1.02 * cluster(features, 5)[1]

    def test_memory_does_not_grow_with_the_images(self, monkeypatch):
        monkeypatch.setattr(lloyd, "MOST_ROUNDS", 3)

        def parts():
            rng = np.random.default_rng(0)
            return (rng.normal(size=(256, 512)).astype(np.float32) for _ in range(40))

        cluster_parts(lambda: [np.eye(5)], 2)  # imports that it causes do not count
        tracemalloc.start()
        cluster_parts(parts, 3, n_init=1, max_memory=256 * 512 * 4)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 10 * 256 * 512 * 4

    @pytest.mark.parametrize("size", [7, 10, 40])
    def test_the_sample_favours_no_row(self, size):
        values = np.arange(50.0, dtype=np.float32)[:, None]
        times = np.zeros(50)
        for seed in range(500):
            order = np.random.default_rng(seed).permutation(50)  # the draws themselves have one seed
            blocks = [values[order[first : first + size]] for first in range(0, 50, size)]
            sample, count, mean = rows.sample_rows(blocks, bound=10 * 4)
            assert (len(np.unique(sample)), count) == (10, 50)
            assert mean == pytest.approx(24.5)
            times[sample[:, 0].astype(int)] += 1
        assert np.abs(times - 100).max() < 45  # 5 standard deviations

    @pytest.mark.parametrize(("change", "message"), [
        ({"k": 1}, "k=1 "),
        ({"k": 61}, "k=61 .* 60"),
        ({"n_init": 0}, "n_init=0"),
        ({"parts": list}, "k=3 .* 0"),
        ({"parts": iter([])}, "list_iterator"),
        ({"parts": lambda: [np.zeros(60)]}, r"part of shape \(60,\) .*\(images, dim\)"),
        ({"parts": lambda: [np.eye(60), np.zeros((3, 61))]}, r"part of shape \(3, 61\) .*\(images, 60\)"),
        ({"max_memory": 29 * 5 * 4}, "max_memory=580 .*600"),
    ])
    def test_bad_input(self, change, message):
        with pytest.raises(ItaeError, match=message):
            cluster_parts(**{"parts": cut(blobs()[0], 25), "k": 3, **change})

    @pytest.mark.parametrize("sizes", [(60, 0), (60, 59), (60, 61)])
    def test_parts_that_do_not_start_over(self, sizes):
        features, sizes = blobs(each=21)[0], iter(sizes)
        with pytest.raises(ItaeError, match="60 images"):
            cluster_parts(lambda: [features[: next(sizes)]], 3, max_memory=40 * 5 * 4)

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
    def test_parts_that_are_not_finite(self, value):
        features = blobs(each=200)[0].astype(np.float64)
        features[[401, 500], 2] = value
        with pytest.raises(ItaeError, match="image 401 "):
            cluster_parts(cut(features, 150), 3)


class TestPredict:
    @pytest.mark.parametrize("unit", [True, False])
    def test_rows_go_to_the_nearest_mean(self, unit):
        fitted, features = overlapping(90), 3 * overlapping(200)[90:150]
        labels = np.random.default_rng(1).integers(6, size=(2, 90))
        labels[labels == 2] = 5  # an empty cluster
        labels[0, labels[0] == 4] = 0
        found = kmeans.predict(fitted, labels, features, normalize=unit)
        assert found.shape == (2, 60)
        scale = normalize if unit else np.asarray
        rows = scale(features).astype(float)
        for run, given in zip(labels, found, strict=True):
            means = {c: scale(fitted)[run == c].mean(axis=0, dtype=float) for c in np.unique(run)}
            expected = [min(means, key=lambda c: ((row - means[c]) ** 2).sum()) for row in rows]
            assert given.tolist() == expected

    def test_the_clustered_rows_keep_their_labels(self):
        features = overlapping()
        labels, _ = cluster_seeds(features, 7, seeds=3)
        np.testing.assert_array_equal(kmeans.predict(features, labels, features), labels)

    @pytest.mark.parametrize(("n", "shape"), [(9, (4, 8)), (10, (4, 5))])
    def test_labels_and_features_must_fit(self, n, shape):
        with pytest.raises(ItaeError, match=r"\(10, 8\)"):
            kmeans.predict(np.ones((10, 8)), np.zeros((2, n), dtype=int), np.ones(shape))


def test_memory_decides_what_is_held():
    assert kmeans.are_worth_it(10_000, 10, 200, 7)
    assert not kmeans.are_worth_it(10_000, 10, 10, 4)     # cost more than they save
    assert not kmeans.are_worth_it(20_000, 100, 1000, 8)  # 1.6 GB
    assert kmeans.starts_at_once(10_000, 768, 200, 7) > 10
    assert kmeans.starts_at_once(1_000_000, 768, 1000, 8) == 0
