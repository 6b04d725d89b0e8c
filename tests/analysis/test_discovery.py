from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from itae_utils.analysis import ablation, discovery, words
from itae_utils.data.datasets import load_dataset
from itae_utils.extraction.observation import Observation
from itae_utils.method.thresholds import ThresholdFit, fit_threshold
from itae_utils.models.backbones import load_backbone


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


@pytest.mark.parametrize(("share", "text"), [
    (0, "0 %"), (0.0004, "< 0.1 %"), (0.004, "0.4 %"),
    (0.0885, "8.8 %"), (0.0996, "10 %"), (0.904, "90 %"), (0.9936, "99.4 %"),
    (0.99999, "99.9 %"), (1, "100 %"), (-0.14, "-14 %"), (1.2, "120 %"),
])
def test_percent(share, text):
    assert words.percent(share) == text


def test_run_is_described_and_planting_is_named_only_where_it_was_done():
    digits = load_dataset("digits")
    planted, clean = (words.describe_run(load_backbone(name), digits) for name in ("demo", "demo-clean"))
    assert "were planted" in planted
    assert "planted" not in clean
    assert "7 × 7 patches" in clean
    assert "1,797 images, 10 classes" in clean


def test_run_without_labels_and_with_skipped_files_says_so():
    images = replace(load_dataset("digits", limit=50), targets=None, classes=None, skipped=["bad.png", "worse.png"])
    text = words.describe_run(load_backbone("demo"), images)
    assert "50 images, without labels" in text
    assert "2 unreadable files were left out, bad.png the first" in text


def test_classes_that_are_there_are_counted():
    text = words.describe_run(load_backbone("demo"), load_dataset("digits", limit=3))
    assert "3 images, 3 of 10 classes;" in text


def test_threshold_is_told_with_its_origin(fits):
    fit = fits["key"]
    text = words.describe_threshold("key", fit, fit.threshold)
    assert text.startswith(f"θ = {fit.threshold:.4g} on the norm of the key")
    assert "was given" in words.describe_threshold("key", fits["key"], 3.0)
    text = words.describe_threshold("query", fits["query"], None)
    assert "No artifacts were found" in text
    assert fits["query"].reason in text
    few = fit_threshold(np.arange(1.0, 1000.0))
    text = words.describe_threshold("key", few, None)
    assert "could not be looked for" in text
    assert "999 patches are too few" in text


def test_threshold_table_has_words_for_what_was_not_found(fits):
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
    assert "the 1 most attended of an image's 10 patches take 60 %" in text


def fitted(threshold=None, reason="one mode", patches=5000):
    return ThresholdFit(threshold, 0.1, 2.0, reason, np.ones(patches))


def test_discovery_headline(seen):
    detection = discovery.detection_table(seen, {"query": None, "key": 2.0, "value": None})
    facts = discovery.discovery_headline(seen, "key", 2.0, fitted(2.0), detection)
    assert facts[0]["value"] == "60 % → 10 %"
    assert facts[0]["note"].endswith("10 % of the patches, told by ‖key‖")
    assert facts[1]["value"] == "0.6667 / 1.0000"
    (natural,) = discovery.discovery_headline(replace(seen, truth=None), "key", 2.0, fitted(3.0), None)
    assert natural["note"].endswith("told by the given ‖key‖ ≤ 2")


def test_discovery_headline_where_nothing_was_found(seen):
    nothing = replace(seen, artifacts=np.zeros_like(seen.artifacts))
    for fit, threshold, told in [
        (fitted(), None, ("none found", "one mode")),
        (fitted(reason="too few", patches=10), None, ("not looked for", "too few")),
        (fitted(2.0, "two modes"), 1e-4, ("none found", "no patch lies at or below the given θ = 0.0001")),
    ]:
        (fact,) = discovery.discovery_headline(nothing, "key", threshold, fit, None)
        assert (fact["value"], fact["note"].partition(": ")[2]) == told


def scores_of(*autos):
    rows = [("baseline", "baseline", None, 0.5), ("key min 1 %", "itae", "1 %", 0.6),
            *((f"key {place} auto", "itae", "auto", value) for place, value in enumerate(autos))]
    return pd.DataFrame(rows, columns=["variant", "kind", "theta", "acc"]).set_index("variant")


class Extracted(dict):
    """Images that were run, by variant."""

    seconds = 2.0

    @property
    def computed(self):
        return self


FRESH, WARM, GROWN = Extracted(a=50, b=50), Extracted(a=0, b=0), Extracted(a=0, b=0, c=40)


def test_ablation_headline():
    facts = ablation.ablation_headline(scores_of(0.7, 0.9), "acc", FRESH)
    assert [fact["value"] for fact in facts] == ["2 variants", "0.700 to 0.900"]
    assert ablation.ablation_headline(scores_of(), "acc", FRESH)[1]["value"] == "none"
    assert len(ablation.ablation_headline(scores_of(0.7), "change", FRESH)) == 1
    notes = [ablation.ablation_headline(scores_of(0.7), "change", features)[0]["note"]
             for features in (FRESH, WARM, GROWN)]
    assert notes == ["in 2.0 s", "2 of them from the store", "2 of them from the store"]


def test_what_was_run_and_what_was_stored_is_told_apart():
    fresh, warm, grown = (ablation.describe_extraction(features, 1.5) for features in (FRESH, WARM, GROWN))
    assert fresh == ("**2 variants ran in one pass** over 50 images, which took 2.0 s (25 images a second), "
                     "after 1.5 s for θ.")
    assert warm.startswith("**All 2 variants were found in the feature store**")
    assert grown.startswith("**1 of 3 variants ran in one pass** over 40 images")
    assert grown.endswith("the others were found in the feature store.")


def test_result_rows_leave_out_what_is_not_finite():
    table = pd.DataFrame({"variant": ["a", "b"], "seed": [0, 1], "acc": [0.5, np.nan], "nmi": [0.1, 0.2]})
    rows = words.result_rows(table, ["acc", "nmi"], backbone="demo", dataset="digits", n=7)
    assert rows[0] == {"backbone": "demo", "dataset": "digits", "n": 7, "variant": "a", "seed": 0, "metric": "acc",
                       "value": 0.5}
    assert [(row["variant"], row["metric"]) for row in rows] == [("a", "acc"), ("a", "nmi"), ("b", "nmi")]


def test_result_rows_take_backbone_from_the_table_and_no_seed():
    table = pd.DataFrame({"variant": ["a"], "backbone": ["other"], "acc": [1]})
    row, = words.result_rows(table, ["acc"], backbone="demo", dataset="digits", n=7)
    assert (row["backbone"], row["seed"]) == ("other", None)
