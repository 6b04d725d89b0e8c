import dataclasses

import numpy as np
import pytest
import torch

from itae_utils.analysis.bench import bench_table, bench_targets, register_checks
from itae_utils.data.datasets import load_dataset
from itae_utils.extraction.neurons import find_register_neurons
from itae_utils.method.register_setting import TestTimeRegisters
from itae_utils.method.registers import apply_registers
from itae_utils.models.backbones import load_backbone
from tests import reference
from tests.conftest import dataset_tensor

ACC = {"raw pixels": 0.80, "baseline": 0.70, "demo-clean": 0.90, "itae": 0.88, "random control": 0.71}


def bench(acc=ACC, *, missed=0, wrong=0, found_any=True):
    truth = np.zeros(1000, dtype=bool)
    truth[:200] = True
    found = truth.copy()
    found[:missed] = False
    found[500:500 + wrong] = True
    found &= found_any
    return bench_targets(acc, found, truth)


def test_bench_targets_are_numbers():
    table = bench()
    assert table.met.all()
    assert table.measured.tolist() == pytest.approx([0.1, 0.2, 1, 1, 0.9, 0.05])
    texts = bench_table(table)
    assert list(texts.index) == list(table.index)
    assert texts.measured.tolist() == ["+0.100", "+0.200", "1.0000", "1.0000", "90 %", "5 %"]
    assert set(texts.verdict) == {"met"}


@pytest.mark.parametrize(("changes", "options", "missed"), [
    ({"raw pixels": 0.83}, {}, [0]),
    ({"baseline": 0.83, "random control": 0.83}, {}, [1, 4]),
    ({}, {"wrong": 3}, [2]),
    ({}, {"missed": 3}, [3]),
    ({"itae": 0.85}, {}, [4]),
    ({"random control": 0.75}, {}, [5]),
    ({"baseline": 0.95}, {}, [1, 4, 5]),
])
def test_bench_targets_not_met(changes, options, missed):
    table = bench(ACC | changes, **options)
    assert np.flatnonzero(~table.met).tolist() == missed
    assert np.flatnonzero(bench_table(table).verdict == "not met").tolist() == missed


def test_targets_that_cannot_be_measured_are_not_met():
    table = bench(ACC | {"baseline": 0.95}, found_any=False)
    assert np.isnan(table.measured.to_numpy()).tolist() == [False, False, True, False, True, True]
    assert not table.met[1:].any()
    assert bench_table(table).measured.tolist()[2:] == ["–", "0.0000", "–", "–"]


@pytest.fixture(scope="module")
def planted():
    """The demo backbone, digits, and what is found on them."""
    backbone, digits = load_backbone("demo"), load_dataset("digits", limit=200)
    return backbone, digits, find_register_neurons(backbone, digits, store=None)


def last_block(model, batch):
    """Return the tokens that enter the last block, and its `[CLS]` row, mean over the heads; no mask, no rotation."""
    found = []
    handle = model.blocks[-1].register_forward_pre_hook(lambda _module, args: found.append(args[0]))
    model.forward_features(batch)
    handle.remove()
    (tokens,), block = found, model.blocks[-1]
    qkv = reference.projected(block.attn, block.norm1(tokens))
    rows = [[reference.row_logits(*reference.one_head(block.attn, image, head, None)[:2], 0).softmax(0)
             for head in range(block.attn.num_heads)] for image in qkv]
    return tokens, torch.stack([torch.stack(heads).mean(0) for heads in rows])


def test_the_registers_of_the_planted_backbone_do_what_they_say(planted):
    backbone, digits, found = planted
    indices = np.arange(0, 200, 8)
    (measured,) = register_checks(backbone, digits, found, indices, store=None, batch_size=7).to_numpy().T
    batch = dataset_tensor(backbone, digits)[indices]
    plain, _ = last_block(backbone.model, batch)
    with apply_registers(backbone.model, found):
        tokens, rows = last_block(backbone.model, batch)
    lengths = [[reference.length(token) for token in image] for image in tokens]
    long = sum(reference.length(token) > found.threshold for image in plain for token in image[1:])
    ratio = np.median([image[1] for image in lengths]) / np.median([image[2:] for image in lengths])
    assert long > 50
    neurons = backbone.truth.neurons
    more = sum(len(units) for _, units in found.neurons) - len(neurons)
    assert measured[:4].tolist() == [f"{len(neurons)} of {len(neurons)}", str(more), "0", f"{long} → 0"]
    assert float(measured[4].split()[0]) == pytest.approx(ratio, rel=0.01)
    assert float(measured[5].split()[0]) == pytest.approx(100 * float(rows[:, 1].mean()), abs=0.6)
    assert ratio > 5


def test_checks_of_neurons_that_are_not_the_planted_ones(planted):
    backbone, digits, found = planted
    block, (first, *others) = backbone.truth.block, backbone.truth.neurons
    wrong = dataclasses.replace(found, neurons={block: (first,), 1: (3, 4)}, insert="late")
    (measured,) = register_checks(backbone, digits, wrong, np.arange(50), store=None).to_numpy().T
    assert others
    assert measured[:3].tolist() == [f"1 of {len(others) + 1}", "2", "0"]
    before, after = (int(count) for count in measured[3].split(" → "))
    assert before == int(register_checks(backbone, digits, found, np.arange(50)).measured.iloc[3].split(" → ")[0])
    assert 0 < after <= before


def test_a_found_neuron_that_stays_active_is_seen(planted, monkeypatch):
    backbone, digits, found = planted
    (block, units), *_ = found.neurons
    monkeypatch.setattr("itae_utils.analysis.bench.apply_registers",
                        lambda model, _: apply_registers(model, TestTimeRegisters({block: units[1:]})))
    (measured,) = register_checks(backbone, digits, found, np.arange(20)).to_numpy().T
    assert float(measured[2]) > 1


def test_in_bfloat16_the_same_is_found(planted):
    backbone, digits, found = planted
    half = dataclasses.replace(backbone, precision="bf16")
    (full, measured) = (register_checks(each, digits, found, np.arange(20), store=None).to_numpy().T[0]
                        for each in (backbone, half))
    assert measured[:3].tolist() == full[:3].tolist()
    for row in (4, 5):
        assert float(measured[row].split()[0]) == pytest.approx(float(full[row].split()[0]), rel=0.05)
