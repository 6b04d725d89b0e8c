import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

from itae_utils.analysis import clustering
from itae_utils.analysis.metrics import evaluate_clustering, paired_bootstrap

ACC = {"raw pixels": 0.80, "baseline": 0.70, "demo-clean": 0.90, "itae": 0.88, "random control": 0.71}


@pytest.fixture
def blobs():
    rng = np.random.default_rng(0)
    targets = np.repeat([0, 1, 2], 20)
    features = rng.normal(size=(60, 8)) + 4 * np.eye(8)[targets]
    return {"baseline": rng.normal(size=(60, 8)), "itae": features}, targets


def test_score_variants_is_evaluate_clustering_by_variant(blobs):
    features, targets = blobs
    scores = clustering.score_variants(features, targets, seeds=[3, 4], n_init=2, normalize=False)
    for name in features:
        expected = evaluate_clustering(features[name], targets, seeds=[3, 4], n_init=2, normalize=False)
        found = scores[scores.variant == name]
        np.testing.assert_allclose(found[["seed", "acc", "nmi", "ari"]], expected[["seed", "acc", "nmi", "ari"]])


def test_without_labels_the_change_of_the_features_is_measured(blobs):
    features, _ = blobs
    scores = clustering.score_variants(features, None, seeds=[0, 1]).set_index("variant")
    slow = np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*features.values(), strict=True)])
    assert scores.change["itae"] == pytest.approx(slow)
    assert scores.change["baseline"] == pytest.approx(0, abs=1e-12)


def test_cosine_distance_of_zeros_is_finite():
    assert clustering.cosine_distance(np.zeros((2, 3)), np.ones((2, 3))) == 1


def test_agreement_by_variant():
    labels = {"baseline": np.array([[0, 0, 1, 1], [1, 1, 0, 0]]), "itae": np.array([[0, 0, 1, 1], [0, 1, 0, 1]])}
    table = clustering.agreement_scores(labels)
    assert table.variant.tolist() == ["baseline", "itae"]
    assert table.agreement.tolist() == [1, adjusted_rand_score(*labels["itae"])]


def test_score_table_keeps_the_order_and_tells_the_spread():
    scores = pd.DataFrame({"variant": ["b", "b", "a", "a"], "seed": [0, 1, 0, 1], "acc": [0.5, 0.7, 0.1, 0.1]})
    table = clustering.score_table(scores)
    assert table.ACC.to_dict() == {"b": "0.600 ± 0.141", "a": "0.100 ± 0.000"}
    assert list(table.index) == ["b", "a"]
    assert clustering.score_table(scores[scores.seed == 0]).ACC["b"] == "0.500"


def test_difference_table_is_paired_bootstrap_against_the_baseline():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 90)
    labels = {"a": rng.integers(0, 3, (2, 90)), "baseline": rng.integers(0, 3, (2, 90)), "b": np.stack([targets] * 2)}
    table = clustering.difference_table(targets, labels, draws=30, seed=1)
    assert list(table.index.unique("variant")) == ["a", "b"]
    expected = paired_bootstrap(targets, labels["baseline"], labels["b"], draws=30, seed=1)
    pd.testing.assert_frame_equal(table.loc["b"][["difference", "low", "high"]], expected)
    assert table.words["b", "acc"].startswith("+0.")


