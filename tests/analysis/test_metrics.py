import time
from itertools import combinations, permutations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from itae_utils.analysis import metrics
from itae_utils.analysis.kmeans import cluster, cluster_seeds
from itae_utils.analysis.metrics import (
    accuracy,
    agreement,
    confusion,
    describe_difference,
    evaluate_clustering,
    match_clusters,
    paired_bootstrap,
    summarize,
    unpaired_bootstrap,
)
from itae_utils.errors import ItaeError


def blobs(classes=3, each=20, dim=5, spread=0.1, seed=0):
    rng = np.random.default_rng(seed)
    targets = np.repeat(np.arange(classes), each)
    centres = rng.normal(size=(classes, dim))
    return (centres[targets] + spread * rng.normal(size=(len(targets), dim))).astype(np.float32), targets


def accuracy_by_trying_all(targets, labels):
    """Every one-to-one map of clusters to classes, the shorter side padded with partners that nothing belongs to."""
    classes, clusters = list(np.unique(targets)), list(np.unique(labels))
    size = max(len(classes), len(clusters))
    padded = classes + [None] * (size - len(classes))
    best = 0
    for order in permutations(padded):
        mapping = dict(zip(clusters, order, strict=False))
        best = max(best, sum(mapping[label] == target for target, label in zip(targets, labels, strict=True)))
    return best / len(targets)


def bootstrap_by_sklearn(targets, labels_a, labels_b, draws, seed):
    rng = np.random.default_rng(seed)
    n = len(targets)

    def scores(labels, images):
        each = [(accuracy(targets[images], run[images]),
                 normalized_mutual_info_score(targets[images], run[images]),
                 adjusted_rand_score(targets[images], run[images])) for run in np.atleast_2d(labels)]
        return np.mean(each, axis=0)

    found = []
    for _ in range(draws):
        images = rng.integers(n, size=n)
        found.append(scores(labels_b, images) - scores(labels_a, images))
    every = np.arange(n)
    difference = scores(labels_b, every) - scores(labels_a, every)
    return np.column_stack([difference, *np.percentile(found, (2.5, 97.5), axis=0)])


class TestEvaluate:
    @pytest.mark.parametrize(("seeds", "expected"), [(3, [0, 1, 2]), ((7, 2), [7, 2])])
    def test_one_row_per_seed(self, seeds, expected):
        features, targets = blobs(spread=1.0)
        scores = evaluate_clustering(features, targets, seeds=seeds)
        assert list(scores.columns) == ["seed", "acc", "nmi", "ari", "inertia"]
        assert scores.seed.tolist() == expected
        for row in scores.itertuples():
            labels, inertia = cluster(features, 3, seed=row.seed)
            assert row.acc == accuracy_by_trying_all(targets, labels)
            assert row.nmi == pytest.approx(normalized_mutual_info_score(targets, labels))
            assert row.ari == pytest.approx(adjusted_rand_score(targets, labels))
            assert row.inertia == pytest.approx(inertia)

    def test_k_is_the_number_of_classes_unless_given(self):
        features, targets = blobs(spread=1.0)
        for k, given in ((3, {}), (5, {"k": 5})):
            inertia = evaluate_clustering(features, targets * 100 - 5, seeds=1, **given).inertia[0]
            assert inertia == cluster(features, k)[1]

    @pytest.mark.parametrize("targets", [np.repeat([5, -2, 900], 20), np.repeat(["cat", "dog", "ant"], 20),
                                         np.repeat([True, False], 30)])
    def test_targets_need_not_count_from_zero(self, targets):
        codes = np.unique(targets, return_inverse=True)[1]
        features = np.eye(3)[codes] + 0.01
        assert evaluate_clustering(features, targets, seeds=1).acc.tolist() == [1]

    @pytest.mark.parametrize(("change", "named"), [
        ({"targets": None}, "targets=None"), ({"targets": np.zeros(59)}, "59 targets .* 60 rows"),
        ({"seeds": 0}, "seeds=0"), ({"seeds": -1}, "seeds=-1"), ({"seeds": []}, r"seeds=\[\]"),
        ({"max_memory": 60 * 5 * 4 - 1}, "max_memory"), ({"algorithm": "fast"}, "'fast'"),
        ({"features": {"baseline": 1, "itae": 2}}, r"2 variants .*features\['baseline'\]"),
    ])
    def test_bad_input(self, change, named):
        features, targets = blobs()
        with pytest.raises(ItaeError, match=named):
            evaluate_clustering(**{"features": features, "targets": targets} | change)

    def test_summary(self):
        scores = pd.DataFrame({"seed": [0, 1], "acc": [0.5, 0.7], "nmi": [1.0, 1.0]})
        summary = summarize(scores)
        assert list(summary.columns) == ["mean", "sd", "min", "max"]
        assert list(summary.index) == ["acc", "nmi"]
        assert summary.loc["acc"].tolist() == pytest.approx([0.6, 0.02**0.5, 0.5, 0.7])
        assert np.isnan(summarize(scores[:1]).loc["acc", "sd"])


