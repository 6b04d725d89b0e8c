import numpy as np
import pandas as pd
import pytest

from itae_utils.analysis import remedies
from itae_utils.analysis.probes import paired_gain, probe_hits
from itae_utils.analysis.remedies import Remedy, passes, remedy_scores, remedy_table
from itae_utils.analysis.scoring import difference_table, score_variants
from itae_utils.errors import ItaeError
from tests.analysis.test_probes import made
from tests.conftest import as_backbone, tiny_vit


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


FACTS = {"noise": Remedy("training", attention=(0.8, 0.0)), "baseline": Remedy("nothing"),
         "better": Remedy("a sample", 0.003, attention=(0.83, 0.0004)), "wide": Remedy("nothing", 1.02, 1.148),
         "unscored": Remedy("weights only", 0.5)}


def test_the_table_has_a_row_for_each_remedy_and_a_column_for_each_score(scored):
    scores, *_ = scored
    table = remedy_table(scores, FACTS, ranked=True)
    assert list(table.index) == list(FACTS)
    assert list(table.columns) == [*remedies.METRICS.values(), "attention on artifacts", "passes more", "needs"]
    row = scores.loc["noise", "acc"]
    assert table.ACC["noise"] == (f"{row.value:.3f} ({row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}])")
    assert table.ACC["baseline"] == f"{scores.value['baseline', 'acc']:.3f}"
    assert table.ACC["unscored"] == "–"
    assert table["attention on artifacts"].to_dict() == {"noise": "80 % → 0 %", "baseline": "–", "wide": "–",
                                                         "better": "83 % → < 0.1 %", "unscored": "–"}
    assert table["passes more"].to_dict() == {"noise": "0", "baseline": "0", "better": "0.003", "unscored": "0.5",
                                              "wide": "1.02 (measured 1.15)"}
    assert table.needs["better"] == "a sample"
    unlabelled = remedy_table(None, FACTS, ranked=True)
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


def test_passes_count_the_tokens_that_go_through_each_block():
    backbone = as_backbone(tiny_vit("registers"))  # three blocks, 5 + 16 tokens
    assert passes(backbone, 3) == 1
    assert passes(backbone, 3, more=1) == pytest.approx(22 / 21)
    assert passes(backbone, 1) == pytest.approx(1 / 3)
    assert passes(backbone, 1, tokens=1) == pytest.approx(1 / 63)
    assert passes(backbone, 2, tokens=0, more=4) == pytest.approx(8 / 63)