def test_class_accuracy_against_a_slow_count():
    targets = np.array([5, 5, 5, 7, 7, 9])
    labels = np.array([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    table = clustering.class_accuracy(targets, labels)
    assert list(table.columns) == [5, 7, 9]
    np.testing.assert_allclose(table.iloc[0], [2 / 3, 1, 1])
    np.testing.assert_allclose(table.iloc[1], [1, 0, 0])  # one cluster: the classes without a match get nothing


def test_neighbour_agreement_against_a_slow_count():
    rng = np.random.default_rng(0)
    points, targets = rng.normal(size=(30, 2)), rng.integers(0, 3, 30)
    shares = []
    for place, point in enumerate(points):
        order = np.argsort(np.linalg.norm(points - point, axis=1))
        nearest = [other for other in order if other != place][:5]
        shares.append(np.mean(targets[nearest] == targets[place]))
    assert clustering.neighbour_agreement(points, targets, 5) == pytest.approx(np.mean(shares))


def test_neighbour_agreement_of_fewer_points_than_neighbours():
    assert clustering.neighbour_agreement(np.eye(3), np.zeros(3)) == 1


def bench(acc=ACC, *, missed=0, wrong=0, found_any=True):
    truth = np.zeros(1000, dtype=bool)
    truth[:200] = True
    found = truth.copy()
    found[:missed] = False
    found[500:500 + wrong] = True
    found &= found_any
    return clustering.bench_targets(acc, found, truth)


def test_bench_targets_met():
    table = bench()
    assert list(table.verdict) == ["met"] * 6
    assert list(table.measured) == ["+0.100", "+0.200", "1.0000", "1.0000", "90 %", "5 %"]


@pytest.mark.parametrize(("changes", "options", "missed"), [
    ({"raw pixels": 0.83}, {}, [0]),
    ({"baseline": 0.83, "random control": 0.83}, {}, [1, 4]),
    ({}, {"wrong": 3}, [2]),
    ({}, {"missed": 3}, [3]),
    ({"itae": 0.85}, {}, [4]),
    ({"random control": 0.75}, {}, [5]),
    ({"baseline": 0.95}, {}, [1, 4, 5]),
])
def test_bench_targets_not_met(changes, options, missed):
    table = bench(ACC | changes, **options)
    assert np.flatnonzero(table.verdict == "not met").tolist() == missed


def test_cosine_distance_is_never_negative():
    rows = np.random.default_rng(0).normal(size=(500, 64)).astype(np.float32)
    assert 0 <= clustering.cosine_distance(rows, rows) < 1e-6


def test_what_cannot_be_measured_is_no_number():
    table = bench(ACC | {"baseline": 0.95}, found_any=False)
    assert table.measured.tolist()[2:] == ["–", "0.0000", "–", "–"]


def test_describe_counts():
    assert clustering.describe_counts(np.array([4, 5, 4, 4]), 50) == "4.2 of 50 patches an image (8.5 %)"
    assert clustering.describe_counts(np.arange(50) == 0, 50) == "0.02 of 50 patches an image (< 0.1 %)"
    assert clustering.describe_counts(np.zeros(4), 50) == "0.0 of 50 patches an image (0 %)"


def scores(metric, before, after):
    return pd.DataFrame({"variant": ["baseline", "itae"], metric: [before, after]})


def differences(words):
    index = pd.MultiIndex.from_tuples([("itae", "acc")])
    return pd.DataFrame({"words": [words]}, index=index)


def test_gain_is_told_with_its_interval_or_not_at_all():
    table = scores("acc", 0.5, 0.75)
    assert clustering.describe_gain(table, differences("+0.250 [+0.2, +0.3]"), True) == (
        "ACC 0.500 before, 0.750 with ITAE: +0.250 [+0.2, +0.3]")
    assert "is the baseline itself" in clustering.describe_gain(table, differences("+0.000"), False)
    assert "agree by ARI 0.500 on the baseline's features and by 0.750" in clustering.describe_gain(
        scores("agreement", 0.5, 0.75), None, True)


def test_clustering_headline_counts_the_targets_met():
    facts = clustering.clustering_headline(scores("acc", 0.5, 0.75), "finding", bench(missed=3))
    assert [fact["value"] for fact in facts] == ["0.500 → 0.750", "5 of 6 targets met"]
    assert "90 %" in facts[1]["note"]
    nothing_lost = clustering.clustering_headline(scores("acc", 0.9, 0.9), "x", bench(ACC | {"baseline": 0.95}))
    assert nothing_lost[1]["note"] == "the planted artifacts cost no ACC on these images"
    unlabelled = clustering.clustering_headline(scores("agreement", 0.5, 0.75), "finding", None)
    assert [fact["label"] for fact in unlabelled] == ["Agreement of clusterings"]
