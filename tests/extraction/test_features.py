import dataclasses
import re

import numpy as np
import pytest

from itae_utils.errors import ItaeError
from itae_utils.extraction import features as module
from itae_utils.extraction.features import extract_features
from itae_utils.method.artifacts import FiringRule
from itae_utils.method.attention import attenuate
from itae_utils.method.setting import ITAE, SOURCES
from itae_utils.method.thresholds import ThresholdFit
from tests.conftest import as_backbone, setup, threshold_at


def test_auto_is_resolved_to_numbers_block_by_block():
    backbone, dataset, batch = setup()
    model = backbone.model
    numbers = {1: threshold_at(model, batch, "key", 0.3, 1), 2: threshold_at(model, batch, "key", 0.2)}
    variants = {"auto": ITAE(), "deep": ITAE(blocks=3), "fixed": ITAE(threshold=numbers[2]), "baseline": None}
    fits = {(block - 3, source): ThresholdFit(numbers.get(block), 0.1, 5.0, "made", np.empty(0))
            for block in range(3) for source in SOURCES}
    features = extract_features(backbone, dataset, variants, thresholds=fits)
    assert features.thresholds == {"auto": (numbers[2],), "deep": (None, numbers[1], numbers[2]),
                                   "fixed": (numbers[2],), "baseline": ()}
    assert np.array_equal(features["auto"], features["fixed"])
    with attenuate(backbone.model, ITAE(threshold=[numbers[1], numbers[2]], blocks=2)):
        expected = backbone.model.forward_features(batch)[:, 0].numpy()
    assert np.abs(features["deep"] - expected).max() < 1e-5


def test_auto_fits_once_and_does_no_harm_where_nothing_is_found(monkeypatch):
    backbone, dataset, _ = setup(count=4)
    calls, fit = [], module.fit_thresholds
    monkeypatch.setattr(module, "fit_thresholds", lambda *args, **options: calls.append(1) or fit(*args, **options))
    features = extract_features(backbone, dataset, {"baseline": None, "a": ITAE(), "b": ITAE("value", blocks=2)})
    assert len(calls) == 1
    assert features.thresholds["b"] == (None, None)  # too few patches to fit
    for name in "ab":
        assert np.array_equal(features[name], features["baseline"])
    extract_features(backbone, dataset, {"fixed": ITAE(threshold=1.0), "oracle-free": None})
    assert len(calls) == 1


def test_oracle_edits_the_backbone_s_true_artifacts():
    backbone, dataset, batch = setup("plain")
    backbone = dataclasses.replace(backbone, truth=FiringRule(0, (5, 6), 0.9))
    variants = {"oracle": ITAE(select="oracle"), "deep": ITAE(select="oracle", blocks=2, rows="all")}
    features = extract_features(backbone, dataset, variants, batch_size=2)
    with backbone.truth.capture(backbone.model) as captured:
        backbone.model(batch)
    assert features.artifact_counts["oracle"].tolist() == captured.mask.sum(1).tolist()
    for name, itae in variants.items():
        with attenuate(backbone.model, itae, truth=backbone.truth):
            expected = backbone.model.forward_features(batch)[:, 0].numpy()
        assert np.abs(features[name] - expected).max() < 1e-5
    with pytest.raises(ItaeError, match="'oracle'"):
        extract_features(setup()[0], dataset, {"oracle": ITAE(select="oracle")})


@pytest.mark.parametrize("structure", ["dinov2", "dinov3", "eva02_split"])
def test_bfloat16_is_close(structure):
    backbone, dataset, batch = setup(structure, count=4)
    variants = {"baseline": None, "itae": ITAE(threshold=threshold_at(backbone.model, batch, "key", 0.3))}
    full = extract_features(backbone, dataset, variants)
    half = extract_features(as_backbone(backbone.model, precision="bf16"), dataset, variants)
    for name in variants:
        lengths = np.linalg.norm(full[name], axis=1) * np.linalg.norm(half[name], axis=1)
        cosine = (full[name] * half[name]).sum(1) / lengths
        assert cosine.min() > 0.99
        assert not np.array_equal(full[name], half[name])


def test_features_that_are_not_finite_name_the_batch():
    backbone, dataset, _ = setup(count=5)

    def spoil(_module, _args, output):
        return output if len(output) == 2 else output * float("nan")

    handle = backbone.model.blocks[0].register_forward_hook(spoil)
    with pytest.raises(ItaeError, match=r"'baseline'.* images 4 to 4"):
        extract_features(backbone, dataset, {"baseline": None}, batch_size=2)
    handle.remove()


def test_more_blocks_than_the_model_has_are_refused():
    backbone, dataset, _ = setup()
    with pytest.raises(ItaeError, match="blocks=4"):
        extract_features(backbone, dataset, {"deep": ITAE(threshold=1.0, blocks=4)})


@pytest.mark.parametrize("variants", [{}, ["baseline"], "baseline", ITAE(threshold=1.0)])
def test_variants_without_names_are_refused(variants):
    backbone, dataset, _ = setup()
    with pytest.raises(ItaeError, match=re.escape(f"variants={variants!r}")):
        extract_features(backbone, dataset, variants)


def test_settings_are_recorded():
    backbone, dataset, _ = setup()
    features = extract_features(backbone, dataset, {"baseline": None}, batch_size=4)
    assert features.settings == {"backbone": "tiny", "device": "cpu", "precision": "fp32", "batch_size": 4,
                                 "store": None}
    assert len(features) == 1
