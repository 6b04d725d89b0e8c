import copy
import dataclasses
import gc
import io
import json
import math
import pickle
import re
import weakref

import numpy as np
import pytest
import torch

from itae_utils.errors import ItaeError
from itae_utils.method.artifacts import FiringRule
from itae_utils.method.attention import attention_map, attenuate, attenuated_logits
from itae_utils.method.one_pass import OnePass
from itae_utils.method.setting import ATTENUATIONS, ITAE, SIDES, SOURCES
from itae_utils.method.statistics import qkv_norms, token_norms
from tests import reference
from tests.conftest import STRUCTURES, images, setting, sources_of, statistic, threshold_at, tiny_vit


def output(model, batch, itae=None, **options):
    if itae is None:
        return model.forward_features(batch)
    with attenuate(model, itae, **options):
        return model.forward_features(batch)


# --- the equations ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("attenuation", ATTENUATIONS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_cls_output_follows_the_equations(structure, attenuation):
    model, batch = tiny_vit(structure), images(2)
    source = "attention" if attenuation == "clip" else "key"  # with short keys there may be nothing to clip
    itae = setting(source, threshold_at(model, batch, source, 0.3), attenuation, alpha=0.2)
    expected = reference.forward(model, batch, itae)
    assert (output(model, batch, itae) - expected).abs().max() < 1e-5
    assert (expected - output(model, batch))[:, 0].abs().max() > 1e-3  # the edit shows


# Registers, SwiGLU, rotation, and LayerScale, each on and off.
EVERY_PART = ["plain", "dinov2", "swiglu", "eva02_fused", "dinov3_qkvb"]


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("structure", EVERY_PART)
def test_every_edit_with_every_statistic_however_it_is_applied(structure, source, count):
    model, batch = tiny_vit(structure), images(count)
    threshold, plain = threshold_at(model, batch, source, 0.3), output(model, batch)
    baseline, _ = OnePass(model, {"baseline": None})(batch, 0)["baseline"]
    for attenuation in ATTENUATIONS:
        itae, rows = setting(source, threshold, attenuation, alpha=0.2), {}
        expected = reference.forward(model, batch, itae, seen=rows)
        cls_output = model.fc_norm(expected[:, 0])
        assert (output(model, batch, itae) - expected).abs().max() < 1e-5, attenuation
        alone = torch.cat([output(model, image[None], itae) for image in batch])
        assert (alone - expected).abs().max() < 1e-5, attenuation
        results = OnePass(model, {"baseline": None, "it": itae})(batch, 0)
        assert (results["it"][0] - cls_output).abs().max() < 1e-5, attenuation
        assert torch.equal(results["baseline"][0], baseline), attenuation
        weights = torch.stack(rows[2]).unflatten(0, (count, 3))[:, :, model.num_prefix_tokens:]
        seen = attention_map(model, batch, itae=itae, heads="each").flatten(2)
        assert (seen - weights).abs().max() < 1e-5, attenuation
        if attenuation != "clip" or source == "attention":
            assert (expected - plain)[:, 0].abs().max() > 3e-4, attenuation  # the edit shows
    assert hook_count(model) == 0


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("structure", ["dinov2", "dinov3_qkvb"])
def test_every_edit_with_every_statistic_in_two_blocks_and_all_rows(structure, source, monkeypatch):
    monkeypatch.setattr("itae_utils.method.attention.QUERY_CHUNK_BYTES", 4 * 3 * 21 * 2 * 4)  # of four rows
    model, batch = tiny_vit(structure), images(2)
    thresholds = [threshold_at(model, batch, source, 0.3, block) for block in (-2, -1)]
    for attenuation in ATTENUATIONS:
        itae = setting(source, thresholds, attenuation, alpha=0.2, blocks=2, rows="all")
        expected = reference.forward(model, batch, itae)
        assert (output(model, batch, itae) - expected).abs().max() < 1e-5, attenuation
        found, _ = OnePass(model, {"it": itae})(batch, 0)["it"]
        assert (found - expected[:, 0]).abs().max() < 1e-5, attenuation


