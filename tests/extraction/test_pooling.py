import dataclasses

import numpy as np
import pytest
import torch

from itae_utils.errors import ItaeError
from itae_utils.extraction import pooling
from itae_utils.extraction.pooling import NO_PATCHES, pooled_features
from itae_utils.method.artifacts import FiringRule
from itae_utils.method.attention import attention_map, attenuate
from itae_utils.method.one_pass import OnePass
from itae_utils.method.setting import ITAE
from itae_utils.store.store import open_store
from tests import reference
from tests.conftest import (
    EVA_STRUCTURES,
    STRUCTURES,
    array_dataset,
    as_backbone,
    images,
    setup,
    statistic,
    threshold_at,
    tiny_vit,
)


def slow_means(model, batch, artifacts) -> np.ndarray:
    """Return the mean over the patches outside `artifacts` (B, N), or over all if none is left, one by one."""
    with torch.no_grad():
        tokens = model.forward_features(batch)
    means = []
    for image, found in zip(tokens, artifacts, strict=True):
        patches = list(image[model.num_prefix_tokens:])
        kept = [patch for patch, artifact in zip(patches, found, strict=True) if not artifact] or patches
        means.append(model.fc_norm(sum(kept) / len(kept)))
    return torch.stack(means).numpy()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_means_of_stock_tokens(structure):
    backbone, dataset, batch = setup(structure, count=5)
    theta = threshold_at(backbone.model, batch, "key", 0.3)
    pooled = pooled_features(backbone, dataset, ITAE("key", theta), batch_size=2)
    artifacts = statistic(backbone.model, batch, "key") <= theta
    stock = backbone.model
    stock.global_pool = "avg"
    np.testing.assert_allclose(pooled["mean"], stock(batch), atol=1e-5)
    np.testing.assert_allclose(pooled["mean_normal"], slow_means(stock, batch, artifacts), atol=1e-5)
    assert np.abs(pooled["mean"] - pooled["mean_normal"]).max() > 1e-3
    assert {values.dtype for values in pooled.values()} == {np.dtype("float32")}


def test_an_image_without_artifacts_or_of_artifacts_alone_keeps_the_mean_of_all():
    backbone, dataset, batch = setup("registers", count=6)
    norms = statistic(backbone.model, batch, "token")
    by_least = norms.amin(dim=1).sort().values
    theta = float((by_least[-1] + by_least[-2]) / 2)  # at or above it: all patches of one image
    of_one = pooled_features(backbone, dataset, ITAE("token", theta))
    counts = (norms >= theta).sum(dim=1)
    assert sorted(counts.tolist())[-1] == 16 > sorted(counts.tolist())[-2] > 0
    equal = (of_one["mean"] == of_one["mean_normal"]).all(axis=1)
    assert equal.tolist() == (counts == 16).tolist()
    for none in (ITAE("token", (None,)), ITAE("key", 0.0)):
        pooled = pooled_features(backbone, dataset, none)
        assert np.array_equal(pooled["mean"], pooled["mean_normal"])


@pytest.mark.parametrize("select", ["random", "oracle"])
def test_controls_pool_the_patches_that_an_extraction_attenuates(select):
    backbone, dataset, batch = setup("plain", count=7)
    backbone = dataclasses.replace(backbone, truth=FiringRule(0, (5, 6), 0.9))
    itae = ITAE("key", threshold_at(backbone.model, batch, "key", 0.3), select=select, seed=4)
    _, artifacts = OnePass(backbone.model, {"it": itae}, backbone.truth)(batch, 0)["it"]
    assert artifacts.any()
    found = pooled_features(backbone, dataset, itae, batch_size=3)["mean_normal"]
    np.testing.assert_allclose(found, slow_means(backbone.model, batch, artifacts), atol=1e-5)


def test_means_are_stored_by_what_decides_them(tmp_path, monkeypatch):
    calls, run = [], pooling.measured_batches
    monkeypatch.setattr(pooling, "measured_batches", lambda *args, **named: calls.append(1) or run(*args, **named))
    backbone, dataset = as_backbone(tiny_vit()), array_dataset(6)
    settings = [ITAE("key", theta) for theta in (2.0, 3.0)]
    first = [pooled_features(backbone, dataset, itae, store=tmp_path) for itae in settings]
    again = [pooled_features(backbone, dataset, itae, store=open_store(tmp_path)) for itae in settings]
    assert len(calls) == 2
    for one, other in zip(first, again, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in ("mean", "mean_normal"))
    pooled_features(backbone, array_dataset(6, seed=1), settings[0], store=tmp_path)
    assert len(calls) == 3


@pytest.mark.parametrize(("itae", "named"), [
    (ITAE(threshold=1.0, blocks=2), "blocks=2"), (ITAE(), "threshold='auto'"), (ITAE(select="oracle"), "truth="),
    (None, "itae=None"),
])
def test_settings_that_say_no_artifacts_are_refused(itae, named):
    with pytest.raises(ItaeError, match=named) as raised:
        pooled_features(as_backbone(tiny_vit()), array_dataset(2), itae)
    assert "\n" not in str(raised.value)


# --- no patches -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("structure", ["plain", "registers", "swiglu", *EVA_STRUCTURES])
def test_without_patches_cls_attends_to_prefix_tokens_alone(structure):
    model, batch = tiny_vit(structure), images(5)
    patches = {token + model.num_prefix_tokens for token in range(16)}
    expected = reference.forward(model, batch, NO_PATCHES, artifacts={2: [patches] * 5})
    output, artifacts = OnePass(model, {"none": NO_PATCHES})(batch, 0)["none"]
    assert artifacts.all()
    assert (output - model.fc_norm(expected[:, 0])).abs().max() < 1e-5
    with attenuate(model, NO_PATCHES):
        assert (model.forward_features(batch) - expected).abs().max() < 1e-5
    assert not attention_map(model, batch, itae=NO_PATCHES).any()
