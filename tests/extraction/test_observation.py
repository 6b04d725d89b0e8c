import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest

from itae_utils.errors import ItaeError
from itae_utils.extraction.neurons import find_register_neurons
from itae_utils.extraction.observation import measure_batch, observe, observe_attention, observe_rows, sample_indices
from itae_utils.method.anatomy import tokens_entering
from itae_utils.method.artifacts import FiringRule
from itae_utils.method.attention import attention_map
from itae_utils.method.one_pass import OnePass
from itae_utils.method.register_setting import TestTimeRegisters
from itae_utils.method.registers import apply_registers, has_registers
from itae_utils.method.setting import ITAE
from itae_utils.method.statistics import token_norms
from tests import reference
from tests.conftest import MadeDataset, as_backbone, setting, setup, sources_of, statistic, threshold_at, tiny_vit

# --- observe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["plain", "registers", "qk_norm", "one_block", "swiglu", "dinov3", "eva02_fused",
                                       "rope_mixed"])
def test_one_pass_measures_what_the_single_functions_measure(structure):
    backbone, dataset, batch = setup(structure, count=7)
    model = backbone.model
    itae = ITAE("key", threshold_at(model, batch, "key", 0.3), "mask")
    seen = observe(backbone, dataset, itae, batch_size=3)
    assert seen.indices.tolist() == list(range(7))
    assert seen.patch_grid == (4, 4)
    assert np.allclose(seen.hidden_norms, token_norms(model, batch).flatten(2), atol=1e-4)
    assert list(seen.statistics) == sources_of(model)
    for source, values in seen.statistics.items():
        assert np.allclose(values, statistic(model, batch, source), atol=1e-4), source
    assert np.array_equal(seen.statistics["attention"], seen.attention)
    assert np.allclose(seen.attention, attention_map(model, batch).flatten(1), atol=1e-6)
    assert np.allclose(seen.attention_after, attention_map(model, batch, itae=itae).flatten(1), atol=1e-6)
    assert np.array_equal(seen.artifacts, seen.statistics["key"] <= itae.threshold)
    assert seen.truth is None


@pytest.mark.parametrize(("structure", "block"), [
    ("registers", -1), ("qk_norm", -1), ("one_block", -1), ("dinov3", -1), ("registers", 0), ("registers", 1),
    ("dinov3", 1)])
def test_the_rows_of_chosen_images(structure, block):
    backbone, dataset, batch = setup(structure, count=7)
    kept = []
    rows = observe_rows(backbone, dataset, np.array([1, 4, 5]), block=block, kept=kept, batch_size=2)
    assert rows.indices.tolist() == [1, 4, 5]
    assert list(rows.statistics) == [name for name in sources_of(backbone.model) if (name, block) != ("direction", 0)]
    for source, values in rows.statistics.items():
        assert np.allclose(values, statistic(backbone.model, batch, source, block)[[1, 4, 5]], atol=1e-4), source
    weights = np.exp(rows.logits) / np.exp(rows.logits).sum(axis=-1, keepdims=True)
    expected = attention_map(backbone.model, batch, block, heads="each").flatten(2)[[1, 4, 5]]
    assert np.allclose(weights[:, :, -16:], expected, atol=1e-6)
    index = range(backbone.num_blocks)[block]
    entered = tokens_entering(backbone.model, batch[[1, 4, 5]], [index])[index]
    assert np.allclose(np.concatenate([inputs.tokens for inputs in kept]), entered, atol=1e-5)


@pytest.mark.parametrize(("source", "rank", "attenuation"), [
    ("token", 1, "spread"), ("direction", 3, "clip"), ("attention", 1, "substitute"), ("value", 1, "mean")])