@pytest.mark.parametrize(("source", "tail", "rank"), [
    ("query", "high", 1), ("key", "high", 1), ("value", "high", 1), ("token", "low", 1), ("direction", None, 2),
    ("direction", "high", 23)])
def test_the_other_tail_and_higher_ranks(source, tail, rank):
    model, batch = tiny_vit("dinov2"), images(2)
    threshold = threshold_at(model, batch, source, 0.3, side=tail, rank=rank)
    itae = ITAE(source, threshold, "mask", tail=tail, rank=rank)
    expected = reference.forward(model, batch, itae)
    assert (output(model, batch, itae) - expected).abs().max() < 1e-5
    assert (OnePass(model, {"it": itae})(batch, 0)["it"][0] - expected[:, 0]).abs().max() < 1e-5
    assert (expected - output(model, batch))[:, 0].abs().max() > 1e-3


@pytest.mark.parametrize("structure", ["registers", "dinov3", "dinov3_qkvb", "eva02_split", "rope_mixed"])
@pytest.mark.parametrize(("source", "height", "width"), [
    ("query", 16, 16), ("key", 8, 64), ("value", 40, 24), ("token", 16, 24), ("attention", 24, 16)])
def test_other_sources_and_image_sizes_without_fused_attention(source, height, width, structure):
    model, batch = tiny_vit(structure), images(2, height, width)
    for block in model.blocks:
        block.attn.fused_attn = False
    itae = ITAE(source, threshold_at(model, batch, source, 0.25))
    assert (output(model, batch, itae) - reference.forward(model, batch, itae)).abs().max() < 1e-5


@pytest.mark.parametrize("rows", ["cls", "all"])
@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("structure", ["plain", "dinov2", "qk_norm", "scale_norm", "dinov3", "eva02_split",
                                       "rope_mixed"])
def test_several_blocks_and_all_rows_in_small_chunks(structure, blocks, rows, monkeypatch):
    monkeypatch.setattr("itae_utils.method.attention.QUERY_CHUNK_BYTES", 4 * 3 * 17 * 2)  # of at most two rows
    model, batch = tiny_vit(structure), images(1)
    thresholds = [threshold_at(model, batch, "key", 0.3, block) for block in range(-blocks, 0)]
    itae = ITAE("key", thresholds, blocks=blocks, rows=rows)
    assert (output(model, batch, itae) - reference.forward(model, batch, itae)).abs().max() < 1e-5


@pytest.mark.parametrize("attenuation", ATTENUATIONS)
@pytest.mark.parametrize(("structure", "blocks"), [("registers", 1), ("plain", 2), ("dinov3_qkvb", 1)])
def test_gradients_are_those_of_the_equations(structure, blocks, attenuation):
    model, batch = tiny_vit(structure).requires_grad_(True), images(1).requires_grad_(True)
    source = "attention" if attenuation == "clip" else "key"
    thresholds = [threshold_at(model, batch, source, 0.3, block) for block in range(-blocks, 0)]
    itae = setting(source, thresholds, attenuation, alpha=0.2, blocks=blocks, rows="all")
    weights = torch.randn(model.num_prefix_tokens + 16, model.embed_dim, generator=torch.Generator().manual_seed(0))

    def gradients(tokens):
        return torch.autograd.grad((tokens * weights).sum(), [batch, *model.parameters()])

    expected = gradients(reference.forward(model, batch, itae))
    for found, gradient in zip(gradients(output(model, batch, itae)), expected, strict=True):
        assert (found - gradient).abs().max() < 1e-4 * max(1, gradient.abs().max())
    plain = gradients(output(model, batch))
    assert (plain[0] - expected[0]).abs().max() > 0.003 * expected[0].abs().max()  # the edit shows


