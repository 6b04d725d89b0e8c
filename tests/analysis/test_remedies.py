import dataclasses
import re
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch

from itae_utils.analysis import remedies
from itae_utils.analysis.probes import paired_gain, probe_hits
from itae_utils.analysis.remedies import (
    Remedy,
    change_table,
    describe_attention,
    describe_remedies,
    passes,
    register_settings,
    remedy_facts,
    remedy_rows,
    remedy_scores,
    remedy_table,
)
from itae_utils.analysis.scoring import difference_table, score_variants
from itae_utils.analysis.vectors import cosine_distance
from itae_utils.data.datasets import load_dataset
from itae_utils.errors import ItaeError
from itae_utils.extraction.neurons import find_register_neurons
from itae_utils.method.register_setting import TestTimeRegisters
from itae_utils.method.registers import apply_registers
from itae_utils.method.setting import ITAE
from itae_utils.models.backbones import load_backbone
from itae_utils.results import check_results
from tests.analysis.test_probes import made
from tests.conftest import MadeDataset, as_backbone, images, setup, tiny_vit
from tests.tiny_notebooks import PROVENANCE


@pytest.fixture(scope="module")
def scored():
    """Scores of a baseline, of better, of wider and of meaningless features; and what they were measured on."""
    baseline, targets = made((30, 30, 30), right=1.5)
    features = {"baseline": baseline, "better": made((30, 30, 30), right=5)[0],
                "wide": np.hstack([baseline, baseline]), "noise": np.random.default_rng(1).normal(size=(90, 4))}
    k_means = {"seeds": [2, 3], "n_init": 2, "normalize": True, "algorithm": "exact", "store": None}
    return remedy_scores(features, targets, seed=5, **k_means), features, targets, k_means


def test_scores_are_those_of_each_function_alone(scored):
    scores, features, targets, k_means = scored
    assert list(scores.index.unique("remedy")) == list(features)
    assert set(scores.index.unique("metric")) == set(remedies.METRICS)
    means = score_variants(features, targets, **k_means).groupby("variant")[["acc", "nmi", "ari"]].mean()
    for name, rows in features.items():
        np.testing.assert_allclose(scores.value[name][["acc", "nmi", "ari"]], means.loc[name])
        for probe, hits in probe_hits(rows, targets, seed=5).items():
            assert scores.value[name, probe] == pytest.approx(hits.mean())


def test_leads_are_paired_bootstraps_against_the_baseline(scored):
    scores, features, targets, k_means = scored
    columns = ["difference", "low", "high"]
    assert scores.loc["baseline", columns].isna().all(axis=None)
    hits = {name: probe_hits(rows, targets, seed=5) for name, rows in features.items()}
    labels = {name: remedies.remembered.clusters(rows, 3, **k_means)[0] for name, rows in features.items()}
    expected = difference_table(targets, labels, seed=5)
    for name in ("better", "wide", "noise"):
        found = scores.loc[name, columns]
        pd.testing.assert_frame_equal(found.loc[["acc", "nmi", "ari"]], expected.loc[name][columns])
        pd.testing.assert_frame_equal(found.loc[["knn", "probe"]], paired_gain(hits["baseline"], hits[name], 5))


def test_features_without_a_baseline_are_refused(scored):
    _, features, targets, k_means = scored
    with pytest.raises(ItaeError, match="lack 'baseline'"):
        remedy_scores({"better": features["better"]}, targets, **k_means)


# --- the table --------------------------------------------------------------------------------------------------------

FACTS = {"noise": Remedy("training", attention=(0.8, 0.0)), "baseline": Remedy("nothing", attention=(0.8,)),
         "better": Remedy("a sample", 0.003, attention=(0.83, 0.0004)), "wide": Remedy("nothing", 1.023),
         "unscored": Remedy("weights only", 0.5)}


def test_the_table_has_a_row_for_each_remedy_and_a_column_for_each_score(scored):
    scores, *_ = scored
    table = remedy_table(scores, FACTS, ranked=True).map(lambda text: text.replace(remedies.NBSP, " "))
    assert list(table.index) == list(FACTS)
    assert list(table.columns) == [*remedies.METRICS.values(), "attention on artifacts", "passes more", "needs"]
    row = scores.loc["noise", "acc"]
    assert table.ACC["noise"] == f"{row.value:.3f}; {row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
    assert table.ACC["baseline"] == f"{scores.value['baseline', 'acc']:.3f}"
    assert table.ACC["unscored"] == "–"
    assert table["attention on artifacts"].to_dict() == {"noise": "80 % → 0 %", "baseline": "80 %", "wide": "–",
                                                         "better": "83 % → < 0.1 %", "unscored": "–"}
    assert table["passes more"].to_dict() == {"noise": "0.00", "baseline": "0.00", "better": "< 0.01",
                                              "unscored": "0.50", "wide": "1.02"}
    assert table.needs["better"] == "a sample"
    unlabelled = remedy_table(None, FACTS, ranked=True).map(lambda text: text.replace(remedies.NBSP, " "))
    pd.testing.assert_frame_equal(unlabelled, table[unlabelled.columns])
    assert len(unlabelled.columns) == 3


