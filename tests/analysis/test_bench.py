import numpy as np
import pytest

from itae_utils.analysis.bench import bench_table, bench_targets

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