class TestAgreement:
    def test_mean_over_all_pairs(self):
        labels, _ = cluster_seeds(np.random.default_rng(0).normal(size=(100, 8)), 6, seeds=4, n_init=1)
        pairs = [adjusted_rand_score(labels[a], labels[b]) for a, b in combinations(range(4), 2)]
        assert agreement(labels) == pytest.approx(sum(pairs) / 6)
        assert len(set(pairs)) > 1

    def test_needs_two_runs(self):
        with pytest.raises(ItaeError, match="2 runs of k-means, not 1"):
            agreement(np.zeros((1, 4), dtype=int))


class TestMatching:
    @pytest.mark.parametrize("classes", [2, 3, 4])
    @pytest.mark.parametrize("clusters", [2, 3, 4, 6])
    def test_accuracy_is_the_best_of_all_matches(self, classes, clusters):
        rng = np.random.default_rng(classes * 10 + clusters)
        targets = rng.integers(classes, size=30)
        labels = np.where(rng.random(30) < 0.5, targets, rng.integers(clusters, size=30)) % clusters
        assert accuracy(targets, labels) == pytest.approx(accuracy_by_trying_all(targets, labels))

    def test_match_names_clusters_and_classes_as_they_came(self):
        targets = np.array(["cat", "cat", "dog", "dog", "dog"])
        assert match_clusters(targets, np.array([7, 7, 3, 3, 7])) == {7: "cat", 3: "dog"}
        assert match_clusters(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 2])) == {0: 0, 2: 1}
        assert match_clusters(np.array([0, 0, 1]), np.array([4, 4, 4])) == {4: 0}

    def test_targets_and_labels_of_different_length(self):
        with pytest.raises(ItaeError, match=r"targets \(3,\) and labels \(2,\)"):
            accuracy(np.zeros(3), np.zeros(2))

    @pytest.mark.parametrize("clusters", [2, 4, 6])
    def test_confusion_counts_with_the_match_on_the_diagonal(self, clusters):
        rng = np.random.default_rng(clusters)
        targets = rng.permutation(np.repeat([10, 20, 30, 40], 25))
        labels = (targets // 10 + (rng.random(100) < 0.3)) % clusters
        table = confusion(targets, labels)
        for target in table.index:
            for label in table.columns:
                assert table.loc[target, label] == np.count_nonzero((targets == target) & (labels == label))
        assert table.to_numpy().sum() == 100
        matched = list(match_clusters(targets, labels).items())
        diagonal = list(zip(table.columns, table.index, strict=False))
        assert sorted(diagonal) == sorted(matched)
        assert list(table.index[: len(matched)]) == sorted(table.index[: len(matched)])

    def test_confusion_of_two_truth_values(self):
        table = confusion(np.array([True, True, False]), np.array([0, 0, 1]))
        assert table.to_numpy().tolist() == [[1, 0], [0, 2]]
        assert table.index.tolist() == [False, True]


class TestBootstrap:
    def labels(self, n=120, seeds=3, classes=4, right=0.6, clusters=4, seed=0):
        rng = np.random.default_rng(seed)
        targets = rng.integers(classes, size=n)
        noise = rng.integers(clusters, size=(seeds, n))
        return targets, np.where(rng.random((seeds, n)) < right, targets % clusters, noise)

    @pytest.mark.parametrize("clusters", [3, 4, 7])
    def test_draws_are_those_of_sklearn_and_names_of_clusters_are_irrelevant(self, clusters):
        targets, a = self.labels(right=0.4)
        _, b = self.labels(right=0.8, clusters=clusters)
        found = paired_bootstrap(targets * 10 + 3, a, np.array([40, -1, 7, 3, 8, 5, 6])[b], draws=40, seed=5)
        assert list(found.index) == ["acc", "nmi", "ari"]
        assert list(found.columns) == ["difference", "low", "high"]
        np.testing.assert_allclose(found, bootstrap_by_sklearn(targets, a, b, 40, 5), atol=1e-12)

    def test_one_seed_may_come_flat_and_numbers_of_seeds_may_differ(self):
        targets, a = self.labels()
        flat, stacked = (paired_bootstrap(targets, one, a, draws=20) for one in (a[0], a[:1]))
        pd.testing.assert_frame_equal(flat, stacked)

    def test_the_interval_covers_the_truth_about_as_often_as_it_says(self):
        """Both sides are equally right, so 0 is the true difference; 95 % of the intervals should hold it."""
        holds = 0
        for trial in range(60):
            targets, runs = self.labels(n=150, seeds=2, right=0.7, seed=trial)
            row = paired_bootstrap(targets, runs[0], runs[1], draws=100).loc["acc"]
            holds += row.low <= 0 <= row.high
        assert holds >= 51  # P(fewer | 95 %) < 0.2 %

    @pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 3), (3, 1), (60, 60), (60, 1)])
    def test_trivial_partitions_score_as_sklearn_has_them(self, rows, columns):
        targets, labels = np.arange(60) % rows, np.arange(60) % columns
        expected = [accuracy_by_trying_all(targets, labels) if max(rows, columns) < 5 else accuracy(targets, labels),
                    normalized_mutual_info_score(targets, labels), adjusted_rand_score(targets, labels)]
        found = metrics._Tables(targets, [labels]).scores(np.ones(60, dtype=int))[0]
        np.testing.assert_allclose(found, expected, atol=1e-12)

    @pytest.mark.parametrize(("dropped", "draws", "named"), [(1, 20, r"\(3, 119\) .* 120 targets"), (0, 0, "draws=0")])
    def test_bad_input(self, dropped, draws, named):
        targets, a = self.labels()
        with pytest.raises(ItaeError, match=named):
            paired_bootstrap(targets, a, a[:, dropped:], draws=draws)

    def test_a_thousand_draws_of_ten_seeds_take_seconds(self):
        targets, a = self.labels(n=1797, seeds=10, classes=10, clusters=10)
        _, b = self.labels(n=1797, seeds=10, classes=10, clusters=10, right=0.7)
        start = time.process_time()
        paired_bootstrap(targets, a, b)
        assert time.process_time() - start < 5


