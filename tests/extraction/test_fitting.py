import dataclasses

import numpy as np
import pytest
import torch

from itae_utils.data.datasets import load_dataset
from itae_utils.errors import ItaeError
from itae_utils.extraction import fitting
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.fitting import fit_setting, fit_thresholds, sampled_statistics
from itae_utils.extraction.observation import observe, sample_indices
from itae_utils.method.artifacts import FiringRule
from itae_utils.method.attention import attenuate
from itae_utils.method.setting import ITAE, SOURCES
from itae_utils.models.backbones import load_backbone
from itae_utils.models.preprocessing import Preprocessing
from tests import reference
from tests.conftest import (
    EVA_STRUCTURES,
    MadeDataset,
    array_dataset,
    as_backbone,
    dataset_tensor,
    setup,
    sources_of,
    statistic,
    threshold_at,
    tiny_vit,
)


def hook_count(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# --- statistics of a sample -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("structure", ["registers", "swiglu", *EVA_STRUCTURES])
def test_every_statistic_of_every_block(structure):
    backbone, dataset, batch = setup(structure, count=20)
    model, batch = backbone.model, batch[sample_indices(20, 7, 3)]
    sampled = sampled_statistics(backbone, dataset, sample=7, seed=3, batch_size=4)
    assert set(sampled) == {(block, source) for block in range(3) for source in sources_of(model)} - {(0, "direction")}
    x, options = reference.embedded(model, batch)
    for index, block in enumerate(model.blocks):
        for source in [source for number, source in sampled if number == index]:
            directions = reference.singular_directions(model, index) if source == "direction" else None
            expected = reference.statistic(source, block, x, model.num_prefix_tokens, directions=directions,
                                           **options[index])
            assert np.allclose(sampled[index, source], expected, rtol=1e-5, atol=1e-5), (index, source)
        x = block(x, **options[index])


def test_images_are_loaded_and_resized_as_asked(monkeypatch):
    dataset, by_pil = MadeDataset(20, size=30), as_backbone(tiny_vit())
    on_device = dataclasses.replace(by_pil, resize="device")

    def measured(backbone, **options):
        options |= {"sample": 7, "seed": 3, "batch_size": 4}
        statistics = sampled_statistics(backbone, dataset, **options)
        seen = observe(backbone, dataset, **options).statistics
        return np.concatenate([*statistics.values(), *seen.values()])

    expected = measured(by_pil)
    assert np.array_equal(measured(by_pil, num_workers=1), expected)
    monkeypatch.setattr(Preprocessing, "__call__", lambda *_: pytest.fail("resized one by one"))
    assert np.allclose(measured(on_device), expected, rtol=0.05)


# --- θ ----------------------------------------------------------------------------------------------------------------

def test_every_block_and_source_is_measured_and_no_hook_is_left():
    model = tiny_vit()
    fits = fit_thresholds(as_backbone(model), MadeDataset(20), sample=8)
    assert fits.seconds > 0
    assert {key: fit.values.shape for key, fit in fits.items()} == {
        (block, source): (8, 16) for block in range(3) for source in SOURCES if (block, source) != (0, "direction")}
    assert hook_count(model) == 0


@pytest.mark.parametrize("structure", ["registers", "dinov2", "qk_norm"])
def test_no_threshold_is_found_in_random_models(structure):
    fits = fit_thresholds(as_backbone(tiny_vit(structure)), MadeDataset(200))
    assert all(fit.values.size == 3200 for fit in fits.values())
    assert {key: fit.reason for key, fit in fits.items() if fit.threshold is not None} == {}


def test_statistics_are_measured_once_for_the_same_sample(tmp_path, monkeypatch):
    """A second fit with the same store runs no image; another sample, seed or batch size does."""
    dataset, backbone = load_dataset("digits", limit=80), load_backbone("demo")
    images, run = [], fitting.block_inputs
    monkeypatch.setattr(fitting, "block_inputs", lambda model, batch, blocks: images.append(len(batch)) or run(
        model, batch, blocks))

    def fit(**options):
        return fit_thresholds(backbone, dataset, **{"sample": 60, "batch_size": 30, "store": tmp_path} | options)

    plain, first, again = fit(store=None), fit(), fit()
    assert sum(images) == 120
    for key in plain:
        assert np.array_equal(plain[key].values, again[key].values)
        assert plain[key].threshold == first[key].threshold == again[key].threshold
        assert plain[key].values.shape == (60, 49)
    for options in ({"sample": 50}, {"seed": 1}, {"batch_size": 20}, {"rank": 2}):
        images.clear()
        fit(**options)
        assert sum(images) == options.get("sample", 60)


# --- numbers and substitutes for a setting ----------------------------------------------------------------------------

@pytest.mark.parametrize("source", SOURCES)
def test_a_rule_becomes_one_number_per_block_of_the_sample(source):
    backbone, dataset, batch = setup("registers", count=20)
    chosen = batch[sample_indices(20, 7, 3)]
    for rule, number in [("share:10%", lambda x, low: np.quantile(x, 0.1 if low else 0.9)),
                         ("sd:1.5", lambda x, low: x.mean() + (-1.5 if low else 1.5) * x.std())]:
        asked = ITAE(source, rule, blocks=2)
        found = fit_setting(backbone, dataset, asked, sample=7, seed=3, batch_size=4)
        values = [statistic(backbone.model, chosen, source, block).double().numpy() for block in (-2, -1)]
        assert found.threshold == pytest.approx(tuple(number(x, asked.side == "low") for x in values), rel=1e-5)
        assert found == dataclasses.replace(asked, threshold=found.threshold)
    assert fit_setting(backbone, dataset, ITAE(source)).threshold == (None,)  # too few patches for a valley


def test_given_fits_are_used_and_must_be_of_the_setting_s_rank():
    backbone, dataset, batch = setup(count=6)
    fits = fit_thresholds(backbone, dataset, sample=2, seed=5, rank=2)
    found = fit_setting(backbone, dataset, ITAE("direction", "share:20%", rank=2), thresholds=fits)
    values = statistic(backbone.model, batch[sample_indices(6, 2, 5)], "direction", rank=2).double().numpy()
    assert found.threshold == (pytest.approx(np.quantile(values, 0.8), rel=1e-5),)
    with pytest.raises(ItaeError, match=r"rank=1.*rank=2"):
        fit_setting(backbone, dataset, ITAE("direction", "share:20%"), thresholds=fits)


@pytest.mark.parametrize("structure", ["registers", "dinov3_qkvb", "eva02_split"])
def test_a_substitute_has_the_mean_value_of_the_artifacts_in_the_sample(structure):
    backbone, dataset, batch = setup(structure, count=20)
    model, batch = backbone.model, batch[sample_indices(20, 7, 3)]
    thresholds = [threshold_at(model, batch, "token", 0.2, block) for block in (-2, -1)]
    itae = fit_setting(backbone, dataset, ITAE("token", thresholds, "substitute", blocks=2), sample=7, seed=3,
                       batch_size=3)
    x, options = reference.embedded(model, batch)
    for index, block in enumerate(model.blocks):
        if index > 0:
            values = reference.projected(block.attn, block.norm1(x))[:, :, 48:]
            sets = reference.artifact_sets(reference.statistic("token", block, x, model.num_prefix_tokens),
                                           thresholds[index - 1], "high", model.num_prefix_tokens)
            written = [values[image, token] for image, tokens in enumerate(sets) for token in tokens]
            assert 10 < len(written) < 40
            substitute = torch.tensor(itae.substitutes[index - 1]).expand(1, 1, 24)
            found = reference.projected(block.attn, substitute)[0, 0, 48:]
            assert torch.allclose(found, sum(written) / len(written), atol=1e-5)
        x = block(x, **options[index])
    assert hook_count(model) == 0


def test_extraction_fits_substitutes_by_itself_and_with_each_other():
    """The values are measured once for all settings, at their own thresholds."""
    backbone, dataset, batch = setup(count=6)
    model = backbone.model
    theta = threshold_at(model, batch, "attention", 0.2)
    asked = {"a": ITAE("attention", theta, "substitute"), "b": ITAE("token", "share:20%", "substitute", blocks=2),
             "high keys": ITAE("key", "sd:1", tail="high"),
             "random": ITAE("attention", theta, "substitute", select="random"), "baseline": None,
             "first": ITAE("attention", (None, theta), "substitute", blocks=2)}
    features = extract_features(backbone, dataset, asked)
    for name, itae in asked.items():
        if itae is not None:
            fitted = fit_setting(backbone, dataset, itae)
            assert features.variants[name] == fitted
            with attenuate(model, fitted):
                assert np.abs(features[name] - model(batch).numpy()).max() < 1e-5, name
            assert np.abs(features[name] - features["baseline"]).max() > 1e-4, name
    vectors = {name: itae.substitutes for name, itae in features.variants.items() if itae is not None}
    assert vectors["first"] == (None, *vectors["a"])
    assert vectors["random"] != vectors["a"]
    keys = statistic(model, batch, "key").double().numpy()
    assert features.thresholds["high keys"] == (pytest.approx(keys.mean() + keys.std(), rel=1e-5),)


def test_true_artifacts_can_be_substituted():
    backbone, dataset, batch = setup("plain", count=6)
    backbone = dataclasses.replace(backbone, truth=FiringRule(0, (5, 6), 0.9))
    itae = fit_setting(backbone, dataset, ITAE(attenuation="substitute", select="oracle"))
    truth = torch.from_numpy(observe(backbone, dataset).truth)
    tokens, _ = reference.embedded(backbone.model, batch)
    for block in backbone.model.blocks[:2]:
        tokens = block(tokens)
    expected = backbone.model.blocks[2].norm1(tokens)[:, 1:][truth].mean(0)
    assert torch.allclose(torch.tensor(itae.substitutes[0]), expected, atol=1e-5)


def test_without_artifacts_in_the_sample_there_is_no_substitute():
    backbone, dataset, _ = setup(count=4)
    with pytest.raises(ItaeError, match=r"no patch of the sample.* 0\.99") as error:
        fit_setting(backbone, dataset, ITAE("attention", 0.99, "substitute"))
    assert "\n" not in str(error.value)
    nothing = fit_setting(backbone, dataset, ITAE("key", "auto", "substitute"))
    assert (nothing.threshold, nothing.substitutes) == ((None,), (None,))
    features = extract_features(backbone, dataset, {"it": nothing, "baseline": None})
    assert np.array_equal(features["it"], features["baseline"])


def test_substitutes_are_measured_once_for_the_same_sample(tmp_path, monkeypatch):
    backbone, dataset = as_backbone(tiny_vit()), array_dataset(12)
    asked = ITAE("attention", threshold_at(backbone.model, dataset_tensor(backbone, dataset), "attention", 0.2),
                 "substitute")
    passes, visit = [], fitting._visit
    monkeypatch.setattr(fitting, "_visit", lambda *args, **options: passes.append(1) or visit(*args, **options))

    others = [({}, 1), ({}, 1), ({"seed": 1, "sample": 6}, 2),
              ({"itae": dataclasses.replace(asked, threshold=asked.threshold * 0.9)}, 3)]
    found = []
    for options, count in others:
        found.append(fit_setting(backbone, dataset, store=tmp_path, **{"itae": asked} | options).substitutes)
        assert len(passes) == count
    assert found[0] == found[1]
    assert len(set(found)) == 3


@pytest.mark.parametrize("itae", [ITAE("direction", "share:2%", blocks=3), ITAE(blocks=4), "min", None])
def test_settings_that_the_model_can_t_run_are_refused(itae):
    backbone, dataset, _ = setup()
    with pytest.raises(ItaeError, match=r"(blocks|itae)="):
        fit_setting(backbone, dataset, itae)


def test_no_hook_is_left_after_a_failed_pass():
    backbone, dataset, _ = setup()
    backbone.model.blocks[1].mlp.fc1 = torch.nn.Linear(5, 5)
    for asked in (ITAE("token", "share:2%", blocks=2), ITAE("token", 1.0, "substitute", blocks=2)):
        with pytest.raises(RuntimeError):
            fit_setting(backbone, dataset, asked)
    assert hook_count(backbone.model) == 0
