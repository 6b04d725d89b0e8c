import numpy as np
import pytest
import torch

from itae_utils.extraction.features import extract_features
from itae_utils.method import one_pass
from itae_utils.method.artifacts import FiringRule
from itae_utils.method.attention import attenuate
from itae_utils.method.one_pass import GROUP, OnePass
from itae_utils.method.setting import ATTENUATIONS, ITAE, PROJECTIONS, SOURCES
from itae_utils.method.statistics import qkv_norms
from tests import reference
from tests.conftest import EVA_STRUCTURES, STRUCTURES, setting, setup, sources_of, statistic, threshold_at


@pytest.mark.parametrize("structure", STRUCTURES)
def test_baseline_is_the_model_s_output_and_every_attenuation_follows_the_equations(structure):
    backbone, dataset, batch = setup(structure, count=3)
    threshold = threshold_at(backbone.model, batch, "key", 0.3)
    variants = {name: setting("key", threshold, name, alpha=0.3) for name in ATTENUATIONS}
    features = extract_features(backbone, dataset, {"baseline": None} | variants, batch_size=2)
    assert features["baseline"].dtype == np.float32
    assert features.targets.tolist() == [0, 1, 2]
    assert np.abs(features["baseline"] - backbone.model(batch).numpy()).max() < 1e-5
    for name, itae in variants.items():
        expected = backbone.model.fc_norm(reference.forward(backbone.model, batch, itae)[:, 0]).numpy()
        assert np.abs(features[name] - expected).max() < 1e-5


def every_kind_of_variant(model, batch) -> dict[str, ITAE | None]:
    thresholds = {source: threshold_at(model, batch, source, 0.3) for source in sources_of(model)}
    both = [threshold_at(model, batch, "key", 0.3, block) for block in (-2, -1)]
    shallow = {f"{source}-{name}": setting(source, thresholds[source], name)
               for source in thresholds for name in ATTENUATIONS}
    if "direction" in thresholds:
        shallow["rank 3"] = ITAE("direction", threshold_at(model, batch, "direction", 0.3, rank=3), rank=3)
    return {"baseline": None} | shallow | {
        "other tail": ITAE("key", threshold_at(model, batch, "key", 0.3, side="high"), tail="high"),
        "two blocks, substituted": setting("key", both, "substitute", blocks=2),
        "two blocks by attention": ITAE("attention", thresholds["attention"], "clip", blocks=2),
        "random": ITAE("key", thresholds["key"], select="random", seed=5),
        "two blocks": ITAE("key", both, blocks=2),
        "all rows": ITAE("key", both, blocks=2, rows="all"),
        "first alone": ITAE("key", [both[0], None], blocks=2),
        "random, two blocks": ITAE("key", both, blocks=2, select="random", seed=5),
        "three blocks": ITAE("value", 1e9, "mask", blocks=3),
    }


@pytest.mark.parametrize("structure", ["plain", "registers", "qk_norm", "no_bias", *EVA_STRUCTURES])
def test_extraction_and_attenuate_agree_for_every_kind_of_variant(structure):
    backbone, dataset, batch = setup(structure, count=7)
    variants = every_kind_of_variant(backbone.model, batch)
    features = extract_features(backbone, dataset, variants, batch_size=3)
    assert list(features) == list(variants)
    for name, itae in variants.items():
        if itae is None:
            continue
        with attenuate(backbone.model, itae):
            expected = backbone.model(batch).numpy()
        assert np.abs(features[name] - expected).max() < 1e-5, name
        assert np.abs(features[name] - features["baseline"]).max() > 1e-4, name


def test_the_bytes_of_a_variant_do_not_depend_on_the_others():
    backbone, _, batch = setup(count=3)
    settings = every_kind_of_variant(backbone.model, batch)
    assert len(settings) > 2 * GROUP
    together = OnePass(backbone.model, dict(reversed(settings.items())))(batch, 0)
    assert list(together) == list(reversed(settings))
    for name, itae in settings.items():
        for part, alone in zip(together[name], OnePass(backbone.model, {name: itae})(batch, 0)[name], strict=True):
            assert torch.equal(part, alone), name


def test_each_statistic_is_measured_once_for_all_variants(monkeypatch):
    backbone, _, batch = setup(count=3)
    settings, measured = every_kind_of_variant(backbone.model, batch), []
    shallow = {name: itae for name, itae in settings.items() if itae is None or itae.blocks == 1}
    measure = one_pass.patch_statistic
    monkeypatch.setattr(one_pass, "patch_statistic", lambda source, *rest: measured.append(source) or measure(
        source, *rest))
    OnePass(backbone.model, shallow)(batch, 0)
    assert sorted(measured) == sorted([*SOURCES, "direction"])  # of two ranks