def test_the_best_score_is_marked_only_where_remedies_can_be_ranked_and_the_lead_is_clear(scored):
    scores, *_ = scored
    marked = remedy_table(scores, FACTS, ranked=True).apply(lambda column: column.str.endswith(" ★"))
    clear = scores.low["better"] > 0
    assert clear.sum() >= 4
    for metric, title in remedies.METRICS.items():
        assert marked[title].to_dict() == {name: name == "better" and clear[metric] for name in FACTS}
    assert not remedy_table(scores, FACTS, ranked=False).map(lambda text: "★" in text).any(axis=None)
    unclear = scores.assign(low=scores.low.where(scores.low.isna(), -0.01))
    assert not remedy_table(unclear, FACTS, ranked=True).map(lambda text: "★" in text).any(axis=None)


# --- costs and needs --------------------------------------------------------------------------------------------------

def test_passes_count_the_tokens_that_go_through_each_block():
    backbone = as_backbone(tiny_vit("registers"))  # three blocks, 5 + 16 tokens
    assert passes(backbone, 3) == 1
    assert passes(backbone, 3, more=1) == pytest.approx(22 / 21)
    assert passes(backbone, 1) == pytest.approx(1 / 3)
    assert passes(backbone, 1, tokens=1) == pytest.approx(1 / 63)
    assert passes(backbone, 2, tokens=0, more=4) == pytest.approx(8 / 63)


def tokens_through(model, registers=None) -> list[int]:
    """Return the number of tokens of an image that each block gets."""
    counts, handles = [], []
    with apply_registers(model, registers) if registers else nullcontext():
        for block in model.blocks:
            handles.append(block.norm1.register_forward_hook(lambda _module, _args, out: counts.append(out.shape[1])))
        model.forward_features(images(1))
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("structure", ["registers", "dinov3"])
def test_costs_are_the_tokens_of_the_blocks_that_run_again(structure):
    backbone, dataset, _ = setup(structure, count=3)
    model, plain = backbone.model, tokens_through(backbone.model)  # three blocks, 5 + 16 tokens
    one = TestTimeRegisters({1: (3, 7)})
    forms = {"registers": one, "late registers": dataclasses.replace(one, insert="late"),
             "register bias": find_register_neurons(backbone, dataset, dataclasses.replace(one, form="bias")),
             "neurons zeroed": dataclasses.replace(one, form="zero")}
    again = {name: tokens_through(model, setting)[setting.first_block:] for name, setting in forms.items()}
    assert {name: len(blocks) for name, blocks in again.items()} == {
        "registers": 3, "late registers": 2, "register bias": 3, "neurons zeroed": 2}
    again |= {"baseline": [], "itae": [1], "no patches": [1], "registers and itae": again["registers"] + [1],
              "mean of patches": plain[-1:], "mean of normal patches": plain[-1:], "[CLS] and mean": plain[-1:],
              "trained registers": [remedies.TRAINED] * 3}
    facts = remedy_facts(backbone, one, {"baseline": 0.5})
    assert {name: each.passes for name, each in facts.items()} == {
        name: pytest.approx(sum(blocks) / sum(plain)) for name, blocks in again.items()}


def test_registers_without_neurons_cost_nothing():
    facts = remedy_facts(as_backbone(tiny_vit()), TestTimeRegisters({}), {"baseline": 0.0})
    for name in ("registers", "late registers", "register bias", "neurons zeroed"):
        assert facts[name].passes == 0, name
    assert facts["registers and itae"].passes == facts["itae"].passes > 0


def test_needs_and_attention_of_the_remedies():
    facts = remedy_facts(as_backbone(tiny_vit()), TestTimeRegisters({1: (3,)}),
                         {"baseline": 0.8, "itae": 0.1, "registers": 0.3})
    assert {name: each.attention for name, each in facts.items() if each.attention} == {
        "baseline": (0.8,), "itae": (0.8, 0.1), "registers": (0.8, 0.3)}
    without = {name for name, each in facts.items() if each.needs == "nothing"}
    assert without == {"baseline", "no patches", "mean of patches", "[CLS] and mean"}
    assert {name for name in set(facts) - without if facts[name].needs != "a sample"} == {"trained registers"}


# --- words and rows ---------------------------------------------------------------------------------------------------

def test_the_attention_that_is_left_at_most():
    facts = {"baseline": Remedy("nothing", attention=(0.83,)), "mean": Remedy("nothing"),
             "one": Remedy("nothing", attention=(0.83, 0.02)), "other": Remedy("nothing", attention=(0.83, 0.11)),
             "none": Remedy("nothing", attention=(0.83, 0.0))}
    text = describe_attention(facts)
    assert re.findall(r"[\d.]+ %", text) == ["83 %", "11 %"]
    assert [name for name in ("one", "other", "none") if f"({name})" in text] == ["other"]


