import dataclasses

import numpy as np
import pytest

from itae_utils.data.datasets import load_dataset
from itae_utils.errors import ItaeError
from itae_utils.extraction import observation
from itae_utils.extraction.observation import fit_thresholds, measure_batch, observe, sample_indices, sampled_norms
from itae_utils.method.artifacts import FiringRule, qkv_norms, token_norms
from itae_utils.method.attention import attention_map
from itae_utils.method.one_pass import OnePass
from itae_utils.method.setting import ITAE, SOURCES
from itae_utils.models.backbones import load_backbone
from itae_utils.models.preprocessing import Preprocessing
from tests import reference
from tests.conftest import EVA_STRUCTURES, MadeDataset, as_backbone, setup, threshold_at, tiny_vit

# --- observe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["plain", "registers", "qk_norm", "one_block", "dinov3", "eva02_fused",
                                       "rope_mixed"])
def test_one_pass_measures_what_the_single_functions_measure(structure):
    backbone, dataset, batch = setup(structure, count=7)
    model = backbone.model
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


def test_without_a_threshold_no_patch_is_an_artifact():
    backbone, dataset = as_backbone(tiny_vit()), MadeDataset(4)
    for setting in (None, ITAE(threshold=(None,))):
        seen = observe(backbone, dataset, setting)
        assert not seen.artifacts.any()
        assert np.array_equal(seen.attention, seen.attention_after)


def test_the_true_artifacts_of_a_sample():
    backbone, dataset, _ = setup("plain", count=12)
    backbone = dataclasses.replace(backbone, truth=FiringRule(0, (5, 6), 0.9))
    whole = observe(backbone, dataset, ITAE(select="oracle"))
    some = observe(backbone, dataset, sample=5, seed=2)
    assert len(some.indices) == 5
    assert np.array_equal(some.truth, whole.truth[some.indices])
    assert np.array_equal(whole.artifacts, whole.truth)
    assert 0 < whole.truth.mean() < 1


def test_a_sampled_image_gets_the_random_patches_of_the_whole_data_set():
    backbone, dataset, batch = setup(count=12)
    itae = ITAE(threshold=threshold_at(backbone.model, batch, "key", 0.3), select="random", seed=4)
    whole, some = observe(backbone, dataset, itae), observe(backbone, dataset, itae, sample=5, seed=2, batch_size=2)
    assert some.indices.tolist() != list(range(5))
    assert np.array_equal(some.artifacts, whole.artifacts[some.indices])
    assert np.allclose(some.attention_after, whole.attention_after[some.indices], atol=1e-6)
    _, extracted = OnePass(backbone.model, {"random": itae})(batch, 0)["random"]
    assert np.array_equal(whole.artifacts, extracted)


def test_settings_of_several_blocks_are_refused():
    with pytest.raises(ItaeError, match="blocks=2"):
        observe(as_backbone(tiny_vit()), MadeDataset(2), ITAE(threshold=1.0, blocks=2))


def test_measuring_a_trainable_model_records_no_gradients():
    backbone, _, batch = setup()
    backbone.model.requires_grad_(True)
    assert not any(values.requires_grad for values in measure_batch(backbone, batch).values())


# --- samples and their norms ------------------------------------------------------------------------------------------

def test_a_sample_is_seeded_sorted_and_at_most_the_whole():
    assert sample_indices(5, 10, 0).tolist() == [0, 1, 2, 3, 4]
    first, again, other = (sample_indices(1000, 50, seed).tolist() for seed in (1, 1, 2))
    assert first == again == sorted(set(first))
    assert first != other
    assert len(first) == 50
    for sample in (0, -3):
        with pytest.raises(ItaeError, match=f"sample={sample}"):
            sample_indices(5, sample, 0)


@pytest.mark.parametrize("structure", ["registers", *EVA_STRUCTURES])
def test_norms_of_every_block_and_source(structure):
    backbone, dataset, batch = setup(structure, count=20)
    sampled = sampled_norms(backbone, dataset, sample=7, seed=3, batch_size=4)
    x, options = reference.embedded(backbone.model, batch[sample_indices(20, 7, 3)])
    for index, block in enumerate(backbone.model.blocks):
        qkv = reference.projected(block.attn, block.norm1(x))[:, backbone.model.num_prefix_tokens:]
        for source, part in zip(SOURCES, qkv.split(24, dim=-1), strict=True):
            assert np.allclose(sampled[index, source], part.square().sum(-1).sqrt(), atol=1e-4)
        x = block(x, **options[index])


def test_images_are_loaded_and_resized_as_asked(monkeypatch):
    dataset, by_pil = MadeDataset(20, size=30), as_backbone(tiny_vit())
    on_device = dataclasses.replace(by_pil, resize="device")

    def measured(backbone, **options):
        options |= {"sample": 7, "seed": 3, "batch_size": 4}
        norms = sampled_norms(backbone, dataset, **options)
        return np.concatenate([*norms.values(), *observe(backbone, dataset, **options).norms.values()])

    expected = measured(by_pil)
    assert np.array_equal(measured(by_pil, num_workers=1), expected)
    monkeypatch.setattr(Preprocessing, "__call__", lambda *_: pytest.fail("resized one by one"))
    assert np.allclose(measured(on_device), expected, rtol=0.05)


# --- θ ----------------------------------------------------------------------------------------------------------------

def test_every_block_and_source_is_measured_and_no_hook_is_left():
    model = tiny_vit()
    fits = fit_thresholds(as_backbone(model), MadeDataset(20), sample=8)
    assert fits.seconds > 0
    assert {key: fit.norms.shape for key, fit in fits.items()} == {
        (block, source): (8, 16) for block in range(3) for source in SOURCES}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("structure", ["registers", "dinov2", "qk_norm"])
def test_no_threshold_is_found_in_random_models(structure):
    fits = fit_thresholds(as_backbone(tiny_vit(structure)), MadeDataset(200))
    assert all(fit.norms.size == 3200 for fit in fits.values())
    assert {key: fit.reason for key, fit in fits.items() if fit.threshold is not None} == {}


def test_norms_are_measured_once_for_the_same_sample(tmp_path, monkeypatch):
    """A second fit with the same store runs no image; another sample, seed or batch size does."""
    dataset, backbone = load_dataset("digits", limit=80), load_backbone("demo")
    images, run = [], observation.block_inputs
    monkeypatch.setattr(observation, "block_inputs", lambda model, batch, blocks: images.append(len(batch)) or run(
        model, batch, blocks))

    def fit(**options):
        return fit_thresholds(backbone, dataset, **{"sample": 60, "batch_size": 30, "store": tmp_path} | options)

    plain, first, again = fit(store=None), fit(), fit()
    assert sum(images) == 120
    for key in plain:
        assert np.array_equal(plain[key].norms, again[key].norms)
        assert plain[key].threshold == first[key].threshold == again[key].threshold
        assert plain[key].norms.shape == (60, 49)
    for options in ({"sample": 50}, {"seed": 1}, {"batch_size": 20}):
        images.clear()
        fit(**options)
        assert sum(images) == options.get("sample", 60)
