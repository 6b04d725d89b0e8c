import dataclasses
import re

import numpy as np
import pytest
import torch

from itae_utils.data.datasets import load_dataset
from itae_utils.errors import ItaeError
from itae_utils.extraction import fitting
from itae_utils.extraction import neurons as neurons_module
from itae_utils.extraction.features import extract_features
from itae_utils.extraction.fitting import fit_setting, sampled_statistics
from itae_utils.extraction.neurons import TOP_K, find_register_neurons
from itae_utils.extraction.observation import sample_indices
from itae_utils.method.anatomy import adapt, tokens_entering
from itae_utils.method.artifacts import FiringRule
from itae_utils.method.attention import attenuate
from itae_utils.method.one_pass import OnePass
from itae_utils.method.register_setting import TestTimeRegisters
from itae_utils.method.registers import apply_registers, normed_registers
from itae_utils.method.setting import ATTENUATIONS, ITAE
from itae_utils.method.thresholds import fit_threshold
from itae_utils.models.backbones import load_backbone
from itae_utils.store.store import digest
from itae_utils.store.variants import setting_key
from tests import reference
from tests.conftest import array_dataset, as_backbone, dataset_tensor, setting, setup, statistic, threshold_at, tiny_vit


def by_block(pairs) -> dict[int, tuple[int, ...]]:
    return {block: tuple(sorted(unit for other, unit in pairs if other == block)) for block, _ in sorted(pairs)}


def norms_after(model, batch, block: int) -> torch.Tensor:
    return tokens_entering(model, batch, [block + 1])[block + 1][:, model.num_prefix_tokens:].norm(dim=-1)


# --- finding them -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("structure", ["registers", "dinov3_qkvb"])
def test_the_highest_scores_on_the_sample(structure):
    backbone, dataset, batch = setup(structure, count=20)
    model, first = backbone.model, sample_indices(20, 7, 3)
    norms = norms_after(model, batch[first], 1)
    threshold = float(norms.flatten().sort().values[-10:-8].mean())
    asked = TestTimeRegisters(threshold=threshold, top_layer=1, top_k=4)
    found = find_register_neurons(backbone, dataset, asked, sample=7, seed=3, batch_size=3)
    sets = [{model.num_prefix_tokens + int(patch) for patch in row.nonzero()} for row in norms > threshold]
    scores = np.array(reference.neuron_scores(model, batch[first], sets)[:2])
    pairs = sorted(np.ndindex(scores.shape), key=lambda pair: -scores[pair])[:4]
    assert found == dataclasses.replace(asked, neurons=by_block(pairs))
    others = norms_after(model, batch[sample_indices(20, 7, 3, second=True)], 1)
    with apply_registers(model, found):
        left = norms_after(model, batch[sample_indices(20, 7, 3, second=True)], 1)
    assert find_counts(found.reason) == ((left > threshold).sum(), (others > threshold).sum())
    assert find_register_neurons(backbone, dataset, dataclasses.replace(asked, top_layer=0), sample=7, seed=3,
                                 batch_size=3).neurons[0][0] == 0


def test_the_second_sample_is_of_other_images():
    first, second = sample_indices(20, 7, 3), sample_indices(20, 7, 3, second=True)
    assert len(second) == 7
    assert not set(first) & set(second)
    assert sample_indices(9, 7, 3, second=True).tolist() == sorted(second := set(sample_indices(9, 7, 3, second=True)))
    assert len(second) == 7
    assert sample_indices(5, 7, 3).tolist() == sample_indices(5, 7, 3, second=True).tolist() == list(range(5))


@pytest.fixture(scope="module")
def demo():
    return load_backbone("demo"), load_dataset("digits", limit=300)