@pytest.mark.parametrize("attenuation", ATTENUATIONS)
def test_gradients_of_images_with_no_artifact_and_with_nothing_else_are_finite(attenuation):
    model, batch = tiny_vit("registers").requires_grad_(True), images(4)
    truth = torch.zeros(4, 16, dtype=torch.bool)
    truth[1], truth[2, :5] = True, True
    oracle = setting("key", "auto", attenuation, select="oracle", blocks=2, rows="all")
    cls_output = output(model, batch, oracle, truth=truth)[:, 0]
    assert all(torch.isfinite(each).all() for each in torch.autograd.grad(cls_output.sum(), model.blocks.parameters()))
    assert torch.equal(cls_output[[0, 3]], output(model, batch)[[0, 3], 0])
    same = (cls_output[1] - output(model, batch)[1, 0]).abs().max() < 1e-5
    assert same == (attenuation in ("mean", "spread", "clip"))  # these leave an image of artifacts as it is


def test_all_rows_in_the_last_block_give_the_same_cls_output():
    assert ITAE(rows="all").rows == "cls"
    model, batch = tiny_vit("registers"), images(2)
    itae = ITAE("key", threshold_at(model, batch, "key", 0.3))
    all_rows = ITAE("key", itae.threshold)
    object.__setattr__(all_rows, "rows", "all")  # undo that replacement
    wide, narrow = output(model, batch, all_rows), output(model, batch, itae)
    assert (wide - narrow)[:, 0].abs().max() < 1e-5
    assert (wide - narrow)[:, 1:].abs().max() > 1e-3


ROW, INF, HALF = [1, 5, 3], math.inf, math.log(2)


def together(*weights: tuple[float, float]) -> float:
    """Return the logit of a sum of weights, each a factor and a logit."""
    return math.log(sum(factor * math.exp(logit) for factor, logit in weights))


@pytest.mark.parametrize(("attenuation", "highest", "two_others", "all_three"), [
    ("min", [1, 1, 3], [1, 5, 1], [1, 1, 1]),
    ("mask", [1, -INF, 3], [-INF, 5, -INF], [-INF] * 3),
    ("mean", [1, 2, 3], [5, 5, 5], ROW),  # without a normal patch the row is left as it is
    ("scale", [1, 5 - HALF, 3], [1 - HALF, 5, 3 - HALF], [1 - HALF, 5 - HALF, 3 - HALF]),
    ("spread", [together((1, 1), (0.5, 5)), -INF, together((1, 3), (0.5, 5))],
     [-INF, together((1, 1), (1, 3), (1, 5)), -INF], ROW),
    ("clip", [1, 3, 3], ROW, ROW),
    ("substitute", ROW, ROW, ROW),
])
def test_edited_logits_of_one_row(attenuation, highest, two_others, all_three):
    artifacts = torch.tensor([[False, True, False], [True, False, True], [True, True, True], [False] * 3])
    logits = torch.tensor([-9.0, -8.0, *ROW]).expand(4, 1, 1, 5)  # two prefix tokens, three patches
    edited = attenuated_logits(logits, artifacts, ITAE(attenuation=attenuation, alpha=0.5))
    expected = [[-9, -8, *row] for row in (highest, two_others, all_three, ROW)]
    assert torch.allclose(edited[:, 0, 0], torch.tensor(expected, dtype=torch.float32))


def test_spread_keeps_the_weights_of_the_prefix_tokens_and_gives_each_normal_patch_the_same():
    logits, artifacts = 3 * torch.randn(1, 3, 6, 11), torch.arange(9) % 3 == 0
    before = logits.softmax(-1)
    change = attenuated_logits(logits, artifacts[None], ITAE(attenuation="spread")).softmax(-1) - before
    taken = before[..., 2:][..., artifacts]
    assert torch.allclose(change[..., :2], torch.zeros(2), atol=1e-6)
    assert torch.allclose(change[..., 2:][..., artifacts], -taken, atol=1e-6)
    assert torch.allclose(change[..., 2:][..., ~artifacts], taken.sum(-1, keepdim=True) / 6, atol=1e-6)


@pytest.mark.parametrize("attenuation", ATTENUATIONS)
def test_one_row_edited_with_several_sets_gives_each_result_alone(attenuation):
    logits, artifacts = torch.randn(2, 3, 1, 9), torch.rand(2, 4, 7) < 0.4
    artifacts[0, 1] = True
    together = attenuated_logits(logits, artifacts, ITAE(attenuation=attenuation))
    assert together.shape == (2, 3, 4, 9)
    for index in range(4):
        alone = attenuated_logits(logits, artifacts[:, index], ITAE(attenuation=attenuation))
        assert torch.equal(together[:, :, index], alone[:, :, 0])