def test_a_difference_in_words():
    row = pd.Series({"difference": 0.0541, "low": 0.0308, "high": 0.0779})
    assert describe_difference(row) == "+0.054 [+0.031, +0.078]"
    assert describe_difference(-row[["difference", "high", "low"]].set_axis(row.index)) == "-0.054 [-0.078, -0.031]"


@pytest.mark.parametrize("low", [-0.01, 0.0])
def test_an_interval_with_0_is_pointed_out(low):
    words = describe_difference({"difference": 0.01, "low": low, "high": 0.02})
    assert words.startswith("+0.010 [")
    assert "contains 0" in words
    assert "-0.000" not in describe_difference({"difference": -0.0001, "low": low, "high": 0.02})


def test_an_unpaired_bootstrap_resamples_each_side_by_itself():
    rng = np.random.default_rng(3)
    sides = [(rng.integers(0, 3, n), rng.integers(0, 3, (2, n))) for n in (40, 60)]

    def scores(targets, labels, images):
        rows = [(accuracy(targets[images], run[images]), normalized_mutual_info_score(targets[images], run[images]),
                 adjusted_rand_score(targets[images], run[images])) for run in labels]
        return np.mean(rows, axis=0)

    draws = np.random.default_rng(5)
    leads = []
    for _ in range(20):
        old, new = (scores(*side, draws.integers(len(side[0]), size=len(side[0]))) for side in sides)
        leads.append(new - old)
    found = unpaired_bootstrap(*sides, draws=20, seed=5)
    assert np.allclose(found[["low", "high"]].T, np.quantile(leads, (0.025, 0.975), axis=0))
    old, new = (scores(*side, np.arange(len(side[0]))) for side in sides)
    assert np.allclose(found.difference, new - old)
