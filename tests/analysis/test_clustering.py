import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import adjusted_rand_score

from itae_utils.analysis import clustering, words
from itae_utils.analysis.kmeans import cluster
from itae_utils.analysis.metrics import evaluate_clustering, paired_bootstrap
from itae_utils.errors import ItaeError
from itae_utils.report.pages import mean_scores
from itae_utils.store.housekeeping import list_entries
from itae_utils.store.store import open_store

ACC = {"raw pixels": 0.80, "baseline": 0.70, "demo-clean": 0.90, "itae": 0.88, "random control": 0.71}


def images(count=6, side=40, *, grey=False, seed=0):
    rng = np.random.default_rng(seed)
    shape = (count, side, side) if grey else (count, side, side, 3)
    return [(Image.fromarray(array).convert("RGB"), -1) for array in rng.integers(0, 256, shape, dtype=np.uint8)]


def test_pixels_are_resized_flattened_and_between_0_and_1():
    data = images()
    features = clustering.pixel_features(data, 8)
    assert features.shape == (6, 8 * 8 * 3)
    expected = np.asarray(data[2][0].resize((8, 8)), dtype=np.float64).ravel() / 255
    np.testing.assert_allclose(features[2], expected, atol=1e-6)
    assert clustering.pixel_features(data, 224).shape == (6, 32 * 32 * 3), "at most 32 pixels per side"


def test_grey_images_need_one_channel_which_clusters_the_same():
    one = clustering.pixel_features(images(40, 8, grey=True), 8)
    assert one.shape == (40, 64)
    np.testing.assert_array_equal(cluster(one, 3)[0], cluster(np.repeat(one, 3, axis=1), 3)[0])


def test_pixel_size_below_one_is_refused():
    with pytest.raises(ItaeError, match="size=0"):
        clustering.pixel_features(images(), 0)


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


def test_score_variants_caches_clusters_in_the_store(blobs, tmp_path):
    features, targets = blobs
    scores = [clustering.score_variants(features, targets, seeds=[3], store=store) for store in (tmp_path, None)]
    pd.testing.assert_frame_equal(*scores)
    assert len(list_entries(open_store(tmp_path))) == 2


def test_without_labels_the_change_of_the_features_is_measured(blobs):
    features, _ = blobs
    scores = clustering.score_variants(features, None, seeds=[0, 1]).set_index("variant")
    slow = np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*features.values(), strict=True)])
    assert scores.change["itae"] == pytest.approx(slow)
    assert scores.change["baseline"] == pytest.approx(0, abs=1e-12)


def test_agreement_by_variant():
    labels = {"baseline": np.array([[0, 0, 1, 1], [1, 1, 0, 0]]), "itae": np.array([[0, 0, 1, 1], [0, 1, 0, 1]])}
    table = clustering.agreement_scores(labels)
    assert table.variant.tolist() == ["baseline", "itae"]
    assert table.agreement.tolist() == [1, adjusted_rand_score(*labels["itae"])]


def test_score_table_keeps_the_order_and_shows_the_spread():
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
    assert clustering.neighbour_agreement(np.eye(3), np.zeros(3)) == 1, "fewer points than neighbours"


def bench(acc=ACC, *, missed=0, wrong=0, found_any=True):
    truth = np.zeros(1000, dtype=bool)
    truth[:200] = True
    found = truth.copy()
    found[:missed] = False
    found[500:500 + wrong] = True
    found &= found_any
    return clustering.bench_targets(acc, found, truth)


def test_bench_targets_are_numbers():
    table = bench()
    assert table.met.all()
    assert table.measured.tolist() == pytest.approx([0.1, 0.2, 1, 1, 0.9, 0.05])
    texts = clustering.bench_table(table)
    assert list(texts.index) == list(table.index)
    assert texts.measured.tolist() == ["+0.100", "+0.200", "1.0000", "1.0000", "90 %", "5 %"]
    assert set(texts.verdict) == {"met"}


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
    assert np.flatnonzero(~table.met).tolist() == missed
    assert np.flatnonzero(clustering.bench_table(table).verdict == "not met").tolist() == missed


def test_cosine_distance_is_finite_and_never_negative():
    assert clustering.cosine_distance(np.zeros((2, 3)), np.ones((2, 3))) == 1
    rows = np.random.default_rng(0).normal(size=(500, 64)).astype(np.float32)
    assert 0 <= clustering.cosine_distance(rows, rows) < 1e-6