@pytest.mark.slow
def test_the_planted_neurons_are_found_and_leave_no_outliers(demo):
    backbone, dataset = demo
    model, batch = backbone.model, dataset_tensor(backbone, dataset)
    found = find_register_neurons(backbone, dataset)
    assert found.top_layer == backbone.truth.block
    assert found.top_k == sum(len(units) for _, units in found.neurons)
    chosen = {(block, unit) for block, units in found.neurons for unit in units}
    planted = {(backbone.truth.block, unit) for unit in backbone.truth.neurons}
    assert planted <= chosen
    assert found.top_k <= min(number for number in TOP_K if number >= len(planted))
    norms = norms_after(model, batch, 4)
    assert found.threshold == fit_threshold(norms.numpy(), side="high", source="token").threshold
    outliers, hidden = norms > found.threshold, []
    assert outliers.sum() > 500
    handle = model.blocks[3].mlp.act.register_forward_hook(lambda _module, _args, units: hidden.append(units))
    with apply_registers(model, found):
        edited, last = tokens_entering(model, batch, [4, 5]), hidden.pop()
        written = model.blocks[3].mlp.fc2.register_forward_pre_hook(lambda _module, args: hidden.append(args[0]))
        tokens_entering(model, batch, [4])
        written.remove()
    handle.remove()
    left = edited[5][:, 2:].norm(dim=-1) > found.threshold
    assert left.sum() < 0.01 * outliers.sum()
    units = list(backbone.truth.neurons)
    moved = hidden[-1][..., units]
    assert (moved[:, [0, *range(2, 51)]] == 0).all()
    assert torch.equal(moved[:, 1], last[..., units].amax(1))
    held = edited[4][:, 1].norm(dim=-1)  # right after the block
    assert (held[outliers.any(1)] > found.threshold).all()


@pytest.mark.slow
def test_fewer_neurons_leave_more_outliers(demo):
    backbone, dataset = demo
    found = find_register_neurons(backbone, dataset)
    fewer = TOP_K[TOP_K.index(found.top_k) - 1]
    given = find_register_neurons(backbone, dataset, TestTimeRegisters(top_k=fewer))
    before, left = (find_counts(each.reason) for each in (given, found))
    assert before[1] == left[1]
    assert left[0] < 0.01 * left[1] <= before[0]


def find_counts(reason: str) -> tuple[int, int]:
    return tuple(map(int, re.search(r"leave (\d+) of (\d+)", reason).groups()))


@pytest.mark.slow
def test_nothing_is_found_in_the_clean_model(demo):
    _, dataset = demo
    clean = load_backbone("demo-clean")
    for form in ("token", "bias"):
        found = find_register_neurons(clean, dataset, TestTimeRegisters(form=form))
        assert found.neurons == ()
        assert "no outliers" in found.reason
        assert "\n" not in found.reason
    variants = {"ttr": TestTimeRegisters(), "bias": TestTimeRegisters(form="bias"), "baseline": None,
                "then": TestTimeRegisters(then=ITAE())}
    features = extract_features(clean, dataset, variants)
    for name in variants:
        assert np.array_equal(features[name], features["baseline"]), name
    assert features.thresholds["then"] == (None,)


def test_thresholds_without_outliers_and_numbers_that_do_not_suffice():
    backbone, dataset, batch = setup(count=12)
    norms = norms_after(backbone.model, batch, 1)
    found = find_register_neurons(backbone, dataset, TestTimeRegisters(threshold=float(norms.max()) + 1))
    assert found.neurons == ()
    assert "no norm is above" in found.reason
    found = find_register_neurons(backbone, dataset, TestTimeRegisters(threshold=float(norms.median())))
    assert found.neurons == ()
    assert re.search(r"no register neurons: even \d+ .*leave", found.reason)
    assert find_register_neurons(backbone, dataset).neurons == ()  # too few patches for a valley


def test_the_top_layer_is_the_first_block_with_outliers_not_with_a_stray_patch():
    backbone, dataset, batch = setup(count=150)
    after = [norms_after(backbone.model, batch, block).flatten().sort().values for block in (0, 1)]
    for rank, layer in [(-1, 1), (-4, 0)]:  # of 2,400 patches, 0.05 % are 1.2
        threshold = float((after[0][rank] + after[0][rank - 1]) / 2)
        assert (after[1] > threshold).float().mean() > 0.0005
        asked = TestTimeRegisters(threshold=threshold, top_k=2)
        assert find_register_neurons(backbone, dataset, asked).top_layer == layer


