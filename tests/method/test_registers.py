import copy
import dataclasses
import pickle

import pytest
import torch

from itae_utils.errors import ItaeError
from itae_utils.method.attention import attention_map, attenuate
from itae_utils.method.register_setting import PRESETS, TestTimeRegisters, parted
from itae_utils.method.registers import apply_registers, has_registers, normed_registers, outlier_activations
from itae_utils.method.setting import ITAE
from itae_utils.method.statistics import qkv_norms, token_norms
from tests import reference
from tests.conftest import STRUCTURES, images, threshold_at, tiny_vit

NEURONS = {0: (3, 7), 1: (1, 4, 20)}
WITH_BIAS = [name for name, options in STRUCTURES.items() if not options.get("qk_norm") and name != "one_block"]
FORMS = [TestTimeRegisters(NEURONS), TestTimeRegisters({1: (1, 4, 20)}, insert="late"),
         TestTimeRegisters(NEURONS, form="zero"), TestTimeRegisters({1: (1, 4, 20)}, form="bias")]


def name_of(setting) -> str:
    return f"{setting.form}-{setting.insert}"


def fitted(model, setting):
    """Return the setting with the means of a sample, and the columns of the reference."""
    if setting.form != "bias":
        return setting, None
    sample, seen = images(3), []
    reference.forward_with_registers(model, sample, dict(setting.neurons), seen=seen)
    means = normed_registers(model, sample, setting).double().mean(0)
    columns = [[part.double().mean(0).float() for part in block] for block in seen]
    return dataclasses.replace(setting, means=tuple(map(tuple, means.tolist()))), columns


def expected(model, batch, setting, columns=None, itae=None):
    first = setting.first_block if setting.form == "token" else None
    return reference.forward_with_registers(model, batch, dict(setting.neurons), first=first, columns=columns,
                                            itae=itae)


def output(model, batch, setting):
    with apply_registers(model, setting):
        tokens = model.forward_features(batch)
        added = model.num_prefix_tokens
    place = model.num_prefix_tokens
    assert added == place + (setting.form != "zero")
    return torch.cat([tokens[:, :place], tokens[:, added:]], dim=1)


def state(model):
    """Return what a context may change: hooks, and the numbers of prefix tokens."""
    modules = list(model.modules())
    return ([getattr(module, "num_prefix_tokens", None) for module in modules],
            sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules), len(vars(model)))


# --- the equations ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("setting", FORMS, ids=name_of)
@pytest.mark.parametrize("structure", WITH_BIAS)
def test_each_form_follows_the_equations(structure, setting, count):
    model, batch = tiny_vit(structure), images(count)
    before, plain = state(model), model.forward_features(batch)
    setting, columns = fitted(model, setting)
    found = output(model, batch, setting)
    assert (found - expected(model, batch, setting, columns)).abs().max() < 1e-5
    assert (found - torch.cat([output(model, image[None], setting) for image in batch])).abs().max() < 1e-5
    assert (found - plain).abs().max() > 1e-2
    assert state(model) == before
    assert torch.equal(model.forward_features(batch), plain)


@pytest.mark.parametrize("setting", FORMS[:3], ids=name_of)
@pytest.mark.parametrize("structure", ["qk_norm", "rope_mixed"])
def test_models_that_norm_their_keys(structure, setting):
    model, batch = tiny_vit(structure), images(2)
    assert (output(model, batch, setting) - expected(model, batch, setting)).abs().max() < 1e-5


def test_the_bias_form_needs_keys_without_a_norm():
    refused(tiny_vit("qk_norm"), TestTimeRegisters(NEURONS, form="bias", means=((0.0,) * 24,) * 3), "norms its keys")


def test_late_at_the_first_block_is_the_start():
    model, batch = tiny_vit("norm_pre"), images(2)
    late = TestTimeRegisters(NEURONS, insert="late")
    assert torch.equal(output(model, batch, late), output(model, batch, TestTimeRegisters(NEURONS)))
    one = TestTimeRegisters({1: (1,)})
    later = dataclasses.replace(one, insert="late")
    assert (output(model, batch, one) - output(model, batch, later)).abs().max() > 1e-3


