import sys

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch.utils._python_dispatch import TorchDispatchMode

from itae_utils.errors import ItaeError
from itae_utils.extraction.features import extract_features
from itae_utils.method.anatomy import adapt, block_inputs
from itae_utils.method.attention import attention_map, attenuate
from itae_utils.method.setting import ITAE, PROJECTIONS, SOURCES
from itae_utils.method.statistics import qkv_norms, token_norms
from tests import reference
from tests.conftest import (
    STRUCTURES,
    MadeDataset,
    as_backbone,
    dataset_tensor,
    images,
    setting,
    statistic,
    threshold_at,
    tiny_vit,
)
from tests.dinov2 import meta_weights, theirs


@pytest.mark.parametrize("structure", STRUCTURES)
def test_projections_are_the_same_one_by_one_together_and_captured(structure):
    model, batch, captured = tiny_vit(structure), images(2), []
    last = len(model.blocks) - 1
    adapter, inputs = adapt(model).blocks[last], block_inputs(model, batch, [last])[last]
    with adapter.capture_qkv(captured.append):
        model.forward_features(batch)
    model.forward_features(batch)
    (seen,) = captured  # a closed context captures nothing
    qkv, x = adapter.qkv(inputs), adapter.block.norm1(inputs.tokens)
    expected = reference.projected(model.blocks[last].attn, x).split(24, dim=-1)
    assert torch.equal(qkv.tokens, inputs.tokens)
    assert torch.equal(seen.tokens, inputs.tokens)
    assert torch.allclose(seen.cls_logits, qkv.cls_logits, atol=1e-5)
    for source, part in zip(PROJECTIONS, expected, strict=True):
        assert torch.allclose(qkv[source], part, atol=1e-5)
        assert torch.allclose(seen[source], part, atol=1e-5)
        assert torch.allclose(seen.heads(source), qkv.heads(source), atol=1e-5)
        assert torch.allclose(adapter.project(x, source), part, atol=1e-5)
        cls_alone = adapter.heads(source, adapter.project(x[:, :1], source), inputs.rope)
        assert torch.allclose(cls_alone, qkv.heads(source)[:, :, :1], atol=1e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_value_sums_are_sums_of_values_and_copy_no_weights(structure):
    adapter = adapt(tiny_vit(structure)).blocks[-1]
    width = adapter.num_heads * adapter.head_dim
    x, weights = torch.randn(20, 5, width), torch.rand(20, adapter.num_heads, 1, 5).softmax(dim=-1)
    with ResultSizes() as results:
        sums = adapter.value_sums(weights, x)
    expected = weights @ adapter.heads("value", adapter.project(x, "value"), None)
    assert torch.allclose(sums, expected, atol=1e-5)
    with_further = adapter.value_sums(weights[..., 1:], x[:, 1:], weights[..., :1] @ x[:, None, :1])
    assert torch.allclose(with_further, expected, atol=1e-5)
    assert max(results.sizes) < 20 * width * width / 4  # one copy of the value weights per image has four times as many


class ResultSizes(TorchDispatchMode):
    """While open, records the number of elements in the result of each operation."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        parts = [result] if isinstance(result, torch.Tensor) else result
        self.sizes += [part.untyped_storage().nbytes() // part.element_size() for part in parts]
        return result


def test_rotation_of_a_model_of_one_fixed_size():
    model, fixed = tiny_vit("dinov3"), tiny_vit("dinov3", dynamic_img_size=False)
    batch = images(2)
    itae = ITAE(threshold=threshold_at(model, batch, "key", 0.3))
    with attenuate(model, itae), attenuate(fixed, itae):
        assert torch.allclose(model.forward_features(batch), fixed.forward_features(batch), atol=1e-6)
    assert torch.allclose(attention_map(model, batch, itae=itae), attention_map(fixed, batch, itae=itae), atol=1e-6)


# --- common models, at a small size ----------------------------------------------------------------------------------

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0, "global_pool": "token",
         "dynamic_img_size": True}


@pytest.mark.parametrize("name", [
    "vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m", "vit_giant_patch14_dinov2.lvd142m",
    "vit_giant_patch14_reg4_dinov2.lvd142m", "vit_small_plus_patch16_dinov3_qkvb.lvd1689m",
    "vit_small_patch16_224.dino", "vit_base_patch16_clip_quickgelu_224.openai", "vit_base_patch16_clip_224.openai",
    "deit3_small_patch16_224.fb_in1k", "vit_base_patch16_224.mae", "vit_tiny_patch16_224.augreg_in21k",
    "deit_small_distilled_patch16_224", "eva_giant_patch14_224", "eva02_tiny_patch14_224", "eva02_base_patch14_224",
    "eva02_base_patch16_clip_224", "vit_small_patch16_dinov3.lvd1689m", "vit_small_patch16_dinov3_qkvb.lvd1689m",
    "vit_small_plus_patch16_dinov3.lvd1689m", "vit_7b_patch16_dinov3.lvd1689m",
])
def test_extraction_follows_the_stock_model(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL).eval().requires_grad_(False)
    for part, parameter in model.named_parameters():
        if "gamma" in part:  # initialised so small that a new model's blocks do little
            torch.nn.init.constant_(parameter, 0.5)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    size = 4 * model.patch_embed.patch_size[0]
    backbone, dataset = as_backbone(model, size), MadeDataset(3, size)
    batch = dataset_tensor(backbone, dataset)
    itae = ITAE("key", threshold_at(model, batch, "key", 0.3))
    features = extract_features(backbone, dataset, {"baseline": None, "itae": itae})
    assert abs(features["baseline"] - model.forward_features(batch)[:, 0].numpy()).max() < 1e-5
    with attenuate(model, itae):
        attenuated = model.forward_features(batch)[:, 0].numpy()
    assert abs(features["itae"] - attenuated).max() < 1e-5
    assert abs(features["itae"] - features["baseline"]).max() > 1e-4


# --- a transformers Dinov2Model -------------------------------------------------------------------------------------

def tiny_theirs(size: str = "small", registers: bool = False, **options):
    pytest.importorskip("transformers")
    return theirs(size, registers, side=32, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, patch_size=8,
                  layer_norm_eps=1e-6, **options)


def twins(registers: bool, gated: bool = False):
    """Return a random `transformers` model, and timm's model with the same weights."""
    model = tiny_theirs("giant" if gated else "small", registers=registers)
    twin = tiny_vit("dinov2" if registers else "swiglu" if gated else "layer_scale")
    twin.load_state_dict(checkpoint_filter_fn(meta_weights(model), twin))
    return model, twin


@pytest.mark.parametrize(("registers", "gated"), [(False, False), (True, False), (False, True)])
def test_a_transformers_model_measures_as_its_timm_twin(registers, gated):
    model, twin = twins(registers, gated)
    batch = images(2)
    assert (model(batch).last_hidden_state - twin.forward_features(batch)).abs().max() < 1e-5
    for block in (0, -1):
        found, expected = qkv_norms(model, batch, block), qkv_norms(twin, batch, block)
        assert all(torch.allclose(found[source], expected[source], atol=1e-4) for source in PROJECTIONS)
        assert torch.allclose(attention_map(model, batch, block), attention_map(twin, batch, block), atol=1e-5)
    assert torch.allclose(token_norms(model, batch), token_norms(twin, batch), atol=1e-4)
    for source in SOURCES:
        assert torch.allclose(statistic(model, batch, source), statistic(twin, batch, source), atol=1e-4), source


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [
    {}, {"source": "query", "attenuation": "mask"}, {"source": "value", "attenuation": "mean"},
    {"attenuation": "scale", "blocks": 2, "rows": "all"}, {"select": "random", "seed": 2, "blocks": 2},
    {"source": "token", "attenuation": "substitute", "blocks": 2}, {"source": "direction", "attenuation": "spread"},
    {"source": "attention", "attenuation": "clip", "rows": "all", "blocks": 2},
])
def test_attenuate_on_a_transformers_model_is_attenuate_on_its_timm_twin(registers, attention, options):
    model, twin = twins(registers)
    model.set_attn_implementation(attention)
    batch, plain = images(3), model(images(3)).last_hidden_state
    blocks = range(-options.get("blocks", 1), 0)
    thresholds = [threshold_at(twin, batch, options.get("source", "key"), 0.3, block) for block in blocks]
    itae = setting(**{"source": "key", "threshold": thresholds} | options)
    with attenuate(twin, itae):
        expected = twin.forward_features(batch)
    with attenuate(model, itae):
        output = model(batch)
    assert (output.last_hidden_state - expected).abs().max() < 1e-5
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    assert (expected - plain)[:, 0].abs().max() > 1e-3  # the edit shows
    assert torch.equal(model(batch).last_hidden_state, plain)  # the edit is undone
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.encoder.layer.modules())


