import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

from itae_utils.analysis import scoring
from itae_utils.analysis.metrics import evaluate_clustering, paired_bootstrap
from itae_utils.errors import ItaeError
from itae_utils.method.setting import ATTENUATIONS
from itae_utils.store.housekeeping import list_entries
from itae_utils.store.store import open_store


@pytest.fixture
def blobs():
    rng = np.random.default_rng(0)
    targets = np.repeat([0, 1, 2], 20)
    features = rng.normal(size=(60, 8)) + 4 * np.eye(8)[targets]
    return {"baseline": rng.normal(size=(60, 8)), "itae": features}, targets


def test_score_variants_is_evaluate_clustering_by_variant(blobs):
    features, targets = blobs
    scores = scoring.score_variants(features, targets, seeds=[3, 4], n_init=2, normalize=False)
    for name in features:
        expected = evaluate_clustering(features[name], targets, seeds=[3, 4], n_init=2, normalize=False)
        found = scores[scores.variant == name]
        np.testing.assert_allclose(found[["seed", "acc", "nmi", "ari"]], expected[["seed", "acc", "nmi", "ari"]])


def test_score_variants_caches_clusters_in_the_store(blobs, tmp_path):
    features, targets = blobs
    scores = [scoring.score_variants(features, targets, seeds=[3], store=store) for store in (tmp_path, None)]
    pd.testing.assert_frame_equal(*scores)
    assert len(list_entries(open_store(tmp_path))) == 2


def test_without_labels_the_change_of_the_features_is_measured(blobs):
    features, _ = blobs
    scores = scoring.score_variants(features, None, seeds=[0, 1]).set_index("variant")
    slow = np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*features.values(), strict=True)])
    assert scores.change["itae"] == pytest.approx(slow)
    assert scores.change["baseline"] == pytest.approx(0, abs=1e-12)


def test_agreement_by_variant():
    labels = {"baseline": np.array([[0, 0, 1, 1], [1, 1, 0, 0]]), "itae": np.array([[0, 0, 1, 1], [0, 1, 0, 1]])}
    table = scoring.agreement_scores(labels)
    assert table.variant.tolist() == ["baseline", "itae"]
    assert table.agreement.tolist() == [1, adjusted_rand_score(*labels["itae"])]


def test_score_table_keeps_the_order_and_shows_the_spread():
    scores = pd.DataFrame({"variant": ["b", "b", "a", "a"], "seed": [0, 1, 0, 1], "acc": [0.5, 0.7, 0.1, 0.1]})
    table = scoring.score_table(scores)
    assert table.ACC.to_dict() == {"b": "0.600 ± 0.141", "a": "0.100 ± 0.000"}
    assert list(table.index) == ["b", "a"]
    assert scoring.score_table(scores[scores.seed == 0]).ACC["b"] == "0.500"


def test_score_table_marks_the_highest_mean_of_each_column():
    scores = pd.DataFrame({"variant": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1], "acc": [0.1, 0.9, 0.6, 0.6],
                           "nmi": [0.5, 0.5, 0.4, 0.5]})
    table = scoring.score_table(scores, mark=True)
    assert table.map(lambda text: text.endswith(" ★")).to_dict("index") == {
        "a": {"ACC": False, "NMI": True}, "b": {"ACC": True, "NMI": False}}
    assert "★" not in scoring.score_table(scores).to_string()
    alike = scores.assign(acc=0.5)
    assert "★" not in scoring.score_table(alike, mark=True).ACC.to_string()


def test_difference_table_is_paired_bootstrap_against_the_baseline():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 90)
    labels = {"a": rng.integers(0, 3, (2, 90)), "baseline": rng.integers(0, 3, (2, 90)), "b": np.stack([targets] * 2)}
    table = scoring.difference_table(targets, labels, draws=30, seed=1)
    assert list(table.index.unique("variant")) == ["a", "b"]
    expected = paired_bootstrap(targets, labels["baseline"], labels["b"], draws=30, seed=1)
    pd.testing.assert_frame_equal(table.loc["b"][["difference", "low", "high"]], expected)
    assert table.words["b", "acc"].startswith("+0.")


def test_harms_are_paired_bootstraps_of_the_two_sides_of_each_step():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 90)
    labels = {name: np.where(rng.random((2, 90)) < right, targets, rng.integers(0, 3, (2, 90)))
              for name, right in [("baseline", 0.3), *((f"edit {each}", 0.5) for each in ATTENUATIONS)]}
    table = scoring.harm_table(targets, labels, draws=30, seed=1)
    steps = [("baseline", "edit substitute"), ("edit substitute", "edit mask"), ("edit substitute", "edit spread"),
             ("baseline", "edit mask")]
    assert len(table) == 3 * len(steps)
    for step, (one, other) in zip(table.index.unique("step"), steps, strict=True):
        expected = paired_bootstrap(targets, labels[one], labels[other], draws=30, seed=1)
        pd.testing.assert_frame_equal(table.loc[step], expected)
        assert all(name.removeprefix("edit ") in step for name in (one, other)), "the step says what it compares"
    both, parts = table.difference.loc[list(table.index.unique("step"))[3]], table.difference
    np.testing.assert_allclose(both, sum(parts.loc[step] for step in table.index.unique("step")[:2]))


def test_class_accuracy_against_a_slow_count():
    targets = np.array([5, 5, 5, 7, 7, 9])
    labels = np.array([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    table = scoring.class_accuracy(targets, labels)
    assert list(table.columns) == [5, 7, 9]
    np.testing.assert_allclose(table.iloc[0], [2 / 3, 1, 1])
    np.testing.assert_allclose(table.iloc[1], [1, 0, 0])  # one cluster: the classes without a match get nothing
    assert scoring.class_accuracy([0, 0, 1], [1, 1, 0]).to_numpy().tolist() == [[1, 1]]  # lists, and a single run


@pytest.mark.parametrize(("call", "named"), [
    (lambda: scoring.score_variants(np.eye(12), [0, 1] * 6, seeds=[0]), "ndarray"),
    (lambda: scoring.score_variants({"itae": np.eye(12)}, None, seeds=[0]), "'baseline'"),
    (lambda: scoring.score_labels([0, 1], [[0, 1]], [0]), "list"),
    (lambda: scoring.agreement_scores({}), "dict"),
    (lambda: scoring.difference_table([0, 1], {"itae": [[0, 1]]}), "'baseline'"),
    (lambda: scoring.harm_table([0, 1], {"baseline": [[0, 1]], "edit mask": [[0, 1]]}), "'edit substitute'"),
])
def test_wrong_objects_are_named(call, named):
    with pytest.raises(ItaeError, match=named) as raised:
        call()
    assert "\n" not in str(raised.value)