@pytest.mark.parametrize("structure", ["plain", "registers", "eva", "dinov3"])
@pytest.mark.parametrize("setting", FORMS, ids=name_of)
def test_other_image_sizes(structure, setting):
    """The position embedding is resized as before, although the model counts one more prefix token."""
    model, batch = tiny_vit(structure), images(2, 16, 24)
    setting, columns = fitted(model, setting)
    for _ in range(2):
        assert (output(model, batch, setting) - expected(model, batch, setting, columns)).abs().max() < 1e-5


@pytest.mark.parametrize("structure", ["registers", "dinov3"])
def test_gradients_pass_through(structure):
    model, batch = tiny_vit(structure).requires_grad_(True), images(2)
    with apply_registers(model, FORMS[0]):
        tokens = model.forward_features(batch)
    gradient = torch.autograd.grad(tokens[:, 0].sum(), model.blocks[0].mlp.fc1.weight)[0]
    silent = torch.autograd.grad(output(model, batch, FORMS[2])[:, 0].sum(), model.blocks[0].mlp.fc1.weight)[0]
    assert torch.isfinite(gradient).all()
    assert gradient[3].abs().max() > 0
    assert silent[3].abs().max() == 0


# --- with ITAE --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("setting", "source"), [
    (setting, source) for setting in FORMS for source in ("key", "token", "attention")
    if (setting.form, source) != ("bias", "attention")])  # the reference has no column in this statistic
@pytest.mark.parametrize("structure", ["plain", "dinov2", "eva02_fused", "dinov3_qkvb"])
def test_itae_acts_on_the_new_tokens_whichever_context_is_opened_first(structure, setting, source):
    model, batch = tiny_vit(structure), images(3)
    before = state(model)
    setting, columns = fitted(model, setting)
    with apply_registers(model, setting):
        theta = threshold_at(model, batch, source, 0.3)
    itae = ITAE(source, theta, "mask")
    wanted = expected(model, batch, setting, columns, itae)
    assert (wanted - expected(model, batch, setting, columns))[:, 0].abs().max() > 1e-3
    with apply_registers(model, setting), attenuate(model, itae):
        outside = model.forward_features(batch)
        rows = attention_map(model, batch)
    with attenuate(model, itae), apply_registers(model, setting):
        inside = model.forward_features(batch)
        assert torch.equal(attention_map(model, batch), rows)
    assert (outside[:, 0] - wanted[:, 0]).abs().max() < 1e-5
    assert (inside[:, 0] - wanted[:, 0]).abs().max() < 1e-5
    assert state(model) == before


@pytest.mark.parametrize("source", ["key", "token"])
def test_itae_in_blocks_before_a_late_token(source):
    model, batch = tiny_vit("dinov3"), images(2)
    itae = ITAE(source, [threshold_at(model, batch, source, 0.8, block) for block in range(3)], "mask", blocks=3)
    late, found = TestTimeRegisters({1: (2,)}, insert="late"), []
    for outer, inner in [(late, itae), (itae, late)]:
        with context(model, outer), context(model, inner):
            found.append(model.forward_features(batch))
    assert torch.equal(*found)
    with attenuate(model, itae):
        entering = reference_inputs(model, batch)[1]
    with apply_registers(model, late), attenuate(model, itae):
        tokens = reference_inputs(model, batch)[1]
    assert torch.equal(tokens[:, [*range(5), *range(6, 22)]], entering)  # block 0 counts its own prefix tokens


def context(model, setting):
    return attenuate(model, setting) if isinstance(setting, ITAE) else apply_registers(model, setting)


