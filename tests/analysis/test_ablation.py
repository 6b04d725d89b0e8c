from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from itae_utils.analysis.ablation import (
    ablation_grid,
    ablation_headline,
    ablation_thresholds,
    deep_settings,
    describe_extraction,
    edit_settings,
)
from itae_utils.errors import ItaeError
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.fitting import fit_thresholds
from itae_utils.method.setting import ATTENUATIONS, ITAE
from itae_utils.method.thresholds import Thresholds
from tests.conftest import MadeDataset, as_backbone, tiny_vit


@pytest.fixture
def fits():
    """A low mode in the key's norms, a high one in the token's and along the directions, and none in the others."""
    rng = np.random.default_rng(0)
    one = rng.normal(8, 0.5, 4000)
    low, high = (np.concatenate([rng.normal(mode, 0.05, 200), rng.normal(8, 0.5, 3800)]) for mode in (1, 60))
    return Thresholds({(0, "query"): one, (0, "key"): low, (0, "value"): one, (0, "token"): high,
                       (0, "direction"): high / 100}, rank=3)


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
    assert table.setting["query scale 2.5 %"] == ITAE("query", fits[-1, "query"].quantile(0.025), "scale", 0.3, rank=3)
    assert table.setting["random like key 1 %"] == ITAE(
        "key", fits[-1, "key"].quantile(0.01), "mask", 0.3, select="random", seed=5, rank=3)


def test_auto_needs_a_theta_and_the_oracle_the_truth(fits):
    table = grid(fits, oracle=False)
    assert "oracle" not in table.index
    assert table.setting["key min auto"].threshold == fits[-1, "key"].threshold
    assert table.share["key min auto"] == pytest.approx(0.05)
    row = table.loc["key min 2.5 %"]
    assert np.mean(fits[-1, "key"].values <= row.setting.threshold) == pytest.approx(row.share, abs=1e-3)
    assert not table.index.str.contains("query.*auto").any()


@pytest.mark.parametrize("source", ["token", "direction"])
def test_grid_of_a_source_whose_artifacts_are_high(fits, source):
    table = grid(fits, sources=[source], percents=[2, 30], oracle=False)
    values, auto = fits[-1, source].values, f"{source} min auto"
    for theta, share in ((f"{source} min 2 %", 0.02), (f"random like {source} 30 %", 0.3)):
        assert table.share[theta] == share
        assert np.mean(values >= table.setting[theta].threshold) == pytest.approx(share, abs=1e-3)
    assert table.setting[auto] == ITAE(source, fits[-1, source].threshold, rank=3)
    assert table.share[auto] == np.mean(values >= table.setting[auto].threshold) == pytest.approx(0.05)


def test_a_tail_gives_one_source_the_other_side(fits):
    table = grid(fits, sources=["key", "token", "query"], tails={"token": "low", "query": "high"}, percents=[2])
    assert {name: setting.side for name, setting in table.setting.items() if " min 2 %" in name} == {
        "key min 2 %": "low", "token min 2 %": "low", "query min 2 %": "high"}
    for source, beyond in (("token", np.less_equal), ("query", np.greater_equal)):
        theta = table.setting[f"{source} min 2 %"].threshold
        assert beyond(fits[-1, source].values, theta).mean() == pytest.approx(0.02, abs=1e-3)
        assert table.setting[f"random like {source} 2 %"].side == table.setting[f"{source} min 2 %"].side
    assert table.index[table.theta == "auto"].tolist() == ["key min auto", "key scale auto", "random like key auto"], (
        "on its low side, the token has no mode")


def test_edits_are_the_setting_with_every_attenuation(fits):
    asked = ITAE("token", attenuation="scale", alpha=0.3, seed=5)
    edits = edit_settings(asked, fits)
    assert edits == {f"edit {each}": ITAE("token", "auto", each, 0.3, seed=5) for each in ATTENUATIONS}
    assert edit_settings(replace(asked, tail="low"), fits) == edit_settings(ITAE("query"), fits) == {}
    assert set(edit_settings(ITAE("direction", rank=3), fits)) == set(edits)


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


