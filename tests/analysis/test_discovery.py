import itertools
from dataclasses import replace

import numpy as np
import pytest

import itae_utils as itae
from itae_utils.analysis import discovery
from itae_utils.analysis.words import percent
from itae_utils.extraction.observation import Observation
from itae_utils.method.thresholds import ThresholdFit, fit_threshold

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a page would show them


@pytest.fixture
def seen():
    """Two images of ten patches; the first patch is an artifact and has 0.6 of the attention."""
    artifacts = np.zeros((2, 10), dtype=bool)
    artifacts[:, 0] = True
    attention = np.full((2, 10), 0.4 / 9)
    attention[:, 0] = 0.6
    statistics = {name: np.full((2, 10), 5.0) for name in ("query", "key", "value", "token")}
    statistics["key"][:, 0] = 1
    statistics["key"][0, 1] = 1
    statistics["token"][:, 0] = 50
    return Observation(np.arange(2), (2, 5), np.ones((2, 3, 10)), statistics, attention, np.full((2, 10), 0.1),
                       artifacts, np.ones((2, 3, 2)), artifacts)


@pytest.fixture(scope="module")
def fits():
    rng = np.random.default_rng(0)
    one = rng.normal(8, 0.5, 4000)
    low, high = (np.concatenate([rng.normal(mode, 0.05, 200), rng.normal(8, 0.5, 3800)]) for mode in (1, 60))
    return {"query": fit_threshold(one), "key": fit_threshold(low), "value": fit_threshold([1, 2]),
            "token": fit_threshold(high, side="high", source="token"),
            "attention": fit_threshold(one, side="high", source="attention")}


def fitted(threshold=None, reason="one mode", patches=5000, side="low"):
    return ThresholdFit(threshold, 0.1, 2.0, reason, np.ones(patches), side)


def test_threshold_table_of_both_sides_with_and_without_theta(fits):
    table = discovery.threshold_table(fits)
    assert list(table.index) == list(fits)
    assert table.index.name == "source"
    theta = {source: f"{fits[source].threshold:.4g}" for source in ("key", "token")}
    columns = ["statistic", "artifacts are", "θ", "patches"]
    assert table.loc["key", columns].tolist() == ["‖key‖₂", "low", theta["key"], "5 %"]
    assert table.loc["token", columns].tolist() == ["‖token‖₂", "high", theta["token"], "5 %"]
    assert 8 < float(theta["token"]) < 60
    assert table.loc["query", columns].tolist() == ["‖query‖₂", "low", "none", "–"]
    assert table.loc["attention", columns].tolist() == ["[CLS] attention", "high", "none", "–"]
    assert table.loc["value", "separation"] == "–"
    assert float(table.loc["token", "separation"]) == pytest.approx(fits["token"].separation, abs=0.05)
    assert table.loc["query", "verdict"] == fits["query"].reason


def test_found_patches_lie_beyond_the_theta_of_each_source_on_its_side(seen):
    rng = np.random.default_rng(0)
    values = {name: rng.uniform(size=(2, 10)) for name in ("key", "value", "token", "query")}
    thetas = {"key": values["key"][0, 3], "value": None, "token": values["token"][1, 2], "direction": 0.1,
              "query": 0.5}
    fits = {"key": fitted(), "value": fitted(), "token": fitted(side="high"), "direction": fitted(side="high"),
            "query": fitted(side="high")}
    found = discovery.found_patches(replace(seen, statistics=values), fits, thetas)
    assert list(found) == ["key", "value", "token", "query"], "the model has no direction"
    for image, patch in np.ndindex(2, 10):
        assert found["key"][image, patch] == (values["key"][image, patch] <= thetas["key"])
        assert found["token"][image, patch] == (values["token"][image, patch] >= thetas["token"])
        assert found["query"][image, patch] == (values["query"][image, patch] >= 0.5), "the side is that of the fit"
    assert not found["value"].any()
    assert found["key"][0, 3]
    assert found["token"][1, 2]


def test_detection_table_counts_against_the_truth(seen):
    thetas = {"query": None, "key": 2.0, "value": 9.0, "token": 40.0}
    fits = {name: fitted(side="high" if name == "token" else "low") for name in thetas}
    table = discovery.detection_table(discovery.found_patches(seen, fits, thetas), thetas, seen.truth)
    assert table.loc["key"].tolist() == [2.0, 3, 2, pytest.approx(2 / 3), 1]
    assert table.loc["value", ["found", "precision", "recall"]].tolist() == [20, 0.1, 1]
    assert table.loc["token", ["θ", "found", "precision", "recall"]].tolist() == [40, 2, 1, 1]
    assert table.loc["query", ["θ", "precision"]].isna().all()
    assert table.loc["query", "recall"] == 0


def test_jaccard_is_that_of_the_sets_of_patches():
    rng = np.random.default_rng(0)
    found = {str(share): rng.random((5, 12)) < share for share in (0, 0.1, 0.3, 0.9, 1)}
    found["nothing"] = np.zeros((5, 12), dtype=bool)
    sets = {name: set(zip(*np.nonzero(mask), strict=True)) for name, mask in found.items()}
    table = discovery.jaccard_table(found)
    assert list(table.index) == list(table.columns) == list(found)
    for one, other in itertools.product(found, repeat=2):
        either = sets[one] | sets[other]
        expected = len(sets[one] & sets[other]) / len(either) if either else np.nan
        assert table.loc[one, other] == pytest.approx(expected, nan_ok=True)
    assert table.isna().to_numpy().sum() == 4, "of two that find none"