def reference_inputs(model, batch):
    found, handles = [], []
    for block in model.blocks:
        handles.append(block.register_forward_hook(lambda _module, args, _output: found.append(args[0])))
    model.forward_features(batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("setting", FORMS, ids=name_of)
def test_what_is_measured_of_patches_leaves_the_extra_token_out(setting):
    model, batch = tiny_vit("dinov3"), images(2)
    setting, _ = fitted(model, setting)
    with apply_registers(model, setting):
        inputs = reference_inputs(model, batch)
        norms = token_norms(model, batch)
        keys = [qkv_norms(model, batch, block)["key"].flatten(1) for block in range(3)]
        maps = [attention_map(model, batch, block).flatten(1) for block in range(3)]
    assert norms.shape == (2, 3, 4, 4)
    for block in (0, 1):
        assert torch.allclose(norms[:, block].flatten(1), inputs[block + 1][:, -16:].norm(dim=-1))
    assert [each.shape for each in (*keys, *maps)] == [(2, 16)] * 6
    assert torch.allclose(keys[0], qkv_norms(model, batch, 0)["key"].flatten(1), atol=1e-5)


# --- contexts ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("setting", FORMS, ids=name_of)
def test_all_is_as_before_after_an_exception(setting):
    model, batch = tiny_vit("dinov3"), images(1)
    before, plain = state(model), model.forward_features(batch)
    setting, _ = fitted(model, setting)
    with apply_registers(model, setting):
        assert has_registers(model)
    for place in ("norm_pre", "norm"):  # before and after the token has entered

        def fail(*_args):
            raise RuntimeError("made")

        handle = getattr(model, place).register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="made"), apply_registers(model, setting), attenuate(
                model, ITAE(threshold=1.0)):
            model.forward_features(batch)
        handle.remove()
    assert state(model) == before
    assert not has_registers(model)
    assert torch.equal(model.forward_features(batch), plain)


def test_a_failed_pass_leaves_nothing_behind_for_the_next():
    model, batch = tiny_vit("plain"), images(2)
    fixed = output(model, batch, FORMS[0])
    with apply_registers(model, FORMS[0]):
        with pytest.raises((RuntimeError, AssertionError)):
            model.forward_features(batch[:, :2])
        assert torch.equal(torch.cat([(tokens := model.forward_features(batch))[:, :1], tokens[:, 2:]], dim=1), fixed)


@pytest.mark.parametrize("compiled", ["model", "blocks", "outside"])
def test_compiled_models_get_registers_too(compiled):
    torch._dynamo.reset()
    model, batch, setting = tiny_vit("dinov3"), images(2), FORMS[0]
    plain, edited = model(batch), output(model, batch, setting)[:, 0]
    for module in {"model": [model], "blocks": model.blocks, "outside": []}[compiled]:
        module.compile(backend="eager")
    run = torch.compile(model, backend="eager") if compiled == "outside" else model
    for _ in range(2):
        assert (run(batch) - plain).abs().max() < 1e-4
        with apply_registers(model, setting):
            assert (run(batch) - edited).abs().max() < 1e-4
    outliers = images(2)[:, 0, ::8, ::8].flatten(1) > 0.5
    assert (outlier_activations(model, batch, outliers, 1)
            - outlier_activations(tiny_vit("dinov3"), batch, outliers, 1)).abs().max() < 1e-4
    torch._dynamo.reset()


def test_without_neurons_nothing_is_done():
    model, batch = tiny_vit("registers"), images(2)
    plain = model.forward_features(batch)
    for form in ("token", "bias", "zero"):
        with apply_registers(model, TestTimeRegisters({2: ()}, form=form)):
            assert torch.equal(model.forward_features(batch), plain)
            assert not has_registers(model)


def test_hooks_stay_with_their_model():
    model = tiny_vit("registers")
    with apply_registers(model, FORMS[0]):
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert not any(hook.func.__name__ == "_move" for module in twin.modules()
                       for hook in module._forward_pre_hooks.values())


# --- scores -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("structure", ["registers", "swiglu", "eva02_split", "scale_norm"])
def test_scores_are_means_over_outlier_patches(structure):
    model, batch = tiny_vit(structure), images(5)
    outliers = torch.rand(5, 16, generator=torch.Generator().manual_seed(1)) > 0.8
    outliers[:, 3], outliers[2] = True, False
    sets = [{model.num_prefix_tokens + int(patch) for patch in row.nonzero()} for row in outliers]
    wanted = torch.tensor(reference.neuron_scores(model, batch, sets))
    found = outlier_activations(model, batch, outliers, 1)
    assert found.shape == (4, 2, wanted.shape[1])
    assert (found.mean(0) - wanted[:2]).abs().max() < 1e-5
    assert found.min() < -0.01  # signed
    assert state(model)[1] == 0


