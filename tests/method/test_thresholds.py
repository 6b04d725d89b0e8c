import dataclasses

import numpy as np
import pytest
import torch

from itae_utils.data.datasets import load_dataset
from itae_utils.errors import ItaeError
from itae_utils.extraction.observation import fit_thresholds, sample_indices, sampled_norms
from itae_utils.method.setting import SOURCES
from itae_utils.method.thresholds import fit_threshold
from itae_utils.models.backbones import load_backbone
from itae_utils.models.preprocessing import DevicePreprocessing
from tests import reference
from tests.conftest import EVA_STRUCTURES, MadeDataset, as_backbone, dataset_tensor, tiny_vit


def mixture(rng, size, share, gap, sigma=0.1, low_sigma=0.1):
    """Log-normal norms with a low mode `gap` standard deviations below the high one; and which are of the low mode."""
    low = rng.random(size) < share
    logs = np.where(low, rng.normal(2 - gap * sigma, low_sigma, size), rng.normal(2, sigma, size))
    return np.exp(logs), low


@pytest.mark.parametrize("share", [0.001, 0.003, 0.02, 0.1, 0.2])
@pytest.mark.parametrize("size", [20_000, 100_000])
def test_two_modes_are_told_apart(share, size):
    norms, low = mixture(np.random.default_rng(1), size, share, gap=10)
    fit = fit_threshold(norms)
    found = norms <= fit.threshold
    assert (found & low).sum() / found.sum() > 0.99
    assert (found & low).sum() / low.sum() > 0.99
    assert abs(fit.share - share) < 0.2 * share + 1e-4
    assert fit.separation > 5
    assert "two modes" in fit.reason


def test_a_rare_mode_under_a_skewed_bulk_is_found():
    rng = np.random.default_rng(2)
    bulk = rng.gamma(9, 1.0, 100_000)  # skewed to the right, and in the log to the left
    norms = np.concatenate([bulk, rng.normal(0.05, 0.005, 300)])
    fit = fit_threshold(norms)
    assert 0.07 < fit.threshold < bulk.min()


def test_a_bulk_with_a_tail_towards_the_artifacts_does_not_hide_them():
    """The likeliest two normals split such a bulk; the fit that separates the modes is likely enough."""
    rng = np.random.default_rng(8)
    low = rng.random(25_000) < 0.02
    logs = np.where(low, rng.normal(-1.0, 0.1, 25_000), 0.05 * (4 - rng.gamma(4, 1, 25_000)))
    found = np.exp(logs) <= fit_threshold(np.exp(logs)).threshold
    assert (found == low).mean() > 0.999


@pytest.mark.parametrize("low_sigma", [0.02, 0.3])
def test_modes_of_unequal_width(low_sigma):
    norms, low = mixture(np.random.default_rng(3), 50_000, 0.03, gap=20, low_sigma=low_sigma)
    found = norms <= fit_threshold(norms).threshold
    assert (found == low).mean() > 0.9995


UNIMODAL = {
    "normal": lambda rng, n: rng.normal(10, 1, n).clip(0),
    "lognormal": lambda rng, n: rng.lognormal(1, 0.5, n),
    "gamma": lambda rng, n: rng.gamma(2, 1, n),
    "exponential": lambda rng, n: rng.exponential(1, n),
    "uniform": lambda rng, n: rng.uniform(1, 2, n),
    "uniform from 0": lambda rng, n: rng.uniform(0, 1, n),
    "weibull, long low tail in the log": lambda rng, n: rng.weibull(1.5, n),
    "beta, long low tail": lambda rng, n: rng.beta(8, 1.5, n),
    "heavy tails": lambda rng, n: np.exp(rng.standard_t(4, n) * 0.2),
    "chi with 64 degrees": lambda rng, n: np.sqrt(rng.chisquare(64, n)),
    "skewed to the left": lambda rng, n: np.exp(-rng.gamma(3, 0.3, n)),
    "two modes that overlap": lambda rng, n: mixture(rng, n, 0.2, gap=2)[0],
    "a high mode": lambda rng, n: np.where(rng.random(n) < 0.05, 40, 5) * rng.lognormal(0, 0.1, n),
}


@pytest.mark.parametrize("name", UNIMODAL)
@pytest.mark.parametrize("size", [2_000, 25_000, 130_000])
def test_nothing_is_found_where_there_is_no_low_mode(name, size):
    for seed in range(5):
        fit = fit_threshold(UNIMODAL[name](np.random.default_rng(seed), size))
        assert fit.threshold is None, fit.reason
        assert fit.reason


def test_share_outside_the_range_is_no_artifact():
    rng = np.random.default_rng(4)
    half, _ = mixture(rng, 20_000, 0.5, gap=15)
    assert fit_threshold(half).reason == "no minority: the low mode holds 50% of the patches (at most 25%)"
    few = np.concatenate([rng.lognormal(2, 0.1, 100_000), rng.lognormal(-1, 0.05, 20)])
    assert fit_threshold(few).threshold is None


def test_a_high_mode_apart_is_not_called_an_overlap():
    norms = np.where(np.random.default_rng(8).random(25_000) < 0.05, 13, 5) + np.random.default_rng(9).random(25_000)
    fit = fit_threshold(norms)
    assert fit.threshold is None
    assert fit.reason.startswith(("no low mode", "no minority"))