def test_targets_that_cannot_be_measured_are_not_met():
    table = bench(ACC | {"baseline": 0.95}, found_any=False)
    assert np.isnan(table.measured.to_numpy()).tolist() == [False, False, True, False, True, True]
    assert not table.met[1:].any()
    assert clustering.bench_table(table).measured.tolist()[2:] == ["–", "0.0000", "–", "–"]


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
    facts = headline(scores("acc", 0.5, 0.75), gain, True, bench(missed=3))
    assert [fact["value"] for fact in facts] == ["0.500 → 0.750", "5 of 6 met"]
    assert "90 %" in facts[1]["note"]
    nothing_lost = headline(scores("acc", 0.9, 0.9), gain, True, bench(ACC | {"baseline": 0.95}))
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


def test_headline_names_the_runs_and_starts_with_the_notes():
    note = {"label": "Clusters", "value": "4 for 4 images", "note": "as many"}
    facts = headline(scores("acc", 0.5, 0.75), differences("+0.250"), True, None, seeds=3, n_init=7, notes=[note])
    assert facts[0] == note
    assert "3 seeds" in facts[1]["note"]
    assert "7 starts" in facts[1]["note"]


def test_the_agreement_of_a_single_run_is_not_measured():
    table = clustering.agreement_scores({name: np.array([[0, 0, 1]]) for name in ("baseline", "itae")})
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


NOISE = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)


@pytest.mark.parametrize(("rows", "normalize", "equal"), [
    (np.ones((16, 8)), True, True), (np.zeros((16, 8)), True, True), (np.ones((1, 8)), True, True),
    (np.ones((12, 8)) + 1e-7 * NOISE, True, True), (np.arange(1, 5)[:, None] * np.ones(8), True, True),
    (np.arange(1, 5)[:, None] * np.ones(8), False, False), (NOISE, True, False), (NOISE[[0] * 11 + [1]], True, False),
    ([[1, 2], [1, 2]], False, True),
])
def test_equal_features(rows, normalize, equal):
    assert clustering.all_equal(rows, normalize=normalize) == equal


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
    assert {text.partition(" ")[0] for text in clustering.score_table(table).ACC} == {"0.347"}
    rows = words.result_rows(table, ["acc"], backbone="demo", dataset="digits", n=200)
    assert {f"{row[0][0]:.3f}" for row in [entry["cells"] for entry in mean_scores(rows)["rows"]]} == {"0.347"}


@pytest.mark.parametrize(("call", "named"), [
    (lambda: clustering.score_variants(NOISE, [0, 1] * 6, seeds=[0]), "ndarray"),
    (lambda: clustering.score_variants({"itae": NOISE}, None, seeds=[0]), "'baseline'"),
    (lambda: clustering.score_labels([0, 1], [[0, 1]], [0]), "list"),
    (lambda: clustering.agreement_scores({}), "dict"),
    (lambda: clustering.difference_table([0, 1], {"itae": [[0, 1]]}), "'baseline'"),
    (lambda: clustering.cosine_distance({"baseline": NOISE}, NOISE), "baseline"),
    (lambda: clustering.cosine_distance(NOISE, NOISE[:3]), r"\(3, 8\)"),
    (lambda: clustering.all_equal(NOISE[0]), r"\(8,\)"),
    (lambda: clustering.neighbour_agreement([["a", "b"]], [0]), "type"),
])
def test_wrong_objects_are_named(call, named):
    with pytest.raises(ItaeError, match=named) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_lists_are_taken_as_arrays():
    assert clustering.class_accuracy([0, 0, 1], [1, 1, 0]).to_numpy().tolist() == [[1, 1]]
    assert clustering.neighbour_agreement([[0, 0], [0, 1], [9, 9]], [0, 0, 0]) == 1
    assert clustering.cosine_distance([[1, 0]], [[0, 1]]) == 1


@pytest.mark.parametrize("kind", ["rows", "arrays", "tensors", "grey", "alone"])
def test_pixels_of_items_in_any_form(kind):
    pictures = [image for image, _ in images(3, 8)]
    arrays = [np.asarray(picture) for picture in pictures]
    forms = {"rows": [{"image": picture, "label": 1} for picture in pictures],
             "arrays": [(array, 0) for array in arrays],
             "tensors": [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays], "alone": pictures,
             "grey": [picture.convert("L") for picture in pictures]}
    expected = clustering.pixel_features([(picture, 0) for picture in pictures], 8)
    found = clustering.pixel_features(forms[kind], 8)
    assert found.shape == (3, 64 if kind == "grey" else 192)
    if kind != "grey":
        np.testing.assert_array_equal(found, expected)