def test_means_are_those_of_the_register(demo):
    backbone, dataset = demo
    batch = dataset_tensor(backbone, dataset)
    asked = TestTimeRegisters({3: backbone.truth.neurons}, form="bias")
    found = find_register_neurons(backbone, dataset, asked, sample=20, seed=1)
    expected = normed_registers(backbone.model, batch[sample_indices(300, 20, 1)], asked).mean(0)
    assert np.abs(np.array(found.means) - expected.numpy()).max() < 1e-5
    assert dataclasses.replace(found, means=None) == asked


def test_neurons_and_means_are_found_once_for_the_same_sample(tmp_path, monkeypatch):
    backbone, dataset = as_backbone(tiny_vit()), array_dataset(12)
    norms = norms_after(backbone.model, dataset_tensor(backbone, dataset), 1)
    asked = TestTimeRegisters(threshold=float(norms.flatten().sort().values[-10]), top_k=3, form="bias")
    passes, measure = [], neurons_module.measured_batches
    monkeypatch.setattr(neurons_module, "measured_batches", lambda *args, **options: passes.append(1) or measure(
        *args, **options))

    def find(setting=asked, **options):
        passes.clear()
        return find_register_neurons(backbone, dataset, setting, **{"sample": 6, "store": tmp_path} | options)

    first = find()
    assert len(passes) == 4  # scores, outliers without and with the neurons, means
    again = find()
    assert not passes
    assert (again, again.reason) == (first, first.reason)
    assert find(store=None) == first
    for options in ({"sample": 5}, {"seed": 1}, {"batch_size": 5}, {"setting": dataclasses.replace(asked, top_k=2)}):
        find(**options)
        assert passes, options


# --- as variants ------------------------------------------------------------------------------------------------------

NEURONS = {0: (3, 7), 1: (1, 4, 20)}


def every_kind_of_variant(backbone, dataset) -> dict:
    late = {1: (1, 4, 20)}
    kinds = {"start": TestTimeRegisters(NEURONS), "late": TestTimeRegisters(late, insert="late"),
             "zero": TestTimeRegisters(late, form="zero"),
             "bias": find_register_neurons(backbone, dataset, TestTimeRegisters(NEURONS, form="bias"))}
    return kinds


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["plain", "dinov2", "swiglu", "norm_pre", "eva02_fused", "dinov3_qkvb"])
def test_extraction_gives_what_the_contexts_give(structure):
    backbone, dataset, batch = setup(structure, count=7)
    model, kinds = backbone.model, every_kind_of_variant(backbone, dataset)
    variants = {"itae": ITAE(threshold=threshold_at(model, batch, "key", 0.3)), "baseline": None} | kinds
    for name, registers in kinds.items():
        with apply_registers(model, registers):
            for source in ("key", "token", "attention"):
                theta = threshold_at(model, batch, source, 0.3)
                for attenuation in ATTENUATIONS:
                    variants[f"{name} {source} {attenuation}"] = dataclasses.replace(
                        registers, then=setting(source, theta, attenuation))
    features = extract_features(backbone, dataset, variants, batch_size=3)
    assert list(features) == list(variants)
    for name, variant in variants.items():
        if not isinstance(variant, TestTimeRegisters):
            continue
        with apply_registers(model, variant):
            expected = model(batch)
            if variant.then is not None:
                with attenuate(model, variant.then):
                    expected = model(batch)
        assert np.abs(features[name] - expected.numpy()).max() < 1e-5, name
        assert np.abs(features[name] - features["baseline"]).max() > 1e-4, name
    alone = extract_features(backbone, dataset, {name: variants[name] for name in ("itae", "baseline")}, batch_size=3)
    for name, values in alone.items():
        assert np.array_equal(values, features[name])