def test_every_pass_of_a_transformers_model_is_captured_once():
    model, _ = twins(registers=False)
    captured = []
    with adapt(model).blocks[1].capture_qkv(captured.append):
        for count in (2, 3):
            model(images(count))
    assert [len(qkv["value"]) for qkv in captured] == [2, 3]


def test_swiglu_and_no_bias_in_transformers():
    model, batch = tiny_theirs("giant", qkv_bias=False), images(2, 24, 40)
    norms = qkv_norms(model, batch)["key"]
    assert norms.shape == (2, 3, 5)
    with attenuate(model, ITAE(threshold=float(norms.amax()) + 1, attenuation="mask")):
        alone = model(batch).last_hidden_state[:, 0]
    plain = model(batch).last_hidden_state
    with attenuate(model, ITAE(threshold=0.0)):
        assert torch.equal(model(batch).last_hidden_state, plain)
    assert (alone - plain[:, 0]).abs().max() > 1e-3


def test_other_transformers_models_are_named():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=3)
    with pytest.raises(ItaeError, match="Dinov2ForImageClassification"):
        adapt(transformers.Dinov2ForImageClassification(config))


def test_an_older_transformers_is_refused_with_the_release_that_works():
    model, _ = twins(registers=False)
    del model.encoder.layer[0].attention.q_proj
    with pytest.raises(ItaeError, match=r"transformers>=5\.18"):
        adapt(model)


def test_transformers_is_not_needed(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails
    assert len(adapt(tiny_vit()).blocks) == 3