def test_artifacts_and_attention_on_the_high_side(source, rank, attenuation):
    backbone, dataset, batch = setup("dinov2", count=5)
    threshold = threshold_at(backbone.model, batch, source, 0.3, side="high", rank=rank)
    itae = setting(source, threshold, attenuation, tail="high", rank=rank)
    seen = observe(backbone, dataset, itae, batch_size=2)
    assert np.array_equal(seen.artifacts, statistic(backbone.model, batch, source, rank=rank) >= threshold)
    assert np.allclose(seen.attention_after, attention_map(backbone.model, batch, itae=itae).flatten(1), atol=1e-6)


def test_mean_norms_of_the_values_of_artifacts_and_of_others_by_head():
    backbone, dataset, batch = setup("registers", count=4)
    model = backbone.model
    largest = statistic(model, batch, "token").amax(1)
    itae = ITAE("token", float(largest.sort().values[:2].mean()))  # one image has no artifact
    seen = observe(backbone, dataset, itae, batch_size=3)
    tokens, _ = reference.embedded(model, batch)
    for block in model.blocks[:2]:
        tokens = block(tokens)
    last = model.blocks[2]
    qkv = reference.projected(last.attn, last.norm1(tokens))
    assert seen.value_norms.shape == (4, 3, 2)
    for image, head, group in np.ndindex(4, 3, 2):
        _, _, v = reference.one_head(last.attn, qkv[image], head, None)
        norms = [reference.length(v[5 + patch]) for patch in range(16) if seen.artifacts[image, patch] == (group == 0)]
        expected = sum(norms) / len(norms) if norms else np.nan
        assert seen.value_norms[image, head, group] == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert np.isnan(seen.value_norms[:, 0, 0]).sum() == 1


def test_without_a_threshold_no_patch_is_an_artifact():
    backbone, dataset = as_backbone(tiny_vit()), MadeDataset(4)
    for itae in (None, ITAE(threshold=(None,))):
        seen = observe(backbone, dataset, itae)
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


# --- attention under variants -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("structure", ["registers", "swiglu", "dinov3"])
def test_the_attention_under_each_variant_is_that_of_one_image_after_another(structure):
    backbone, dataset, batch = setup(structure, count=7)
    model, units = backbone.model, {1: (1, 4, 20)}
    forms = {"start": TestTimeRegisters(units), "late": TestTimeRegisters(units, insert="late"),
             "bias": find_register_neurons(backbone, dataset, TestTimeRegisters(units, form="bias")),
             "zero": TestTimeRegisters(units, form="zero")}
    parts = {"baseline": (None, None)} | {name: (form, None) for name, form in forms.items()}
    for name, form in (("itae", None), ("start and itae", forms["start"])):
        with apply_registers(model, form) if form else nullcontext():
            parts[name] = form, ITAE("key", threshold_at(model, batch, "key", 0.3), "mask")
    variants = {name: itae if form is None else dataclasses.replace(form, then=itae)
                for name, (form, itae) in parts.items()}
    maps = observe_attention(backbone, dataset, variants, np.array([1, 2, 4, 6]), batch_size=3)
    assert not has_registers(model)
    assert list(maps) == list(variants)
    for name, (form, itae) in parts.items():
        assert maps[name].shape == (4, 4, 4)
        for found, index in zip(maps[name], (1, 2, 4, 6), strict=True):
            with apply_registers(model, form) if form else nullcontext():
                expected = attention_map(model, batch[index][None], itae=itae)[0]
            assert np.abs(found - expected.numpy()).max() < 1e-5, name
        others = [other for other in maps if other != name]
        assert min(np.abs(maps[name] - maps[other]).max() for other in others) > 1e-4, name


# --- samples ----------------------------------------------------------------------------------------------------------

def test_a_sample_is_seeded_sorted_and_at_most_the_whole():
    assert sample_indices(5, 10, 0).tolist() == [0, 1, 2, 3, 4]
    first, again, other = (sample_indices(1000, 50, seed).tolist() for seed in (1, 1, 2))
    assert first == again == sorted(set(first))
    assert first != other
    assert len(first) == 50
    for sample in (0, -3):
        with pytest.raises(ItaeError, match=f"sample={sample}"):
            sample_indices(5, sample, 0)