def test_images_are_run_once_for_any_number_of_variants():
    backbone, dataset, batch = setup(count=6)
    calls, variants = [], every_kind_of_variant(backbone.model, batch)
    handle = backbone.model.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    extract_features(backbone, dataset, variants, batch_size=3)
    handle.remove()
    assert len(calls) == 2


def test_random_patches_are_drawn_once_per_image_for_all_variants(monkeypatch):
    backbone, _, batch = setup(count=3)
    threshold = threshold_at(backbone.model, batch, "key", 0.3)
    controls = {f"{source} {name} {factor}": ITAE(source, threshold * factor, name, select="random", seed=91)
                for source in PROJECTIONS for name in ("min", "mask", "mean") for factor in (0.9, 1.1)}
    run, draws, draw = OnePass(backbone.model, controls), [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: draws.append(seed) or draw(seed))
    for first_image in (0, 3):
        run(batch, first_image)
    assert len(controls) == 18
    assert draws == [[91, 2, number] for number in range(6)]


@pytest.mark.parametrize("structure", ["registers", "dinov3"])
def test_a_pass_reads_nothing_back_from_the_device(structure):
    """Tensors on the meta device have no values: whatever waits for one fails."""
    backbone, _, batch = setup(structure, count=3)
    settings = every_kind_of_variant(backbone.model, batch) | {"oracle": ITAE(select="oracle", blocks=2)}
    run = OnePass(backbone.model, settings, FiringRule(0, (5, 6), 0.9))
    backbone.model.to("meta")
    results = run(batch.to("meta"), 0)
    assert {tuple(output.shape) for output, _ in results.values()} == {(3, 24)}
    assert all(artifacts.is_meta for _, artifacts in results.values())


@pytest.mark.parametrize("structure", ["registers", "dinov3", "eva02_split"])
def test_images_without_artifacts_get_the_baseline_s_own_output(structure):
    backbone, dataset, batch = setup(structure, count=6)
    largest = statistic(backbone.model, batch, "attention").amax(1)
    threshold = float(largest.sort().values[2:4].mean())  # three images have artifacts, three have none
    untouched = (largest < threshold).numpy()
    edits = {name: setting("attention", threshold, name) for name in ATTENUATIONS}
    edits["deep"] = setting("attention", [1.0, threshold], "substitute", blocks=2)
    nothing = setting("attention", [1.0, 1.0], "substitute", blocks=2)
    features = extract_features(backbone, dataset, {"baseline": None} | edits | {"nothing": nothing}, batch_size=4)
    for name in edits:
        equal = (features[name] == features["baseline"]).all(1)
        assert equal.tolist() == untouched.tolist(), name
        assert (features.artifact_counts[name] == 0).tolist() == untouched.tolist()
    assert np.array_equal(features["nothing"], features["baseline"])


def test_images_without_a_normal_patch_are_left_as_they_are_by_edits_that_need_one():
    backbone, dataset, batch = setup(count=6)
    largest = qkv_norms(backbone.model, batch)["key"].flatten(1).amax(1)
    threshold = float(largest.sort().values[1:3].mean())
    features = extract_features(backbone, dataset, {"baseline": None} | {
        name: setting("key", threshold, name) for name in ATTENUATIONS})
    for name in ATTENUATIONS:
        equal = torch.from_numpy((features[name] == features["baseline"]).all(1))
        assert equal[largest <= threshold].tolist() == [name in ("mean", "spread", "clip")] * 2, name


@pytest.mark.parametrize("structure", ["plain", "dinov3"])
def test_gated_attention(structure):
    backbone, dataset, batch = setup(structure, count=3)
    for block in backbone.model.blocks:
        block.attn.gate = torch.nn.Linear(24, 24).requires_grad_(False)
    itae = ITAE(threshold=threshold_at(backbone.model, batch, "key", 0.3))
    features = extract_features(backbone, dataset, {"baseline": None, "itae": itae})
    assert np.abs(features["baseline"] - backbone.model(batch).numpy()).max() < 1e-5
    with attenuate(backbone.model, itae):
        assert np.abs(features["itae"] - backbone.model(batch).numpy()).max() < 1e-5
