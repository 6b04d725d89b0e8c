import numpy as np
import pytest

from itae_utils.analysis.ablation import ablation_grid
from itae_utils.errors import ItaeError
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.observation import fit_thresholds
from itae_utils.method.setting import ITAE
from itae_utils.method.thresholds import Thresholds, fit_threshold
from tests.conftest import MadeDataset, as_backbone, tiny_vit


@pytest.fixture
def fits():
    """Two modes in the key's norms, one in the others'."""
    rng = np.random.default_rng(0)
    one = fit_threshold(rng.normal(8, 0.5, 4000))
    two = fit_threshold(np.concatenate([rng.normal(1, 0.05, 200), rng.normal(8, 0.5, 3800)]))
    return Thresholds({(0, "query"): one, (0, "key"): two, (0, "value"): one}, num_blocks=1, seconds=0.0)


def grid(fits, **options):
    return ablation_grid(fits, **{
        "sources": ["query", "key"], "attenuations": ["min", "scale"], "percents": [1, 2.5], "oracle": True} | options)


def test_grid_holds_every_setting_and_the_controls(fits):
    table = grid(fits, control="mask", alpha=0.3, seed=5)
    assert table.index.is_unique
    assert table.kind.value_counts().to_dict() == {"itae": 2 * (2 + 3), "random": 2 + 3, "baseline": 1, "oracle": 1}
    assert table.setting["baseline"] is None
    assert table.setting["oracle"] == ITAE(attenuation="mask", select="oracle", alpha=0.3)
    assert table.setting["query scale 2.5 %"] == ITAE("query", fits[-1, "query"].quantile(0.025), "scale", 0.3)
    assert table.setting["random like key 1 %"] == ITAE(
        "key", fits[-1, "key"].quantile(0.01), "mask", 0.3, select="random", seed=5)


def test_auto_stands_where_there_is_a_theta(fits):
    table = grid(fits)
    assert table.setting["key min auto"].threshold == fits[-1, "key"].threshold
    assert table.share["key min auto"] == pytest.approx(0.05)
    assert not table.index.str.contains("query.*auto").any()


def test_share_is_that_of_the_patches_at_or_below_theta(fits):
    table = grid(fits)
    row = table.loc["key min 2.5 %"]
    assert np.mean(fits[-1, "key"].norms <= row.setting.threshold) == pytest.approx(row.share, abs=1e-3)


def test_no_oracle_without_truth(fits):
    assert "oracle" not in grid(fits, oracle=False).index


@pytest.mark.parametrize("percent", [0, 100, -1])
def test_percentages_outside_are_refused(fits, percent):
    with pytest.raises(ItaeError, match=f"percents holds {percent}:"):
        grid(fits, percents=[1, percent])


def test_grid_runs_in_one_pass_on_a_model():
    backbone, dataset = as_backbone(tiny_vit()), MadeDataset(6)
    table = grid(fit_thresholds(backbone, dataset), oracle=False)
    features = extract_features(backbone, dataset, table.setting.to_dict())
    assert list(features) == list(table.index)