# --- the context manager ---------------------------------------------------------------------------------------------

def hook_count(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_model_is_unchanged_on_exit():
    model, batch = tiny_vit(), images(2)
    before, weights = output(model, batch), {name: w.clone() for name, w in model.state_dict().items()}
    output(model, batch, ITAE("key", 1e9))
    assert torch.equal(output(model, batch), before)
    assert hook_count(model) == 0
    assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())


@pytest.mark.parametrize("source", SOURCES)
def test_a_pass_that_failed_does_not_affect_the_next(source):
    model, batch = tiny_vit(), images(3)
    itae = setting(source, threshold_at(model, batch, source, 0.3), "substitute")
    expected, attention = output(model, batch, itae), model.blocks[-1].attn
    with attenuate(model, itae):
        attention.q_norm = torch.nn.LayerNorm(5)  # fails after q, k and v are projected
        with pytest.raises(RuntimeError):
            model(images(2))
        attention.q_norm = torch.nn.Identity()
        assert torch.equal(model.forward_features(batch), expected)
    with pytest.raises(RuntimeError), attenuate(model, itae):
        model(images(1)[:, :1])
    assert hook_count(model) == 0


def test_only_the_innermost_of_nested_contexts_acts():
    model, batch = tiny_vit(), images(3)
    smallest = qkv_norms(model, batch)["key"].flatten(1).amin(1)
    outer, inner = ITAE("key", 1e9, "mask"), ITAE("key", float(smallest.sort().values[:2].mean()))  # edits one image
    alone_outer, alone_inner = output(model, batch, outer), output(model, batch, inner)
    with attenuate(model, outer):
        with attenuate(model, inner):
            assert torch.equal(model.forward_features(batch), alone_inner)
        with pytest.raises(RuntimeError), attenuate(model, inner):
            raise RuntimeError
        assert torch.equal(model.forward_features(batch), alone_outer)
    assert hook_count(model) == 0


def test_contexts_may_close_in_any_order():
    model, batch = tiny_vit(), images(3)
    first, second = (attenuate(model, ITAE("key", 1e9, attenuation)) for attenuation in ("mask", "scale"))
    expected = output(model, batch, ITAE("key", 1e9, "scale"))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(model.forward_features(batch), expected)
    second.__exit__(None, None, None)
    assert hook_count(model) == 0


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [
    copy.deepcopy, pickled, lambda model: pickle.loads(pickle.dumps(model)),
    lambda model: torch.optim.swa_utils.AveragedModel(model).module])
@pytest.mark.parametrize("structure", ["registers", "dinov3_qkvb", "eva02_split"])
def test_a_copy_made_inside_a_context_runs_without_the_method(structure, copied):
    model, batch = tiny_vit(structure), images(2)
    plain, attenuated = model(batch), ITAE("key", 1e9, blocks=2)
    edited = output(model, batch, attenuated)
    with attenuate(model, attenuated):
        twin = copied(model)
        assert torch.equal(twin(batch), plain)
        with attenuate(twin, attenuated):
            assert torch.equal(twin.forward_features(batch), edited)
        assert torch.equal(model.forward_features(batch), edited)
    assert torch.equal(twin(batch), plain)
    assert torch.equal(output(twin, batch, attenuated), edited)


def in_place(model):
    model.compile(backend="eager")
    return model


def blocks_in_place(model):
    for block in model.blocks:
        block.compile(backend="eager")
    return model


def parts_in_place(model):
    model.blocks.compile(backend="eager")
    model.blocks[1].attn.compile(backend="eager")
    model.blocks[2].mlp.compile(backend="eager")
    return model


def methods_replaced(model):
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager")
    return model


def outside(model):
    return torch.compile(model, backend="eager")