@pytest.mark.parametrize(("num_blocks", "source", "count"), [
    (1, "value", 1), (2, "value", 3), (12, "value", 5),
    (1, "direction", 0), (2, "direction", 1), (3, "direction", 3), (12, "direction", 5),  # none in the first block
])
def test_deep_settings(num_blocks, source, count):
    identified = {"source": source, "tail": "high", "rank": 2}
    settings = deep_settings(num_blocks, attenuation="scale", alpha=0.3, **identified)
    assert len(settings) == len({(setting.blocks, setting.rows) for setting in settings.values()}) == count
    for name, setting in settings.items():
        assert name.startswith(f"{setting.blocks} block")
        assert f"{setting.rows} rows" in name
        assert replace(setting, blocks=1, rows="cls") == ITAE(attenuation="scale", alpha=0.3, **identified)


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
    """The number of images that ran, by variant; `same` names variants whose setting is that of another."""

    seconds = 2.0

    def __init__(self, computed, **same):
        super().__init__(computed)
        self.stored = {name: same.get(name, name) for name in computed}

    @property
    def computed(self):
        return self


def test_headline():
    def facts(scores, measure="acc", stored=(), seeds=5, n_init=1):
        computed = {name: 50 * (name not in stored) for name in scores.index} | {"edit min": 50, "edit mask": 0}
        return ablation_headline(scores, measure, Extracted(computed), seeds=seeds, n_init=n_init)

    assert [fact["value"] for fact in facts(scores_of(0.7, 0.9))] == ["4", "0.700 to 0.900"], "edits don't count"
    assert facts(pd.concat([scores_of(0.7)] * 2))[0]["value"] == "3", "nor does a second seed"
    assert facts(scores_of())[1]["value"] == "none"
    assert all("5 seeds" in facts(scores)[1]["note"] and "1 start" in facts(scores)[1]["note"]
               for scores in (scores_of(), scores_of(0.7)))
    assert "10 starts" in facts(scores_of(0.7), n_init=10)[1]["note"]
    assert len(facts(scores_of(0.7), "change")) == 1
    for stored in ([], ["baseline"], ["baseline", "key min 1 %", "key 0 auto"]):
        note = facts(scores_of(0.7), "change", stored)[0]["note"]
        assert f"{len(stored)} were stored" in note if stored else "2.0 s" in note


def test_each_theta_is_listed_once(fits):
    theta = fits[-1, "key"].threshold
    deep = {"baseline": (), "1 block, cls rows": (theta,), "2 blocks, cls rows": (None, theta),
            "2 blocks, all rows": (None, theta), "3 blocks, cls rows": (3.0, None, theta)}
    listed = ablation_thresholds(grid(fits, sources=["query", "key", "direction"]), deep, "key")
    symbols = {"query": "‖query‖₂", "key": "‖key‖₂", "direction": "|cos(token, direction)|"}
    assert listed == {
        **{f"{symbols[source]}, last block, {percent} %": fits[-1, source].quantile(percent / 100)
           for source in symbols for percent in (1, 2.5)},
        "|cos(token, direction)|, last block": fits[-1, "direction"].threshold,
        "‖key‖₂, last block": theta, "‖key‖₂, last 2 blocks": [None, theta],
        "‖key‖₂, last 3 blocks": [3.0, None, theta]}


def test_variants_from_the_store_are_distinguished_from_those_that_ran():
    ran, stored, both, same = (describe_extraction(features, 1.5) for features in (
        Extracted({"a": 50, "b": 50}), Extracted({"a": 0, "b": 0}), Extracted({"a": 0, "b": 0, "c": 40}),
        Extracted({"a": 50, "b": 50, "c": 50}, c="a")))
    assert ran.startswith("**2 variants were computed together** for 50 images")
    assert "25 images per second" in ran
    assert "store" not in ran
    assert stored.startswith("**All 2 variants were read from the feature store**")
    assert both.startswith("**1 of 3 variants were computed together** for 40 images")
    assert "store" in both
    assert same == ran, "two names of one setting are one variant"
    assert all("1.5 s" in text for text in (ran, stored, both))