def test_registers_share_one_pass_of_their_own_and_late_ones_the_blocks_before():
    backbone, dataset, batch = setup("registers", count=6)
    model, kinds = backbone.model, every_kind_of_variant(backbone, dataset)
    variants = {"baseline": None, "itae": ITAE(threshold=1.0)} | kinds
    variants |= {f"{name} {theta}": dataclasses.replace(registers, then=ITAE(threshold=theta))
                 for name, registers in kinds.items() for theta in (1.0, 2.0)}
    ran = []
    handles = [block.register_forward_hook(lambda *_, index=index: ran.append(index))
               for index, block in enumerate(model.blocks)]
    OnePass(model, variants)(batch, 0)
    for handle in handles:
        handle.remove()
    assert OnePass(model, {"late": kinds["late"]}).kept == {1, 2}  # no other tokens stay in memory
    assert sorted(ran) == [0] * 3 + [1] * 5  # the model's; start and bias; late and zero from block 1 on


def test_images_without_artifacts_get_the_registers_own_feature():
    backbone, dataset, batch = setup("dinov2", count=6)
    registers = TestTimeRegisters(NEURONS)
    with apply_registers(backbone.model, registers):
        largest = statistic(backbone.model, batch, "attention").amax(1)
    theta = float(largest.sort().values[2:4].mean())
    edits = {name: dataclasses.replace(registers, then=setting("attention", theta, name)) for name in ATTENUATIONS}
    features = extract_features(backbone, dataset, {"ttr": registers} | edits)
    for name in edits:
        equal = (features[name] == features["ttr"]).all(1)
        assert equal.tolist() == (largest < theta).tolist(), name
        assert (features.artifact_counts[name] == 0).tolist() == equal.tolist()
    assert features.artifact_counts["ttr"].tolist() == [0] * 6


@pytest.mark.parametrize("rule", ["share:10%", "sd:1"])
def test_the_threshold_on_top_is_fitted_on_the_new_tokens(rule, tmp_path, monkeypatch):
    backbone, dataset = as_backbone(tiny_vit("dinov3")), array_dataset(9)
    registers = TestTimeRegisters({1: (1, 4, 20)}, insert="late")
    asked = {"then": dataclasses.replace(registers, then=ITAE("key", rule, "substitute")), "itae": ITAE("key", rule),
             "nothing": TestTimeRegisters({}, then=ITAE("key", rule))}
    passes, visit = [], fitting._visit
    monkeypatch.setattr(fitting, "_visit", lambda *args, **options: passes.append(1) or visit(*args, **options))
    for store, count in ((None, 4), (tmp_path, 3), (tmp_path, 0)):
        passes.clear()
        features = extract_features(backbone, dataset, asked, store=store)
        assert len(passes) == count  # statistics with and without registers, substitutes; "nothing" shares if stored
        with apply_registers(backbone.model, registers):
            values = sampled_statistics(backbone, dataset, sample=9, seed=0, batch_size=64)
            fit = statistic(backbone.model, dataset_tensor(backbone, dataset), "key").double().numpy()
        assert values[0, "key"].shape == values[2, "key"].shape == (9, 16)
        theta = np.quantile(fit, 0.1) if rule == "share:10%" else fit.mean() - fit.std()
        assert features.thresholds["then"] == (pytest.approx(theta, rel=1e-5),)
        assert features.variants["then"].then.substitutes is not None
        assert features.thresholds["itae"] == features.thresholds["nothing"] != features.thresholds["then"]
        assert np.array_equal(features["nothing"], features["itae"])
    assert features.variants["itae"] == fit_setting(backbone, dataset, asked["itae"])


def test_true_artifacts_are_those_of_the_unedited_pass():
    backbone, dataset, batch = setup("plain", count=4)
    backbone = dataclasses.replace(backbone, truth=FiringRule(1, (5, 6), 0.9))
    oracle = TestTimeRegisters({0: (1, 2, 3), 1: (5, 6)}, then=ITAE(select="oracle", attenuation="mask"))
    features = extract_features(backbone, dataset, {"oracle": oracle})
    with backbone.truth.capture(backbone.model) as captured:
        backbone.model(batch)
    assert features.artifact_counts["oracle"].tolist() == captured.mask.sum(1).tolist()
    with apply_registers(backbone.model, oracle), attenuate(backbone.model, oracle.then, truth=captured.mask):
        expected = backbone.model(batch)
    assert np.abs(features["oracle"] - expected.numpy()).max() < 1e-5