@pytest.fixture
def _no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_no_compiled_code")
@pytest.mark.parametrize(("compiled", "compile_first", "run_first"), [
    (in_place, True, True), (blocks_in_place, True, True), (parts_in_place, True, True), (methods_replaced, True, True),
    (outside, True, True), (outside, True, False), (in_place, False, True), (blocks_in_place, False, False)])
def test_compiled_models_are_attenuated_too(compiled, compile_first, run_first):
    model, batch = tiny_vit("registers"), images(2)
    plain, setting = model(batch), ITAE("key", 1e9, blocks=2)
    with attenuate(model, setting):
        edited = model(batch)
    run = compiled(model) if compile_first else model
    if run_first:
        run(batch)
    with attenuate(model, setting):
        run = run if compile_first else compiled(model)
        assert (run(batch) - edited).abs().max() < 1e-4
    assert (run(batch) - plain).abs().max() < 1e-4
    assert (edited - plain).abs().max() > 1e-2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # compiled code is in use again


@pytest.mark.usefixtures("_no_compiled_code")
@pytest.mark.parametrize("compiled", [in_place, blocks_in_place, parts_in_place])
def test_measurements_of_models_compiled_in_place(compiled):
    model, plain, batch = compiled(tiny_vit("registers")), tiny_vit("registers"), images(2)
    model(batch)
    for measure in (token_norms, attention_map, lambda *inputs: qkv_norms(*inputs)["key"]):
        assert (measure(model, batch) - measure(plain, batch)).abs().max() < 1e-4


