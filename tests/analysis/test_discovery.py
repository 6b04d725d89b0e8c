from dataclasses import replace

import numpy as np
import pytest

import itae_utils as itae
from itae_utils.analysis import discovery
from itae_utils.extraction.observation import Observation
from itae_utils.method.thresholds import ThresholdFit, fit_threshold


@pytest.fixture
def seen():
    """Two images of ten patches; the first patch is an artifact and has 0.6 of the attention."""
    artifacts = np.zeros((2, 10), dtype=bool)
    artifacts[:, 0] = True
    attention = np.full((2, 10), 0.4 / 9)
    attention[:, 0] = 0.6
    norms = {name: np.full((2, 10), 5.0) for name in ("query", "key", "value")}
    norms["key"][:, 0] = 1
    norms["key"][0, 1] = 1
    return Observation(np.arange(2), (2, 5), np.ones((2, 3, 10)), norms, attention, np.full((2, 10), 0.1), artifacts,
                       artifacts)


@pytest.fixture(scope="module")
def fits():
    rng = np.random.default_rng(0)
    two = np.concatenate([rng.normal(1, 0.05, 200), rng.normal(8, 0.5, 3800)])
    return {"query": fit_threshold(rng.normal(8, 0.5, 4000)), "key": fit_threshold(two), "value": fit_threshold([1, 2])}


def test_threshold_table_with_and_without_theta(fits):
    table = discovery.threshold_table(fits)
    assert table.loc["key", ["θ", "patches ≤ θ"]].tolist() == [f"{fits['key'].threshold:.4g}", "5 %"]
    assert table.loc["query", ["θ", "patches ≤ θ"]].tolist() == ["none", "–"]
    assert table.loc["value", "separation"] == "–"
    assert table.loc["query", "verdict"] == fits["query"].reason


def test_detection_table_counts_against_the_truth(seen):
    table = discovery.detection_table(seen, {"query": None, "key": 2.0, "value": 9.0})
    assert table.loc["key", ["found", "true", "precision", "recall"]].tolist() == [3, 2, pytest.approx(2 / 3), 1]
    assert table.loc["value", ["found", "precision", "recall"]].tolist() == [20, 0.1, 1]
    assert np.isnan(table.loc["query", "precision"])
    assert table.loc["query", "recall"] == 0


def test_concentration_is_the_share_of_the_busiest_tenth(seen):
    text = discovery.describe_concentration(seen)
    assert "the 1 most attended of an image's 10 patches" in text
    assert "60 %" in text


def fitted(threshold=None, reason="one mode", patches=5000):
    return ThresholdFit(threshold, 0.1, 2.0, reason, np.ones(patches))


def test_discovery_headline(seen):
    detection = discovery.detection_table(seen, {"query": None, "key": 2.0, "value": None})
    facts = discovery.discovery_headline(seen, "key", 2.0, fitted(2.0), detection)
    assert facts[0]["value"] == "60 % → 10 %"
    assert facts[0]["note"].endswith("‖key‖")
    assert "10 % of the patches" in facts[0]["note"]
    assert facts[1]["value"] == "0.6667 / 1.0000"
    (natural,) = discovery.discovery_headline(replace(seen, truth=None), "key", 2.0, fitted(3.0), None)
    assert natural["note"].endswith("given ‖key‖ ≤ 2")


def test_discovery_headline_where_nothing_was_found(seen):
    nothing = replace(seen, artifacts=np.zeros_like(seen.artifacts))
    for fit, threshold, value, reason in [
        (fitted(), None, "none found", "one mode"),
        (fitted(reason="too few", patches=10), None, "not tested", "too few"),
        (fitted(2.0, "two modes"), 1e-4, "none found", "θ = 0.0001"),
    ]:
        (fact,) = discovery.discovery_headline(nothing, "key", threshold, fit, None)
        assert fact["value"] == value
        assert fact["note"].endswith(reason)


@pytest.mark.parametrize("names", [None, ["a.png", "猫/b.png"]])
def test_maps_are_saved_as_arrays_with_the_names_of_the_files(seen, tmp_path, names):
    link = discovery.save_maps(tmp_path / "new", seen, [1, 0], "key", names)
    with np.load(tmp_path / "new" / "attention.npz") as arrays:
        assert all(name in link for name in arrays)
        np.testing.assert_array_equal(arrays["before"], seen.attention[[1, 0]].reshape(2, 2, 5))
        np.testing.assert_array_equal(arrays["after"], seen.attention_after[[1, 0]].reshape(2, 2, 5))
        np.testing.assert_array_equal(arrays["norms"], seen.norms["key"][[1, 0]].reshape(2, 2, 5))
        np.testing.assert_array_equal(arrays["artifacts"], seen.artifacts[[1, 0]].reshape(2, 2, 5))
        assert arrays["index"].tolist() == [1, 0]
        assert (arrays["names"].tolist() == names[::-1]) if names else "names" not in arrays
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["attention.npz"]


def test_images_with_artifacts_are_drawn_by_their_counts():
    """As the README's example does: the first digits of the data set have no artifacts."""
    backbone, dataset = itae.load_backbone("demo"), itae.load_dataset("digits", limit=60)
    theta = itae.fit_thresholds(backbone, dataset)[-1, "key"].threshold
    setting = itae.ITAE(source="key", threshold=theta)
    features = itae.extract_features(backbone, dataset, {"baseline": None, "itae": setting})
    chosen = np.flatnonzero(features.artifact_counts["itae"])[:8]
    images, _ = next(itae.image_batches(dataset, backbone.transform, batch_size=8, indices=chosen))
    before, after = (itae.attention_map(backbone.model, images, itae=each) for each in (None, setting))
    assert (before != after).any(dim=(1, 2)).all()
