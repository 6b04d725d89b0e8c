import numpy as np
import pandas as pd
import pytest

from itae_utils.analysis.ablation import (
    ablation_grid,
    ablation_headline,
    ablation_thresholds,
    deep_settings,
    describe_extraction,
)
from itae_utils.errors import ItaeError
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.observation import fit_thresholds
from itae_utils.method.setting import ITAE
from itae_utils.method.thresholds import Thresholds
from tests.conftest import MadeDataset, as_backbone, tiny_vit


@pytest.fixture
def fits():
    """Two modes in the key's norms, one in the others'."""
    rng = np.random.default_rng(0)
    one = rng.normal(8, 0.5, 4000)
    two = np.concatenate([rng.normal(1, 0.05, 200), rng.normal(8, 0.5, 3800)])
    return Thresholds({(0, "query"): one, (0, "key"): two, (0, "value"): one})


def grid(fits, **options):
    return ablation_grid(fits, **{
        "sources": ["query", "key"], "attenuations": ["min", "scale"], "percents": [1, 2.5], "oracle": True} | options)


def test_grid_holds_every_setting_and_the_controls(fits):
    table = grid(fits, control="mask", alpha=0.3, seed=5)
    assert table.index.is_unique
    assert table.kind.value_counts().to_dict() == {"itae": 2 * (2 + 3), "random": 2 + 3, "baseline": 1, "oracle": 1}
    # A control must not be confused with its setting in the result rows.
    assert (table[["source", "attenuation", "theta"]].notna().all(axis=1) == (table.kind == "itae")).all()
    assert table.setting["baseline"] is None
    assert table.setting["oracle"] == ITAE(attenuation="mask", select="oracle", alpha=0.3)
    assert table.setting["query scale 2.5 %"] == ITAE("query", fits[-1, "query"].quantile(0.025), "scale", 0.3)
    assert table.setting["random like key 1 %"] == ITAE(
        "key", fits[-1, "key"].quantile(0.01), "mask", 0.3, select="random", seed=5)


def test_auto_needs_a_theta_and_the_oracle_the_truth(fits):
    table = grid(fits, oracle=False)
    assert "oracle" not in table.index
    assert table.setting["key min auto"].threshold == fits[-1, "key"].threshold
    assert table.share["key min auto"] == pytest.approx(0.05)
    row = table.loc["key min 2.5 %"]
    assert np.mean(fits[-1, "key"].norms <= row.setting.threshold) == pytest.approx(row.share, abs=1e-3)
    assert not table.index.str.contains("query.*auto").any()


@pytest.mark.parametrize(("name", "values", "named"), [
    ("percents", [1, 0], "0:"), ("percents", [1, 100], "100:"), ("percents", [1, -1], "-1:"),
    ("sources", ["key", "query", "key"], "'key'"), ("attenuations", ("min", "min"), "'min'"),
    ("percents", [5, 1, 1.0], "'1 %'"), ("percents", [1 / 3, 0.33333333], "'0.333333 %'"),
])
def test_percentages_outside_and_values_listed_twice_are_refused(fits, name, values, named):
    """Scores of a setting listed twice would enter every mean and standard deviation twice."""
    with pytest.raises(ItaeError, match=f"{name} holds {named}"):
        grid(fits, **{name: values})


def test_small_percentages_are_named_without_an_exponent(fits):
    table = grid(fits, percents=[0.00001, 12.5], oracle=False)
    assert set(table.theta.dropna()) == {"0.00001 %", "12.5 %", "auto"}
    assert table.share["key min 0.00001 %"] == pytest.approx(1e-7)


@pytest.mark.parametrize(("num_blocks", "count"), [(1, 1), (2, 3), (12, 5)])
def test_deep_settings(num_blocks, count):
    settings = deep_settings(num_blocks, source="value", attenuation="scale", alpha=0.3)
    assert len(settings) == len({(setting.blocks, setting.rows) for setting in settings.values()}) == count
    assert all(name.startswith(f"{setting.blocks} block") and f"{setting.rows} rows" in name
               for name, setting in settings.items())
    assert {(setting.source, setting.threshold, setting.attenuation, setting.alpha)
            for setting in settings.values()} == {("value", "auto", "scale", 0.3)}


def test_grid_runs_in_one_pass_on_a_model():
    backbone, dataset = as_backbone(tiny_vit()), MadeDataset(6)
    table = grid(fit_thresholds(backbone, dataset), oracle=False)
    features = extract_features(backbone, dataset, table.setting.to_dict())
    assert list(features) == list(table.index)


def scores_of(*autos):
    rows = [("baseline", "baseline", None, 0.5), ("key min 1 %", "itae", "1 %", 0.6),
            *((f"key {place} auto", "itae", "auto", value) for place, value in enumerate(autos))]
    return pd.DataFrame(rows, columns=["variant", "kind", "theta", "acc"]).set_index("variant")


class Extracted(dict):
    """The number of images that ran, by variant."""

    seconds = 2.0

    @property
    def computed(self):
        return self


ALL_RUN, ALL_STORED, SOME_STORED = Extracted(a=50, b=50), Extracted(a=0, b=0), Extracted(a=0, b=0, c=40)


def test_headline():
    def facts(scores, measure="acc", features=ALL_RUN, seeds=5, n_init=1):
        return ablation_headline(scores, measure, features, seeds=seeds, n_init=n_init)

    assert [fact["value"] for fact in facts(scores_of(0.7, 0.9))] == ["2", "0.700 to 0.900"]
    assert facts(scores_of())[1]["value"] == "none"
    assert all("5 seeds" in facts(scores)[1]["note"] and "1 start" in facts(scores)[1]["note"]
               for scores in (scores_of(), scores_of(0.7)))
    assert "10 starts" in facts(scores_of(0.7), n_init=10)[1]["note"]
    assert len(facts(scores_of(0.7), "change")) == 1
    notes = [facts(scores_of(0.7), "change", features)[0]["note"] for features in (ALL_RUN, ALL_STORED, SOME_STORED)]
    assert "2.0 s" in notes[0]
    assert all("2 were stored" in note for note in notes[1:])


def test_each_theta_is_listed_once(fits):
    fits = Thresholds({(block, source): fits[-1, source].norms for block in (0, 1) for source in ("query", "key")})
    listed = ablation_thresholds(grid(fits), fits, 2, "key")
    assert listed == {
        **{f"‖{source}‖, last block, {percent} %": fits[-1, source].quantile(percent / 100)
           for source in ("query", "key") for percent in (1, 2.5)},
        "‖key‖, last block": fits[-1, "key"].threshold,
        "‖key‖, last 2 blocks": [fits[-1, "key"].threshold] * 2}
    assert "‖key‖, last 2 blocks" not in ablation_thresholds(grid(fits), fits, 1, "key")


def test_variants_from_the_store_are_distinguished_from_those_that_ran():
    ran, stored, both = (describe_extraction(features, 1.5) for features in (ALL_RUN, ALL_STORED, SOME_STORED))
    assert ran.startswith("**2 variants were computed together** for 50 images")
    assert "25 images per second" in ran
    assert "store" not in ran
    assert stored.startswith("**All 2 variants were read from the feature store**")
    assert both.startswith("**1 of 3 variants were computed together** for 40 images")
    assert "store" in both
    assert all("1.5 s" in text for text in (ran, stored, both))