def test_too_few_patches_and_equal_norms_are_said_so():
    rng = np.random.default_rng(5)
    norms, _ = mixture(rng, 1_999, 0.1, gap=15)
    assert fit_threshold(norms).reason == "1,999 patches are too few to fit: at least 2,000 are needed"
    assert fit_threshold(np.full(3_000, 2.0)).reason == "all norms are equal"


def test_zero_norms_are_a_low_mode():
    norms = np.concatenate([np.zeros(500), np.random.default_rng(6).lognormal(2, 0.1, 9_500)])
    assert 0 < fit_threshold(norms).threshold < norms[500:].min()


def test_scale_does_not_matter():
    norms, _ = mixture(np.random.default_rng(7), 20_000, 0.05, gap=10)
    assert fit_threshold(norms * 1000).threshold == pytest.approx(fit_threshold(norms).threshold * 1000, rel=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_norms_that_are_none(value):
    with pytest.raises(ItaeError, match="finite"):
        fit_threshold(np.array([1.0, value] * 2000))


def test_quantile():
    fit = fit_threshold(np.arange(1, 10_001, dtype=float))
    assert fit.quantile(0.25) == pytest.approx(2500.75)


@pytest.mark.parametrize("structure", ["registers", *EVA_STRUCTURES])
def test_norms_of_every_block_and_source_in_one_pass(structure):
    model = tiny_vit(structure)
    backbone, dataset = as_backbone(model), MadeDataset(20)
    sampled = sampled_norms(backbone, dataset, sample=7, seed=3, batch_size=4)
    indices = sample_indices(20, 7, 3)
    batch = dataset_tensor(backbone, dataset)[indices]
    x, options = reference.embedded(model, batch)
    for index, block in enumerate(model.blocks):
        parts = reference.projected(block.attn, block.norm1(x))[:, model.num_prefix_tokens:].split(24, dim=-1)
        for source, part in zip(SOURCES, parts, strict=True):
            expected = part.square().sum(-1).sqrt()
            assert np.allclose(sampled[index, source], expected, atol=1e-4)
        x = block(x, **options[index])


def test_fits_by_block_and_source():
    fits = fit_thresholds(as_backbone(tiny_vit()), MadeDataset(20), sample=8)
    assert set(fits) == {(block, source) for block in range(3) for source in SOURCES}
    assert fits[-1, "key"] is fits[2, "key"]
    assert "too few" in fits[0, "value"].reason
    assert fits.seconds > 0
    for key in [(3, "key"), (-4, "key"), (0, "keys")]:
        with pytest.raises(ItaeError, match="no fit"):
            fits[key]


@pytest.mark.parametrize("structure", ["registers", "dinov2", "qk_norm"])
def test_nothing_is_found_in_random_models(structure):
    fits = fit_thresholds(as_backbone(tiny_vit(structure)), MadeDataset(200))
    assert all(fit.norms.size == 3200 for fit in fits.values())
    assert {key: fit.reason for key, fit in fits.items() if fit.threshold is not None} == {}


def test_the_sample_s_images_come_as_the_backbone_says(monkeypatch):
    prepared, prepare = [], DevicePreprocessing.__call__
    monkeypatch.setattr(DevicePreprocessing, "__call__",
                        lambda self, pixels: prepared.append(len(pixels.shapes)) or prepare(self, pixels))
    dataset = MadeDataset(20, size=30)
    by_pil = as_backbone(tiny_vit())
    asked = {"sample": 7, "seed": 3, "batch_size": 4}
    norms = sampled_norms(by_pil, dataset, **asked)
    by_workers = sampled_norms(by_pil, dataset, num_workers=1, **asked)
    on_device = sampled_norms(dataclasses.replace(by_pil, resize="device"), dataset, **asked)
    for place, values in norms.items():
        assert np.array_equal(values, by_workers[place])
        assert np.allclose(values, on_device[place], rtol=0.05)
    assert prepared == [4, 3]


def test_sample_is_seeded_sorted_and_whole_when_large():
    assert sample_indices(5, 10, 0).tolist() == [0, 1, 2, 3, 4]
    first, again, other = (sample_indices(1000, 50, seed).tolist() for seed in (1, 1, 2))
    assert first == again == sorted(set(first))
    assert first != other
    assert len(first) == 50


def test_hooks_are_gone_after_the_fit():
    model = tiny_vit()
    fit_thresholds(as_backbone(model), MadeDataset(4), sample=2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert isinstance(model.blocks[0].attn.qkv, torch.nn.Linear)


def test_norms_are_measured_once_for_the_same_sample(tmp_path):
    """A second fit over the store runs no image; another sample, seed or model does."""
    dataset, backbone = load_dataset("digits", limit=80), load_backbone("demo")
    images = []
    backbone.model.patch_embed.register_forward_hook(lambda _module, args, _out: images.append(len(args[0])))

    def fit(**options):
        return fit_thresholds(backbone, dataset, **{"sample": 60, "batch_size": 30, "store": tmp_path} | options)

    plain, first, again = fit(store=None), fit(), fit()
    assert sum(images) == 120
    for key in plain:
        assert plain[key].threshold == first[key].threshold == again[key].threshold
        assert np.array_equal(plain[key].norms, again[key].norms)
        assert plain[key].norms.shape == (60, 49)
    for options in ({"sample": 50}, {"seed": 1}, {"batch_size": 20}):
        images.clear()
        fit(**options)
        assert sum(images) == options.get("sample", 60)