@pytest.mark.usefixtures("_no_compiled_code")
def test_contexts_of_compiled_models_may_close_in_any_order():
    model, batch = in_place(tiny_vit()), images(2)
    plain, edited = model(batch), output(tiny_vit(), batch, ITAE("key", 1e9))
    first, second = (attenuate(model, ITAE("key", 1e9)) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (model.forward_features(batch) - edited).abs().max() < 1e-4
    assert (model(batch) - edited[:, 0]).abs().max() < 1e-4
    second.__exit__(None, None, None)
    assert (model(batch) - plain).abs().max() < 1e-4


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("structure", ["registers", "dinov3_qkvb", "eva02_split"])
def test_images_without_artifacts_keep_the_model_s_result_to_the_bit(structure, source):
    model, batch = tiny_vit(structure), images(4)
    if source not in sources_of(model):
        pytest.skip("the model has no such statistic")
    low = SIDES[source] == "low"
    values = statistic(model, batch, source)
    values = values.amin(1) if low else values.amax(1)
    between = float(values.sort().values[1:3].mean())  # two images have artifacts, two have none
    plain, edited = output(model, batch), output(model, batch, setting(source, between, "substitute"))
    untouched = values > between if low else values < between
    assert untouched.sum() == 2
    assert torch.equal(edited[untouched], plain[untouched])
    assert not torch.equal(edited[~untouched], plain[~untouched])


def test_projections_are_released_after_each_pass():
    model, batch, projections = tiny_vit(), images(2), []
    handle = model.blocks[-1].attn.qkv.register_forward_hook(
        lambda _module, _args, out: projections.append(weakref.ref(out)))
    with attenuate(model, ITAE("key", 1e9)):
        model.forward_features(batch)
        gc.collect()
        assert [projection() for projection in projections] == [None]
    handle.remove()


# --- controls --------------------------------------------------------------------------------------------------------

def test_random_control_depends_on_the_image_and_not_on_its_batch():
    model, batch = tiny_vit("registers"), images(5)
    threshold = threshold_at(model, batch, "key", 0.3)
    control = ITAE("key", threshold, select="random", seed=3)
    whole = output(model, batch, control)
    with attenuate(model, control, first_image=2):
        later = torch.cat([model.forward_features(image[None]) for image in batch[2:]])
    assert (later - whole[2:]).abs().max() < 1e-5
    other_seed = output(model, batch, dataclasses.replace(control, seed=4))
    assert (other_seed - whole)[:, 0].abs().max() > 1e-3
    assert (whole - output(model, batch, ITAE("key", threshold)))[:, 0].abs().max() > 1e-3


def test_oracle_attenuates_the_true_artifacts():
    model, batch = tiny_vit(), images(2)
    activations = []
    handle = model.blocks[0].mlp.act.register_forward_hook(lambda _m, _a, out: activations.append(out))
    model.forward_features(batch)
    handle.remove()
    above = float(activations[0][:, 1:, 5].quantile(0.8))
    rule = FiringRule(0, (5,), above)
    true_sets = [{token for token in range(1, 17) if image[token, 5] > above} for image in activations[0]]
    itae = ITAE(select="oracle")
    expected = reference.forward(model, batch, itae, artifacts={2: true_sets})
    assert (output(model, batch, itae, truth=rule) - expected).abs().max() < 1e-5
    mask = torch.tensor([[token in tokens for token in range(1, 17)] for tokens in true_sets])
    assert (output(model, batch, itae, truth=mask) - expected).abs().max() < 1e-5


# --- attention maps --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("structure", ["plain", "registers", "qk_norm", "dinov3", "eva02_split", "rope_mixed"])
@pytest.mark.parametrize("block", [0, -1])
def test_attention_map_is_the_softmax_row(structure, block):
    model, batch = tiny_vit(structure), images(2, 40, 24)
    rows = {}

    def edit(image, row, logits):
        weights = logits.softmax(0)
        if row == 0:
            rows.setdefault(image, []).append(weights[model.num_prefix_tokens:])
        return weights

    x, options = reference.embedded(model, batch)
    for index, layer in enumerate(model.blocks):
        if index == block % 3:
            reference.attention(layer.attn, layer.norm1(x), edit, **options[index])
        x = layer(x, **options[index])
    expected = torch.stack([torch.stack(rows[image]) for image in range(2)]).view(2, 3, 5, 3)
    assert (attention_map(model, batch, block, heads="each") - expected).abs().max() < 1e-5
    assert (attention_map(model, batch, block) - expected.mean(1)).abs().max() < 1e-5


@pytest.mark.parametrize("block", [-2, -1])
@pytest.mark.parametrize("source", SOURCES)
def test_attention_map_under_a_setting_takes_weight_from_the_artifacts(source, block):
    model, batch = tiny_vit("registers"), images(2)
    itae = ITAE(source, [threshold_at(model, batch, source, 0.3, index) for index in (-2, -1)], "mask", blocks=2)
    with attenuate(model, itae):
        values = statistic(model, batch, source, block).view(2, 4, 4)
    artifacts = values <= itae.threshold[block] if itae.side == "low" else values >= itae.threshold[block]
    assert (attention_map(model, batch, block)[artifacts] > 0).all()
    assert (attention_map(model, batch, block, itae=itae)[artifacts] == 0).all()
    assert torch.equal(attention_map(model, batch, 0, itae=itae), attention_map(model, batch, 0))


@pytest.mark.parametrize("structure", ["registers", "dinov3_qkvb"])
def test_measurements_of_a_trainable_model_record_no_gradients(structure):
    model, batch = tiny_vit(structure).requires_grad_(True), images(2).requires_grad_(True)
    itae = ITAE("key", threshold_at(model, batch, "key", 0.3))
    maps = [attention_map(model, batch, itae=setting) for setting in (None, itae)]
    for measured in (token_norms(model, batch), *qkv_norms(model, batch).values(), *maps):
        assert np.isfinite(measured.numpy()).all()
    assert output(model, batch, itae).requires_grad  # attenuate itself records gradients


# --- bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("select", ["threshold", "oracle"])
@pytest.mark.parametrize(("name", "value"), [
    ("source", "keys"), ("attenuation", "zero"), ("rows", "some"), ("select", "best"), ("threshold", -1.0),
    ("threshold", math.nan), ("threshold", "high"), ("threshold", True), ("threshold", (1.0, 2.0)), ("alpha", 0),
    ("alpha", 1.0), ("alpha", "half"), ("blocks", 0), ("blocks", 1.5), ("seed", -1), ("seed", None), ("rank", 0),
    ("rank", 1.5), ("tail", "right"), ("tail", True),
    *(("threshold", rule) for rule in ("share:0%", "share:50%", "share:-1%", "share:x", "share:x%", "share:2",
                                       "share:1e999%", "share:1.2.3%", "sd:0", "sd:-1", "sd:three", "sd:inf", "sd:",
                                       "median", "3", "")),
])
def test_bad_settings_are_refused_in_one_line(name, value, select):
    with pytest.raises(ItaeError) as error:
        ITAE(**({"select": select} | {name: value}))
    assert f"{name}={value!r}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), [
    ("source", "KEY"), ("source", ["key"]), ("source", None), ("rows", True), ("alpha", True), ("alpha", None),
    ("threshold", "Auto"), ("threshold", [True]), ("threshold", {"key": 1.0}), ("blocks", True), ("blocks", "1"),
    ("blocks", np.float64(1)), ("seed", 0.0), ("seed", True), ("select", 1), ("attenuation", "Min")])
