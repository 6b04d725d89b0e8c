import re

import numpy as np
import pandas as pd
import pytest

from itae_utils.analysis import clustering, scoring, words
from itae_utils.analysis.bench import BENCH_TARGETS, RECOVERED
from itae_utils.errors import ItaeError
from itae_utils.report.pages import mean_scores

NOISE = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)


@pytest.mark.parametrize(("clusters", "targets", "n", "k"), [
    (7, None, 5, 7), (3, [0, 1, 1, 1], 4, 3), (None, [5, 7, 7, 9], 4, 3),
    (None, None, 4, 2), (None, None, 6, 3), (None, None, 7, 3), (None, None, 19, 9), (None, None, 20, 10),
    (None, None, 5000, 10),
])
def test_number_of_clusters(clusters, targets, n, k):
    assert clustering.number_of_clusters(clusters, None if targets is None else np.array(targets), n) == k


@pytest.mark.parametrize(("targets", "n", "named"), [
    (None, 3, "3 images"), ([0, 1, 2], 3, "3 images"), ([4], 1, "1 image"),
])
def test_images_that_give_no_number_of_clusters_are_refused(targets, n, named):
    with pytest.raises(ItaeError, match=named):
        clustering.number_of_clusters(None, None if targets is None else np.array(targets), n)


def test_describe_counts():
    assert clustering.describe_counts(np.array([4, 5, 4, 4]), 50) == "4.2 of 50 patches per image (8.5 %)"
    assert clustering.describe_counts(np.arange(50) == 0, 50) == "0.02 of 50 patches per image (< 0.1 %)"
    assert clustering.describe_counts(np.zeros(4), 50) == "0.0 of 50 patches per image (0 %)"


def scores(metric, before, after):
    return pd.DataFrame({"variant": ["baseline", "itae"], metric: [before, after]})


def differences(words):
    index = pd.MultiIndex.from_tuples([("itae", "acc")])
    return pd.DataFrame({"words": [words]}, index=index)


def test_gain_is_described_with_its_interval():
    table = scores("acc", 0.5, 0.75)
    gain = clustering.describe_gain(table, differences("+0.250 [+0.2, +0.3]"), True)
    assert all(number in gain for number in ("0.500", "0.750", "+0.250 [+0.2, +0.3]"))
    assert not any(char.isdigit() for char in clustering.describe_gain(table, differences("+0.000"), False))
    stability = clustering.describe_gain(scores("agreement", 0.5, 0.75), None, True)
    assert all(word in stability for word in ("ARI", "0.500", "0.750"))


def headline(*arguments, **options):
    return clustering.clustering_headline(*arguments, **{"seeds": 10, "n_init": 1} | options)


def test_clustering_headline_counts_the_expected_results():
    gain = differences("+0.250 [+0.2, +0.3]")
    bench = pd.DataFrame({"measured": 0.9, "met": [target != RECOVERED for target in BENCH_TARGETS]}, [*BENCH_TARGETS])
    facts = headline(scores("acc", 0.5, 0.75), gain, True, bench)
    assert [fact["value"] for fact in facts] == ["0.500 → 0.750", "5 of 6 met"]
    assert "90 %" in facts[1]["note"]
    nothing_lost = headline(scores("acc", 0.9, 0.9), gain, True, bench.assign(measured=np.nan))
    assert "%" not in nothing_lost[1]["note"]


@pytest.mark.parametrize(("metric", "words", "changed", "numbers"), [
    ("acc", "+0.250 [+0.2, +0.3]", True, ["+0.250", "+0.2", "+0.3"]), ("acc", "+0.0 [+0.0, +0.0]", False, []),
    ("agreement", None, True, []), ("agreement", None, False, []),
])
def test_note_of_the_clustering_headline_does_not_repeat_its_value(metric, words, changed, numbers):
    (fact,) = headline(scores(metric, 0.5, 0.75), words and differences(words), changed, None)
    assert fact["value"] == "0.500 → 0.750"
    assert re.findall(r"[+-]?\d\.\d+", fact["note"]) == numbers
    assert ("attenuated" in fact["note"]) == (not changed)


def test_headline_names_the_runs():
    (fact,) = headline(scores("acc", 0.5, 0.75), differences("+0.250"), True, None, seeds=3, n_init=7)
    assert "3 seeds" in fact["note"]
    assert "7 starts" in fact["note"]


def test_the_agreement_of_a_single_run_is_not_measured():
    table = scoring.agreement_scores({name: np.array([[0, 0, 1]]) for name in ("baseline", "itae")})
    assert table.agreement.isna().all()
    (fact,) = headline(table, None, True, None)
    assert fact["value"] == "not measured"


@pytest.mark.parametrize("targets", [None, np.zeros(9), [3, 3]])
def test_classes_that_cannot_be_scored(targets):
    assert clustering.scorable(targets) is None
    text = clustering.describe_unscorable(targets, None, 3)
    assert "k = 3" in text
    assert "`clusters`" in text
    assert ("no labels" in text) == (targets is None)
    assert "`clusters`" not in clustering.describe_unscorable(targets, 3, 3)


def test_classes_that_can_be_scored():
    np.testing.assert_array_equal(clustering.scorable([1, 1, 4]), [1, 1, 4])


def test_notes_of_ordinary_features_are_empty():
    labels = {"baseline": np.array([[0, 1, 2] * 4])}
    assert clustering.cluster_notes({"baseline": NOISE}, 3, labels) == []
    assert clustering.describe_notes([]) == ""


def test_notes_on_clusters_that_mean_nothing():
    def values(features, k, labels=None):
        notes = clustering.cluster_notes(features, k, labels)
        assert all(note["note"] in clustering.describe_notes(notes) for note in notes)
        return [note["value"] for note in notes]

    assert values({"baseline": NOISE}, 12) == ["12 for 12 images"]
    equal = np.ones((12, 8))
    assert values({"raw pixels": equal, "itae": NOISE}, 2, {"raw pixels": [[0] * 12], "itae": [[0, 1] * 6]}) == [
        "all equal"]
    (note,) = clustering.cluster_notes({"itae": NOISE, "baseline": NOISE}, 4, {
        "itae": [[0, 1] * 6, [0, 1, 2] * 4], "baseline": [[0, 1, 2, 3] * 3]})
    assert "3 for itae" in note["note"]
    assert "baseline" not in note["note"]


@pytest.mark.parametrize("right", [
    [31, 78, 70, 72, 79, 74, 72, 70, 71, 78], [62, 76, 73, 60, 67, 77, 71, 60, 75, 74],
    [101, 60, 60, 62, 60, 73, 70, 72, 65, 72],
])
def test_a_mean_is_the_same_number_everywhere(right):
    """The mean is 0.3475. A sum in another order gives a number just above or below it, which rounds to another."""
    acc = np.array(right) / 200
    table = pd.DataFrame({"variant": ["itae"] * 10 + ["baseline"] * 10, "seed": [*range(10)] * 2,
                          "acc": [*acc, *acc[::-1]]})
    assert headline(table, differences("+0.000"), True, None)[0]["value"] == "0.347 → 0.347"
    assert {text.partition(" ")[0] for text in scoring.score_table(table).ACC} == {"0.347"}
    rows = words.result_rows(table, ["acc"], backbone="demo", dataset="digits", n=200)
    assert {f"{row[0][0]:.3f}" for row in [entry["cells"] for entry in mean_scores(rows)["rows"]]} == {"0.347"}