# --- bad input --------------------------------------------------------------------------------------------------------

def refused(model, setting, words):
    before = state(model)
    with pytest.raises(ItaeError, match=words) as error, apply_registers(model, setting):
        pass
    assert "\n" not in str(error.value)
    assert state(model) == before


@pytest.mark.parametrize(("setting", "words"), [
    (TestTimeRegisters(), "find_register_neurons"),
    (TestTimeRegisters(NEURONS, form="bias"), "find_register_neurons"),
    (TestTimeRegisters(NEURONS, top_layer=2), "top_layer=2 of 3 blocks"),
    (TestTimeRegisters({2: (1,)}), "block 2.* 0 to 1$"),
    (TestTimeRegisters({1: (96,)}), "neuron 96 of block 1.* 0 to 95 "),
    (TestTimeRegisters.preset("dinov2_vitl14", neurons=NEURONS), r"\(24, 1024\).*\(3, 24\)"),
    (TestTimeRegisters.preset("openclip_vitb16"), r"\(12, 768\)"),
    (TestTimeRegisters(NEURONS, form="bias", means=((0.0,) * 24,)), "another model"),
    (ITAE(threshold=1.0), "ITAE"),
])
def test_settings_that_a_model_can_t_run(setting, words):
    refused(tiny_vit(), setting, words)


def test_models_that_can_t_run_a_setting():
    refused(tiny_vit("one_block"), TestTimeRegisters(NEURONS), "of 1 blocks")
    model = tiny_vit()
    model.blocks[1].mlp = torch.nn.Sequential(torch.nn.Linear(24, 24))
    refused(model, TestTimeRegisters(NEURONS), "block 1.*Sequential")
    refused(model, TestTimeRegisters(), "block 1.*Sequential")
    model = tiny_vit()
    with apply_registers(model, FORMS[0]):
        with pytest.raises(ItaeError, match="already"), apply_registers(model, FORMS[2]):
            pass
        assert has_registers(model)


@pytest.mark.parametrize("options", [
    {"neurons": "all"}, {"neurons": {-1: (1,)}}, {"neurons": {0: (1.5,)}}, {"neurons": {0: 1}}, {"neurons": None},
    {"form": "row"}, {"insert": "end"}, {"threshold": 0}, {"threshold": "share:2%"}, {"top_layer": -1}, {"top_k": 0},
    {"then": ITAE(blocks=2)}, {"then": "itae"}])
def test_values_that_are_refused(options):
    with pytest.raises(ItaeError, match=next(iter(options))) as error:
        TestTimeRegisters(**options)
    assert "\n" not in str(error.value)
    with pytest.raises(ItaeError, match="dinov2_vitl14"):
        TestTimeRegisters.preset("vitl")


def test_a_setting_is_a_value():
    setting = TestTimeRegisters({5: [9, 2, 2], 3: range(2), 4: ()}, form="zero", insert="late", then=ITAE())
    assert dict(setting.neurons) == {3: (0, 1), 5: (2, 9)}
    assert setting.first_block == 3
    assert setting.insert == "start"
    assert setting == pickle.loads(pickle.dumps(setting)) == dataclasses.replace(setting, reason="found")
    assert hash(setting) == hash(dataclasses.replace(setting))
    alone, itae = parted(setting)
    assert (alone, itae) == (dataclasses.replace(setting, then=None), ITAE())
    assert parted(TestTimeRegisters({}, then=ITAE())) == (None, ITAE())
    assert parted(ITAE()) == (None, ITAE())
    assert parted(None) == (None, None)
    for name, numbers in PRESETS.items():
        preset = TestTimeRegisters.preset(name, form="zero")
        assert (preset.neurons, preset.form, preset.shape) == ("auto", "zero", numbers["shape"])
