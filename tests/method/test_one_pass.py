import numpy as np
import pytest
import torch

from itae_utils.extraction.features import extract_features
from itae_utils.method import one_pass
from itae_utils.method.artifacts import qkv_norms
from itae_utils.method.attention import attenuate, attenuated_logits
from itae_utils.method.one_pass import GROUP, OnePass
from itae_utils.method.setting import ATTENUATIONS, ITAE, SOURCES
from tests import reference
from tests.conftest import EVA_STRUCTURES, STRUCTURES, setup, threshold_at


@pytest.mark.parametrize("structure", STRUCTURES)
def test_baseline_is_the_model_s_cls_output(structure):
    backbone, dataset, batch = setup(structure)
    features = extract_features(backbone, dataset, {"baseline": None}, batch_size=2)
    expected = backbone.model(batch).numpy()  # "token" pooling and the final norm, wherever it stands
    assert features["baseline"].dtype == np.float32
    assert np.abs(features["baseline"] - expected).max() < 1e-5
    assert features.targets.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_attenuation_follows_the_equations(structure):
    backbone, dataset, batch = setup(structure, count=2)
    threshold = threshold_at(backbone.model, batch, "key", 0.3)
    variants = {name: ITAE("key", threshold, name, alpha=0.3) for name in ATTENUATIONS}
    features = extract_features(backbone, dataset, variants)
    for name, itae in variants.items():
        expected = backbone.model.fc_norm(reference.forward(backbone.model, batch, itae)[:, 0]).numpy()
        assert np.abs(features[name] - expected).max() < 1e-5


def every_kind_of_variant(model, batch) -> dict[str, ITAE | None]:
    thresholds = {source: threshold_at(model, batch, source, 0.3) for source in SOURCES}
    both = [threshold_at(model, batch, "key", 0.3, block) for block in (-2, -1)]
    shallow = {f"{source}-{name}": ITAE(source, thresholds[source], name)
               for source in SOURCES for name in ATTENUATIONS}
    return {"baseline": None} | shallow | {
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


def test_a_variant_s_bytes_do_not_depend_on_the_others():
    backbone, dataset, batch = setup(count=6)
    variants = every_kind_of_variant(backbone.model, batch)
    together = extract_features(backbone, dataset, variants, batch_size=3)
    assert len(variants) > 2 * GROUP
    for name in ("baseline", "key-min", "value-scale", "two blocks"):
        alone = extract_features(backbone, dataset, {name: variants[name]}, batch_size=3)
        assert np.array_equal(alone[name], together[name]), name


def test_variants_of_one_attenuation_are_edited_at_once_in_whatever_order_they_come(monkeypatch):
    backbone, _, batch = setup(count=3)
    shares = [number / 10 for number in range(1, GROUP)]
    settings = {f"{name} {share}": ITAE("key", threshold_at(backbone.model, batch, "key", share), name)
                for share in shares for name in ATTENUATIONS}
    expected = {name: OnePass(backbone.model, {name: itae})(batch, 0)[name] for name, itae in settings.items()}
    edits = []
    monkeypatch.setattr(one_pass, "attenuated_logits", lambda *given: edits.append(given) or attenuated_logits(*given))
    together = OnePass(backbone.model, settings)(batch, 0)
    assert len(edits) == len(ATTENUATIONS)
    assert list(together) == list(settings)
    for name in settings:
        for part, alone in zip(together[name], expected[name], strict=True):
            assert torch.equal(part, alone), name


def test_images_are_run_once_whatever_the_number_of_variants():
    backbone, dataset, batch = setup(count=6)
    calls, variants = [], every_kind_of_variant(backbone.model, batch)
    handle = backbone.model.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    extract_features(backbone, dataset, variants, batch_size=3)
    handle.remove()
    assert len(calls) == 2


@pytest.mark.parametrize("structure", ["registers", "dinov3", "eva02_split"])
def test_images_without_artifacts_get_the_baseline_itself(structure):
    backbone, dataset, batch = setup(structure, count=6)
    smallest = qkv_norms(backbone.model, batch)["key"].flatten(1).amin(1)
    threshold = float(smallest.sort().values[2:4].mean())  # three images have artifacts, three have none
    untouched = (smallest > threshold).numpy()
    variants = {"baseline": None, "min": ITAE("key", threshold), "mask": ITAE("key", threshold, "mask"),
                "deep": ITAE("key", [0.0, threshold], blocks=2), "deep, nothing": ITAE("key", [0.0, 0.0], blocks=2)}
    features = extract_features(backbone, dataset, variants, batch_size=4)
    for name in ("min", "mask", "deep"):
        equal = (features[name] == features["baseline"]).all(1)
        assert equal.tolist() == untouched.tolist(), name
        assert (features.artifact_counts[name] == 0).tolist() == untouched.tolist()
    assert np.array_equal(features["deep, nothing"], features["baseline"])


def test_images_without_a_normal_patch_are_left_alone_and_counted():
    backbone, dataset, batch = setup(count=6)
    largest = qkv_norms(backbone.model, batch)["key"].flatten(1).amax(1)
    threshold = float(largest.sort().values[1:3].mean())
    features = extract_features(backbone, dataset, {"baseline": None, "mean": ITAE("key", threshold, "mean"),
                                                    "min": ITAE("key", threshold)})
    equal = (features["mean"] == features["baseline"]).all(1)
    assert equal.tolist() == (largest <= threshold).tolist()
    assert features.left_alone == {"baseline": 0, "mean": 2, "min": 0}


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