def test_values_that_mean_nothing_are_refused(name, value):
    with pytest.raises(ItaeError, match=name):
        ITAE(**{name: value})


@pytest.mark.parametrize("source", ["direction", "attention"])
def test_a_statistic_with_one_side_has_no_other(source):
    with pytest.raises(ItaeError, match=f"tail='low' with source='{source}'"):
        ITAE(source, tail="low")
    assert ITAE(source).side == ITAE(source, tail="high").side == "high"


def test_numbers_of_numpy_are_stored_as_python_s():
    setting = ITAE("key", 1.0, "scale", alpha=np.float32(0.5), blocks=np.int64(2), seed=np.uint8(3))
    assert json.loads(json.dumps(dataclasses.asdict(setting)))["seed"] == 3
    assert setting == ITAE("key", 1.0, "scale", alpha=0.5, blocks=2, seed=3)


def test_numpy_numbers_and_lists_are_thresholds():
    assert ITAE(threshold=np.float32(2)).thresholds == (2.0,)
    assert ITAE(threshold=[1, None], blocks=2).thresholds == (1, None)


@pytest.mark.parametrize(("itae", "truth", "named"), [
    (None, None, "itae=None"), ({"threshold": 1.0}, None, "itae={'threshold'"), ("itae", None, "itae='itae'"),
    (ITAE, None, "ITAE"), (ITAE(select="oracle"), np.ones((1, 16), bool), "truth="),
    (ITAE(select="oracle"), torch.ones(1, 16), "truth="),
    *((ITAE(threshold=rule), None, f"threshold='{rule}'.*fit_setting") for rule in ("auto", "share:2%", "sd:3")),
    (ITAE(threshold=1.0, attenuation="substitute"), None, "substitute.*fit_setting"),
    (ITAE("direction", 0.5, blocks=3), None, "direction.*blocks=2"),
    (ITAE("direction", 0.5, rank=25), None, "rank=25.* 24"),
    (ITAE(threshold=1.0, blocks=4), None, r"blocks=4 .* 3"),
    (ITAE(select="oracle"), None, "truth="),
    (ITAE(select="oracle", blocks=2), FiringRule(1, (0,), 0.0), "blocks=2"),
])
def test_settings_that_do_not_fit_the_model_are_refused(itae, truth, named):
    model = tiny_vit()
    with pytest.raises(ItaeError, match=named), attenuate(model, itae, truth=truth):
        pass
    assert hook_count(model) == 0


def test_bad_arguments_of_measurements():
    with pytest.raises(ItaeError, match="block 3"):
        attention_map(tiny_vit(), images(1), 3)
    for heads in ("all", "max", "", None, True, 0, ["mean"]):
        with pytest.raises(ItaeError, match=re.escape(f"heads={heads!r}")):
            attention_map(tiny_vit(), images(1), heads=heads)
    with pytest.raises(ItaeError, match="itae='min'"):
        attention_map(tiny_vit(), images(1), itae="min")
    for first in (-1, 1.5, True, None):
        with pytest.raises(ItaeError, match=f"first_image={first}"), attenuate(tiny_vit(), ITAE(threshold=1.0),
                                                                              first_image=first):
            pass
    for measure in (token_norms, qkv_norms, attention_map):
        with pytest.raises(ItaeError, match="size 30"):
            measure(tiny_vit(), images(1, 32, 30))