def slow_takeover(seen, found, source):
    images, usual, suspects = [], [], []
    for row, weights in enumerate(seen.attention_after.tolist()):
        over = [patch for patch, weight in enumerate(weights)
                if weight > 10 * sum(weights) / len(weights) and not seen.artifacts[row, patch]]
        if not seen.artifacts[row].any():
            usual.append(len(over) > 0)
            continue
        images.append(len(over) > 0)
        suspects += [any(mask[row, patch] for name, mask in found.items() if name != source) for patch in over]
    return {name: sum(values) / len(values) if values else np.nan
            for name, values in (("images", images), ("usual", usual), ("suspects", suspects))}


@pytest.mark.parametrize("have_artifacts", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("others", [("token", "value"), ()])
def test_takeover_equals_a_count_patch_by_patch(seen, have_artifacts, others):
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(40, 0.1), 60) * rng.uniform(0.2, 0.9, (60, 1))  # the rest is on prefix tokens
    artifacts = (rng.random((60, 40)) < 0.05) & (np.arange(60)[:, None] < 60 * have_artifacts)
    artifacts[: round(60 * have_artifacts), 0] = True
    found = {name: rng.random((60, 40)) < 0.2 for name in others} | {"key": rng.random((60, 40)) < 0.9}
    observed = replace(seen, attention_after=weights, artifacts=artifacts)
    shares = discovery.takeover(observed, found, "key")
    assert shares == pytest.approx(slow_takeover(observed, found, "key"), nan_ok=True)
    assert np.isnan(shares["images"]) == np.isnan(shares["suspects"]) == (have_artifacts == 0)
    assert np.isnan(shares["usual"]) == (have_artifacts == 1)
    if have_artifacts:
        assert 0 < shares["images"] < 1
        assert (shares["suspects"] > 0) == bool(others)


def test_no_patch_takes_over_an_image_whose_patches_are_all_masked(seen):
    masked = replace(seen, attention_after=np.zeros((2, 10)), artifacts=np.ones((2, 10), dtype=bool))
    shares = discovery.takeover(masked, {"key": masked.artifacts}, "key")
    assert shares["images"] == 0
    assert np.isnan([shares["usual"], shares["suspects"]]).all()


@pytest.mark.parametrize(("usual", "suspects"), [(0.031, 0.4), (np.nan, 0.4), (0.031, np.nan), (np.nan, np.nan)])
def test_takeover_is_described_with_the_shares_that_are_known(usual, suspects):
    text = discovery.describe_takeover({"images": 0.25, "usual": usual, "suspects": suspects})
    assert "25 %" in text
    assert (percent(0.031) in text) == (not np.isnan(usual))
    assert (percent(0.4) in text) == (not np.isnan(suspects))
    assert "nan" not in text


def test_concentration_is_the_share_of_the_busiest_tenth(seen):
    text = discovery.describe_concentration(seen)
    assert "the 1 most attended of an image's 10 patches" in text
    assert "60 %" in text


@pytest.mark.parametrize(("source", "side", "theta", "condition"), [
    ("key", "low", 2.0, "‖key‖₂ ≤ 2"), ("token", "high", 40.0, "‖token‖₂ ≥ 40")])
def test_discovery_headline(seen, source, side, theta, condition):
    thetas, fits = {source: theta}, {source: fitted(theta, side=side)}
    detection = discovery.detection_table(discovery.found_patches(seen, fits, thetas), thetas, seen.truth)
    facts = discovery.discovery_headline(seen, source, theta, fits[source], detection)
    assert facts[0]["value"] == "60 % → 10 %"
    assert facts[0]["note"].endswith(f"those with {condition}")
    assert "10 % of the patches" in facts[0]["note"]
    assert facts[1]["value"] == ("0.6667 / 1.0000" if source == "key" else "1.0000 / 1.0000")
    assert condition in facts[1]["note"]
    (natural,) = discovery.discovery_headline(replace(seen, truth=None), source, theta, fitted(3.0, side=side), None)
    assert natural["note"].endswith(f"given {condition}")


def test_discovery_headline_where_nothing_was_found(seen):
    nothing = replace(seen, artifacts=np.zeros_like(seen.artifacts))
    for source, fit, threshold, value, reason in [
        ("key", fitted(), None, "none found", "one mode"),
        ("key", fitted(reason="too few", patches=10), None, "not tested", "too few"),
        ("key", fitted(2.0, "two modes"), 1e-4, "none found", "‖key‖₂ ≤ 0.0001"),
        ("attention", fitted(0.2, "two modes", side="high"), 0.9, "none found", "[CLS] attention ≥ 0.9"),
    ]:
        (fact,) = discovery.discovery_headline(nothing, source, threshold, fit, None)
        assert fact["value"] == value
        assert fact["note"].endswith(reason)


@pytest.mark.parametrize("source", ["key", "token"])
@pytest.mark.parametrize("names", [None, ["a.png", "猫/b.png"]])
def test_maps_are_saved_as_arrays_with_the_names_of_the_files(seen, tmp_path, names, source):
    link = discovery.save_maps(tmp_path / "new", seen, [1, 0], source, names)
    with np.load(tmp_path / "new" / "attention.npz") as arrays:
        assert all(name in link for name in arrays)
        np.testing.assert_array_equal(arrays["before"], seen.attention[[1, 0]].reshape(2, 2, 5))
        np.testing.assert_array_equal(arrays["after"], seen.attention_after[[1, 0]].reshape(2, 2, 5))
        np.testing.assert_array_equal(arrays["statistic"], seen.statistics[source][[1, 0]].reshape(2, 2, 5))
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