def test_features_are_stored_under_all_that_decides_them(tmp_path):
    backbone, dataset = as_backbone(tiny_vit()), array_dataset(6)
    one = TestTimeRegisters(NEURONS)
    other = [one, dataclasses.replace(one, neurons={1: (2,)}), dataclasses.replace(one, insert="late"),
             dataclasses.replace(one, form="zero"), dataclasses.replace(one, then=ITAE(threshold=1.0)),
             *(dataclasses.replace(one, form="bias", means=((number,) * 24,) * 3) for number in (0.5, 1.0)), None]
    assert len({digest(setting_key(each)) for each in other}) == len(other)
    same = dataclasses.replace(one, threshold=3.0, top_k=5, top_layer=1, shape=(3, 24), reason="given")
    assert setting_key(same) == setting_key(one)
    assert setting_key(TestTimeRegisters({})) == setting_key(None) == {}
    variants = {"ttr": one, "then": other[4], "baseline": None}
    first = extract_features(backbone, dataset, variants, store=tmp_path)
    again = extract_features(backbone, dataset, variants, store=tmp_path)
    assert set(again.computed.values()) == {0}
    for name in variants:
        assert np.array_equal(again[name], first[name])


@pytest.mark.parametrize("structure", ["registers", "dinov3"])
def test_a_pass_reads_nothing_back_from_the_device(structure):
    backbone, dataset, batch = setup(structure, count=3)
    kinds = every_kind_of_variant(backbone, dataset)
    kinds |= {f"{name}, then": dataclasses.replace(each, then=ITAE(threshold=1.0)) for name, each in kinds.items()}
    run = OnePass(backbone.model, kinds)
    backbone.model.to("meta")
    assert {tuple(output.shape) for output, _ in run(batch.to("meta"), 0).values()} == {(3, 24)}


def test_bfloat16_is_close():
    backbone, dataset, _ = setup("dinov2", count=6)
    variants = every_kind_of_variant(backbone, dataset)
    full = extract_features(backbone, dataset, variants)
    half = extract_features(as_backbone(backbone.model, precision="bf16"), dataset, variants)
    for name in variants:
        lengths = np.linalg.norm(full[name], axis=1) * np.linalg.norm(half[name], axis=1)
        assert ((full[name] * half[name]).sum(1) / lengths).min() > 0.99, name


# --- bad input --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("asked", "words"), [
    (TestTimeRegisters(top_layer=2), "top_layer=2"), (TestTimeRegisters.preset("dinov2_vitl14"), r"\(24, 1024\)"),
    (TestTimeRegisters({1: (96,)}), "neuron 96"), (TestTimeRegisters(then=ITAE(select="oracle")), "oracle"),
    (ITAE(), "TestTimeRegisters")])
def test_settings_that_the_model_can_t_run_are_refused(asked, words):
    backbone, dataset, _ = setup()
    if not isinstance(asked, ITAE):
        with pytest.raises(ItaeError, match=words) as error:
            extract_features(backbone, dataset, {"ttr": asked})
        assert "\n" not in str(error.value)
    if "oracle" not in words:
        with pytest.raises(ItaeError, match=words):
            find_register_neurons(backbone, dataset, asked)


def test_an_open_context_is_refused_and_nothing_is_left_after_a_failed_pass():
    backbone, dataset, batch = setup()
    with apply_registers(backbone.model, TestTimeRegisters(NEURONS)), pytest.raises(ItaeError, match="apply_registers"):
        find_register_neurons(backbone, dataset)
    backbone.model.blocks[1].mlp.fc1 = torch.nn.Linear(5, 5)
    with pytest.raises(RuntimeError):
        find_register_neurons(backbone, dataset, TestTimeRegisters(NEURONS, form="bias"))
    with pytest.raises(RuntimeError):
        OnePass(backbone.model, {"ttr": TestTimeRegisters(NEURONS)})(batch, 0)
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in backbone.model.modules()) == 0
    assert adapt(backbone.model).num_prefix_tokens == backbone.model.num_prefix_tokens == 5