def test_clear_differences_are_named_by_their_side():
    intervals = {"baseline": (np.nan, np.nan), "up": (0.01, 0.2), "down": (-0.2, -0.01), "none": (-0.1, 0.1),
                 "touching": (0.0, 0.2)}
    flat = {name: (-0.1, 0.1) if name != "baseline" else ends for name, ends in intervals.items()}
    scores = pd.concat({metric: pd.DataFrame(flat if metric == "nmi" else intervals, index=["low", "high"]).T
                        for metric in remedies.METRICS}).swaplevel().rename_axis(["remedy", "metric"])
    said = describe_remedies(scores).split(". ")
    for metric, title in remedies.METRICS.items():
        sentences = [each for each in said if each.startswith(title)]
        named = [[name for name in intervals if name != "baseline" and name in each.split()] for each in sentences]
        assert named == ([[]] if metric == "nmi" else [["up"], ["down"]]), metric
        assert [("above" in each, "below" in each) for each in sentences] == (
            [(False, False)] if metric == "nmi" else [(True, False), (False, True)])


def test_rows_hold_the_numbers_of_the_scores(scored):
    scores, features, *_ = scored
    rows = remedy_rows(scores, backbone="demo", dataset="digits", n=90)
    check_results({"schema": 1, "notebook": "05_remedies", "provenance": PROVENANCE, "parameters": {}, "rows": rows,
                   "thresholds": {}, "figures": [], "headline": []})
    expected = {}
    for name in features:
        for metric in remedies.METRICS:
            expected[name, metric] = scores.value[name, metric]
            if name != "baseline":
                row = scores.loc[name, metric]
                expected |= {(name, f"{metric}_difference"): row.difference,
                             (name, f"{metric}_difference_low"): row.low, (name, f"{metric}_difference_high"): row.high}
    assert {(row["variant"], row["metric"]): row["value"] for row in rows} == expected
    assert len(rows) == len(expected) == 5 * (4 + 3 * 3)
    assert {(row["backbone"], row["dataset"], row["n"], row["seed"]) for row in rows} == {("demo", "digits", 90, None)}


def test_a_change_is_any_bit_that_differs():
    rng = np.random.default_rng(0)
    baseline, mean = rng.normal(size=(9, 4)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    nearly = baseline.copy()
    nearly[3, 2] = np.nextafter(nearly[3, 2], np.float32(9))
    table = change_table({"baseline": baseline, "same": baseline.copy(), "nearly": nearly, "other": -baseline},
                       {"mean": mean, "mean_normal": mean.copy()})
    assert table["equal to the bit"].tolist() == ["yes", "no", "no", "no", "yes"]
    assert list(table.index[:3]) == ["same", "nearly", "other"]
    distances = [0, 0, 2, cosine_distance(mean, baseline), 0]
    assert [float(text) for text in table["mean cosine distance"]] == pytest.approx(distances, abs=1e-2)
    moved = rng.normal(size=(9, 4)).astype(np.float32)
    last = change_table({"baseline": baseline}, {"mean": mean, "mean_normal": moved}).iloc[-1]
    assert float(last["mean cosine distance"]) == pytest.approx(cosine_distance(moved, mean), rel=1e-2)


# --- rows of registers ------------------------------------------------------------------------------------------------

NAMES = ["registers", "late registers", "register bias", "neurons zeroed", "registers and itae"]


def test_the_rows_of_registers_are_forms_of_what_was_found():
    backbone, digits = load_backbone("demo"), load_dataset("digits", limit=200)
    drawn, itae = {"seed": 3, "sample": 120, "store": None, "batch_size": 50}, ITAE("token", "share:2%")
    found, rows, left_out = register_settings(backbone, digits, itae, **drawn)
    assert found == find_register_neurons(backbone, digits, **drawn)
    assert found.neurons
    assert list(rows) == NAMES
    assert left_out == []
    assert {each.neurons for each in rows.values()} == {found.neurons}
    assert rows["registers"] == found
    assert [(each.form, each.insert) for each in rows.values()] == [
        ("token", "start"), ("token", "late"), ("bias", "start"), ("zero", "start"), ("token", "start")]
    assert len(rows["register bias"].means) == backbone.num_blocks
    on_top = rows["registers and itae"].then
    assert on_top == find_register_neurons(backbone, digits, dataclasses.replace(found, then=itae), **drawn).then
    assert (on_top.source, on_top.threshold == itae.threshold) == ("token", False)
    assert [each.then for each in rows.values()][:4] == [None] * 4


def test_a_model_that_can_t_run_registers_has_no_rows_and_a_reason():
    backbone = as_backbone(tiny_vit())
    backbone.model.blocks[1].mlp = torch.nn.Sequential(torch.nn.Linear(24, 24))
    found, rows, left_out = register_settings(backbone, MadeDataset(4), ITAE())
    assert (found.neurons, rows) == ((), {})
    assert "Sequential" in found.reason
    (reason,) = left_out
    assert found.reason in reason


def test_only_the_row_that_is_not_known_for_a_model_is_left_out():
    found, rows, left_out = register_settings(as_backbone(tiny_vit("qk_norm")), MadeDataset(4), ITAE())
    assert list(rows) == [name for name in NAMES if name != "register bias"]
    (reason,) = left_out
    assert reason.startswith("register bias ")
    assert "norms its keys" in reason
    assert found.neurons == ()
    assert found.reason
