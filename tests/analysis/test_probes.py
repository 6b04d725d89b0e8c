import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import StratifiedKFold

from itae_utils.analysis import probes, remembered
from itae_utils.analysis.probes import paired_gain, probe_hits
from itae_utils.errors import ItaeError


def made(sizes, dim=6, right=1.0, seed=0):
    """Features that tell classes of some sizes apart a little, in mixed order; the classes are numbers with gaps."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    features = rng.normal(size=(len(classes), dim)) + right * np.eye(dim)[classes]
    return features.astype(np.float32), 7 * classes + 3


def vote(features, targets, image):
    """Return the class of most of the 20 nearest other images, the smallest of equals."""
    unit = [row / np.linalg.norm(row) for row in features.astype(float)]
    others = sorted((1 - unit[image] @ unit[other], other) for other in range(len(unit)) if other != image)
    votes = [targets[other] for _, other in others[:20]]
    return max(sorted(set(votes)), key=votes.count)


@pytest.mark.parametrize("sizes", [(30, 40, 25), (40, 40), (3, 4, 2), (1, 1, 2), (25,) * 6])
def test_neighbours_vote_as_in_a_slow_loop(sizes):
    features, targets = made(sizes)
    slow = [vote(features, targets, image) == targets[image] for image in range(len(targets))]
    assert probe_hits(features, targets)["knn"].tolist() == slow
    assert probe_hits(9 * features, targets.astype(str))["knn"].shape == (len(targets),)


@pytest.mark.parametrize("equal", [False, True])
def test_the_first_of_equal_classes_wins_and_the_image_itself_has_no_vote(equal):
    """One class has 11 images, of whose 20 others 10 are of each class; the images of the other see 11 against 9."""
    features, targets = made((11, 10))
    hits = probe_hits(np.ones_like(features) if equal else features, targets)["knn"]
    assert np.array_equal(hits, targets == 3)


def test_an_image_with_more_duplicates_than_neighbours_has_no_vote(monkeypatch):
    monkeypatch.setattr(probes, "NEIGHBOURS", 1)
    targets = np.array([0, 1, 2, 3, 4, 5, 5])
    assert not probe_hits(np.ones((7, 3)), targets)["knn"][:5].any()


@pytest.mark.parametrize(("sizes", "folds"), [((30, 40, 25), 5), ((3, 60, 1), 5), ((3, 3, 2), 3), ((2, 1, 1), 2)])
def test_the_linear_probe_is_a_loop_over_folds(sizes, folds):
    features, targets = made(sizes)
    expected, times = np.zeros(len(targets), dtype=bool), np.zeros(len(targets))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = list(StratifiedKFold(folds, shuffle=True, random_state=3).split(features, targets))
    for train, test in parts:
        mean, sd = features[train].astype(float).mean(axis=0), features[train].astype(float).std(axis=0)
        model = RidgeClassifier().fit((features[train] - mean) / sd, targets[train])
        expected[test] = model.predict((features[test] - mean) / sd) == targets[test]
        times[test] += 1
    assert (times == 1).all()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert probe_hits(features, targets, seed=3)["probe"].tolist() == expected.tolist()
    assert not shown


def test_folds_depend_on_the_seed_and_features_are_not_changed():
    features, targets = made((40, 40), right=0.4)
    before = features.copy()
    runs = [probe_hits(features, targets, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert np.array_equal(runs[0]["probe"], runs[1]["probe"])
    assert len({run["probe"].tobytes() for run in runs}) > 1
    assert len({run["knn"].tobytes() for run in runs}) == 1
    assert np.array_equal(features, before)


def test_standardising_is_done_inside_the_folds_and_in_double_precision():
    features, targets = made((40, 40))
    shifted = features * np.float32(1e-3) + np.arange(6, dtype=np.float32)
    assert (probe_hits(shifted, targets)["probe"] == probe_hits(features, targets)["probe"]).mean() > 0.97


def test_an_image_alone_in_its_class_is_never_right():
    features, targets = made((30, 30, 1), right=5)
    hits = probe_hits(features, targets)
    assert not any(each[targets == 17].any() for each in hits.values())
    assert all(each.mean() > 0.9 for each in hits.values())


def test_the_interval_is_a_bootstrap_of_paired_hits():
    rng = np.random.default_rng(0)
    baseline, better = ({name: rng.random(150) < share for name in ("knn", "probe")} for share in (0.5, 0.7))
    found = paired_gain(baseline, better, seed=4)
    assert list(found.index) == ["knn", "probe"]
    for name in found.index:
        draws, again = [], np.random.default_rng(4)
        for _ in range(1000):
            images = again.integers(150, size=150)
            draws.append(better[name][images].mean() - baseline[name][images].mean())
        expected = [better[name].mean() - baseline[name].mean(), *np.quantile(draws, [0.025, 0.975])]
        np.testing.assert_allclose(found.loc[name, ["difference", "low", "high"]].astype(float), expected, atol=1e-12)
    same = paired_gain(better, better)
    assert not same.to_numpy().any(), "the same images are drawn for both"


def test_hits_are_remembered_by_features_classes_and_seed(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(remembered, "probe_hits", lambda *args, **named: calls.append(1) or probe_hits(*args, **named))
    features, targets = made((20, 20))
    expected = probe_hits(features, targets)
    for store in (tmp_path, tmp_path, None):
        found = remembered.hits(features, targets, store=store)
        pd.testing.assert_frame_equal(pd.DataFrame(dict(found)), pd.DataFrame(expected))
    assert len(calls) == 2
    for other in ({"features": features * 2}, {"targets": targets[::-1]}, {"seed": 1}):
        remembered.hits(**{"features": features, "targets": targets} | other, store=tmp_path)
    assert len(calls) == 5


@pytest.mark.parametrize(("features", "targets", "named"), [
    (np.eye(4), [0, 1, 0], "3 targets"), (np.eye(4), [1] * 4, "1 classes"), (np.eye(4), [0, 1, 2, 3], "4 classes"),
    (np.full((4, 2), np.nan), [0, 0, 1, 1], "image 0 .*not finite"), ({"a": np.eye(4)}, [0, 0, 1, 1], "variants"),
])
def test_bad_input_is_named(features, targets, named):
    with pytest.raises(ItaeError, match=named) as raised:
        probe_hits(features, np.array(targets))
    assert "\n" not in str(raised.value)
