import dataclasses

import numpy as np
import pytest

from itae_utils.errors import ItaeError
from itae_utils.extraction.observation import observe
from itae_utils.method.artifacts import FiringRule, qkv_norms, token_norms
from itae_utils.method.attention import attention_map
from itae_utils.method.setting import ITAE, SOURCES
from itae_utils.models.preprocessing import DevicePreprocessing
from tests.conftest import MadeDataset, as_backbone, dataset_tensor, threshold_at, tiny_vit


@pytest.mark.parametrize("structure", ["plain", "registers", "qk_norm", "one_block", "dinov3", "eva02_fused",
                                       "rope_mixed"])
def test_one_pass_shows_what_the_single_functions_show(structure):
    model = tiny_vit(structure)
    backbone, dataset = as_backbone(model), MadeDataset(7)
    batch = dataset_tensor(backbone, dataset)
    itae = ITAE("key", threshold_at(model, batch, "key", 0.3), "mask")
    seen = observe(backbone, dataset, itae, batch_size=3)
    assert seen.indices.tolist() == list(range(7))
    assert seen.patch_grid == (4, 4)
    assert np.allclose(seen.hidden_norms, token_norms(model, batch).flatten(2), atol=1e-4)
    for source in SOURCES:
        assert np.allclose(seen.norms[source], qkv_norms(model, batch)[source].flatten(1), atol=1e-4)
    assert np.allclose(seen.attention, attention_map(model, batch).flatten(1), atol=1e-6)
    assert np.allclose(seen.attention_after, attention_map(model, batch, itae=itae).flatten(1), atol=1e-6)
    assert np.array_equal(seen.artifacts, seen.norms["key"] <= itae.threshold)
    assert seen.truth is None


def test_without_a_setting_nothing_is_marked():
    backbone, dataset = as_backbone(tiny_vit()), MadeDataset(4)
    for setting in (None, ITAE(threshold=(None,))):
        seen = observe(backbone, dataset, setting)
        assert not seen.artifacts.any()
        assert np.array_equal(seen.attention, seen.attention_after)


def test_a_sample_and_its_truth():
    model = tiny_vit()
    backbone = dataclasses.replace(as_backbone(model), truth=FiringRule(0, (5, 6), 0.9))
    dataset = MadeDataset(12)
    whole = observe(backbone, dataset, ITAE(select="oracle"))
    some = observe(backbone, dataset, sample=5, seed=2)
    assert len(some.indices) == 5
    assert np.array_equal(some.truth, whole.truth[some.indices])
    assert np.array_equal(whole.artifacts, whole.truth)
    assert 0 < whole.truth.mean() < 1


def test_images_come_as_the_backbone_says(monkeypatch):
    prepared, prepare = [], DevicePreprocessing.__call__
    monkeypatch.setattr(DevicePreprocessing, "__call__",
                        lambda self, pixels: prepared.append(len(pixels.shapes)) or prepare(self, pixels))
    by_pil, dataset = as_backbone(tiny_vit()), MadeDataset(5, size=30)
    seen = observe(by_pil, dataset)
    by_workers = observe(by_pil, dataset, num_workers=1)
    on_device = observe(dataclasses.replace(by_pil, resize="device"), dataset)
    assert np.array_equal(seen.hidden_norms, by_workers.hidden_norms)
    assert np.allclose(seen.hidden_norms, on_device.hidden_norms, rtol=0.05)
    assert prepared == [5]


def test_deep_settings_are_refused():
    with pytest.raises(ItaeError, match="blocks=2"):
        observe(as_backbone(tiny_vit()), MadeDataset(2), ITAE(threshold=1.0, blocks=2))
