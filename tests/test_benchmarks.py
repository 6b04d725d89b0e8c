import itertools
import json
import os
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench, memory, wholes
from benchmarks.contenders import (
    EAGER,
    PLAIN,
    SIZES,
    contender_names,
    loop,
    make_contenders,
    make_variants,
    make_workload,
    ours,
)
from benchmarks.passes import check_agreement, flop
from benchmarks.summary import HEADINGS, summarize, table
from benchmarks.timing import Conditions, interleaved
from itae_utils.method.artifacts import qkv_norms
from itae_utils.method.setting import ATTENUATIONS

HOW = Conditions()


@pytest.fixture(autouse=True)
def _environment_is_brought_back(monkeypatch):
    for name in ("ITAE_PROGRESS", "ITAE_CACHE"):  # the command sets them
        monkeypatch.setenv(name, os.environ.get(name, ""))


@pytest.fixture(scope="module")
def work():
    with torch.inference_mode():
        return make_workload("tiny", HOW)


@pytest.fixture(scope="module")
def outputs(work):
    with HOW.running():
        return {name: run(work.images) for name, run in make_contenders(work, HOW).items()}


@pytest.fixture
def run_bench(tmp_path, monkeypatch):
    """Runs the command on the tiny model, and gives what it printed and the numbers it wrote."""
    for name, small in {"SEEDS": 1, "N_INIT": 1, "DIGITS": 60, "FEW_IMAGES": 12, "BATCHES": {"cpu": 1}}.items():
        monkeypatch.setattr(wholes, name, small)

    def run(*options: str):
        output = tmp_path / "bench.json"
        done = CliRunner().invoke(bench.main, ["--sizes", "tiny", "--output", str(output), *options])
        assert done.exit_code == 0, done.output
        return done, json.loads(output.read_text())

    return run


def faked(monkeypatch, **parts):
    """Measuring replaced by what is given."""
    monkeypatch.setattr(bench, "_measures", lambda: {part: lambda size, how, found=found: found
                                                     for part, found in parts.items()})


def scaling(seconds: float) -> dict:
    return {"counts": {"images": [10, 100]}, "seconds": {"10 images": [1.0], "100 images": [seconds]}}


def passes(size: str, **seconds) -> dict:
    """Every contender as slow as a plain pass, but for those given."""
    times = {name: [1.0] * 3 for name in contender_names(size)} | seconds
    return {"model": "m", "batch": 2, "image_size": 56, "seconds": times, "flop_per_image": 3e9,
            "matmul_flop_per_second": 12e9, "agreement": {"largest_difference": 1e-6, "smallest_effect": 0.1}}


def row_of(rows, heading, what):
    return next(row for row in rows if (row["heading"], row["what"]) == (heading, what))


def test_contenders_are_those_that_are_named(work, outputs):
    assert list(outputs) == contender_names("tiny")
    assert [len(outputs[ours(count)]) for count in (0, 1, 8, 48)] == [1, 2, 9, 49]
    assert len(outputs[loop(8)]) == 8
    assert {features.shape for ways in outputs.values() for features in ways.values()} == {(4, 48)}


def test_contenders_give_the_same_features(outputs):
    baseline = outputs[PLAIN]["baseline"]
    torch.testing.assert_close(outputs[ours(0)]["baseline"], baseline, atol=1e-4, rtol=0)
    for one, other in [(EAGER, ours(1)), (loop(8), ours(8)), (ours(8), ours(48))]:
        for name in outputs[one]:
            torch.testing.assert_close(outputs[one][name], outputs[other][name], atol=1e-4, rtol=0)
    for name, features in outputs[loop(8)].items():
        assert (features - baseline).abs().max() > 1e-2, name


def test_contenders_that_disagree_are_not_compared(outputs):
    agreement = check_agreement("tiny", outputs, "fp32")
    assert agreement["largest_difference"] < 1e-4 < 1e-2 < agreement["smallest_effect"]
    wrong = outputs | {EAGER: {name: features + 0.01 for name, features in outputs[EAGER].items()}}
    with pytest.raises(RuntimeError, match=r"differ by 0\.01"):
        check_agreement("tiny", wrong, "fp32")
    assert check_agreement("tiny", wrong, "bf16")["largest_difference"] == pytest.approx(0.01, rel=0.01)


def test_the_eager_hook_leaves_the_model_as_it_was(work):
    seen = []
    handle = work.model.blocks[0].attn.attn_drop.register_forward_hook(lambda _m, _a, maps: seen.append(maps.shape))
    contenders = make_contenders(work, HOW)
    before = work.model.forward_features(work.images)
    assert not seen  # fused attention makes no maps
    contenders[EAGER](work.images)
    assert seen == [(4, 3, 17, 17)]
    handle.remove()
    assert torch.equal(work.model.forward_features(work.images), before)
    assert not work.model.blocks[-1].attn.qkv._forward_hooks


def test_variants_are_all_different_and_the_first_few_spread_over_the_settings():
    work = make_workload("tiny", Conditions(batch=16))
    variants = make_variants(work, 60, HOW)
    assert len({(itae.source, itae.attenuation, itae.threshold) for itae in variants.values()}) == 60
    assert next(iter(variants)) == "key min 5%"
    first = list(itertools.islice(variants.values(), 8))
    assert {itae.source for itae in first} == {"query", "key", "value"}
    assert {itae.attenuation for itae in first} == set(ATTENUATIONS)
    norms = qkv_norms(work.model, work.images)
    for name, itae in variants.items():
        share = float((norms[itae.source] <= itae.threshold).double().mean())
        assert share == pytest.approx(float(name.split()[-1].removesuffix("%")) / 100, abs=0.5 / 256), name


def test_each_repeat_runs_every_call_once_and_starts_one_further_on():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = interleaved(calls, Conditions(repeats=4))
    assert "".join(order) == "abc" "bca" "cab" "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert min(min(times) for times in seconds.values()) >= 0


def test_long_calls_run_in_the_first_turn_alone():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = interleaved(calls, Conditions(repeats=2), turns=2, once=["b"])
    assert "".join(order) == "abc" "ca" "cab" "ac"
    assert {len(times) for times in seconds.values()} == {2}


def test_operations_are_those_that_torch_counts(work):
    for block in work.model.blocks:
        block.attn.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        work.model.forward_features(work.images[:1])
    for block in work.model.blocks:
        block.attn.fused_attn = True
    assert flop(work.model) == counter.get_total_flops()


def test_ratios_are_taken_within_a_repeat():
    """The machine slows down in the second repeat: within each, ours takes 0.9 of plain."""
    times = {PLAIN: [1.0, 3.0, 1.0], ours(1): [0.9, 2.7, 0.91]}
    rows = summarize({"environment": {"on_gpu": False}, "passes": {"S": passes("S", **times)}})
    row = row_of(rows, "passes", ours(1))
    assert (row["ratio"], row["low"], row["high"]) == tuple(map(pytest.approx, (0.9, 0.9, 0.91)))
    assert (row["target"], row["verdict"]) == ("≤ 0.92", "met")
    assert row_of(rows, "rate", PLAIN)["ratio"] == pytest.approx(2 * 3e9 / 12e9)


def test_a_target_is_met_or_missed_by_so_much():
    run = {"environment": {"on_gpu": False}, "passes": {"S": passes("S", **{loop(48): [44.0] * 3}), "L": passes("L")},
           "memory": {"S": {"growth": {name: 100 + 50 * (name == ours(8)) for name in contender_names("S")}}}}
    rows = summarize(run)
    assert [row["verdict"] for row in rows if row["what"] == ours(48) and row["heading"] == "passes"] == [
        "missed by 0.030", "met"]
    assert row_of(rows, "loop", loop(48))["verdict"] == "missed by 1.000"
    assert row_of(rows, "memory", ours(8))["verdict"] == "missed by 0.400"
    assert [row["size"] for row in rows if row["heading"] == "passes"] == ["S"] * 9 + ["L"] * 9


def test_a_loop_that_was_run_8_times_is_told_as_such_and_extrapolated():
    times = {loop(8): [8.0] * 3, ours(8): [1.0] * 3, ours(48): [1.5] * 3}
    rows = summarize({"environment": {"on_gpu": False}, "passes": {"B": passes("B", **times)}})
    measured = row_of(rows, "loop", loop(8))
    extrapolated = row_of(rows, "loop", "loop, 48 variants (extrapolated from 8)")
    assert (measured["ratio"], measured["target"]) == (pytest.approx(8), None)
    assert (extrapolated["ratio"], extrapolated["verdict"]) == (pytest.approx(32), "missed by 13.000")


def test_reading_files_has_a_target_on_a_gpu_alone():
    files = {"files": {"L": {"seconds": {"bare forward": [0.9], "from files": [1.0]}}}}
    on_cpu, on_gpu = (summarize({"environment": {"on_gpu": gpu}} | files)[0] for gpu in (False, True))
    assert (on_cpu["ratio"], on_cpu["target"]) == (pytest.approx(0.9), None)
    assert (on_gpu["target"], on_gpu["verdict"]) == ("≥ 0.95", "missed by 0.050")


def test_the_table_has_a_line_a_row_below_its_heading():
    run = {"environment": {"on_gpu": False}, "passes": {"S": passes("S", **{ours(1): [0.8, 0.9, 1.0]})}}
    run["summary"] = summarize(run)
    lines = list(table(run))
    assert "ViT-S: m, 56 px, batch 2, times of 3 repeats: median, lowest – highest" in lines
    assert lines.index(HEADINGS["passes"]) < lines.index(HEADINGS["loop"])
    assert f"  S    {ours(1):<50}   0.900  0.800 – 1.000      ≤ 0.92: met" in lines


def test_the_whole_command_writes_numbers_and_a_figure(run_bench, tmp_path):
    done, contents = run_bench("--parts", "passes,files,kmeans,scaling,store", "--repeats", "2")
    (run,) = contents["runs"]
    assert run["environment"]["device"]
    assert run["environment"]["torch"] == torch.__version__.partition("+")[0]
    seconds = run["passes"]["tiny"]["seconds"]
    assert list(seconds) == contender_names("tiny")
    assert {len(times) for times in seconds.values()} == {2}
    assert run["scaling"]["tiny"]["counts"] == {"images": [12, 120], "variants": [5, 50], "tokens": [26, 257]}
    assert set(run["kmeans"]["demo"]["seconds"]) == {"features", "k-means"}
    assert run["files"]["tiny"]["images"] == SIZES["tiny"].batches["cpu"]
    assert {row["heading"] for row in run["summary"]} == set(HEADINGS) - {"memory"}
    assert all(np.isfinite(row["ratio"]) and row["ratio"] > 0 for row in run["summary"])
    assert (tmp_path / "figures" / "bench.png").stat().st_size > 10_000
    assert HEADINGS["passes"] in done.stdout
    assert "2 repeats tell little" in done.stderr


def test_a_warm_store_is_a_second_run_on_what_the_first_left(monkeypatch):
    monkeypatch.setattr(wholes, "BATCHES", {"cpu": 1})
    monkeypatch.setattr(wholes, "PICTURES", 3)  # the fourth is a link
    computed, extract = [], wholes.extract_features

    def watched(*args, **options):
        features = extract(*args, **options)
        computed.append((options["store"] is not None, set(features.computed.values())))
        return features

    monkeypatch.setattr(wholes, "extract_features", watched)
    seconds = wholes.measure_store("tiny", Conditions(repeats=2))["seconds"]
    assert computed == [(False, {4}), (True, {4}), (True, {0}), (True, {4}), (True, {0})]
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_numbers_name_no_host_and_no_folder(run_bench, monkeypatch):
    faked(monkeypatch, scaling=scaling(9.0))
    text = json.dumps(run_bench("--parts", "scaling")[1])
    for private in (platform.node(), str(Path.home()), str(bench.ROOT), os.environ.get("USER", platform.node())):
        assert private not in text


def test_pieces_add_up_and_what_is_measured_again_is_replaced(run_bench, monkeypatch):
    faked(monkeypatch, scaling=scaling(9.0), passes=passes("tiny"))
    run_bench("--parts", "passes")
    run_bench("--parts", "scaling")
    faked(monkeypatch, scaling=scaling(8.0))
    (run,) = run_bench("--parts", "scaling")[1]["runs"]
    assert run["passes"]["tiny"]["model"] == "m"
    assert row_of(run["summary"], "scaling", "10 to 100 images")["ratio"] == 8


def test_another_environment_stands_beside(run_bench, monkeypatch):
    faked(monkeypatch, scaling=scaling(9.0))
    run_bench("--parts", "scaling")
    runs = run_bench("--parts", "scaling", "--precision", "bf16")[1]["runs"]
    assert [run["environment"]["precision"] for run in runs] == ["fp32", "bf16"]


def test_numbers_are_kept_when_a_later_piece_fails(run_bench, tmp_path, monkeypatch):
    def fails(size, how):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(bench, "_measures", lambda: {"scaling": lambda size, how: scaling(9.0), "store": fails})
    done = CliRunner().invoke(bench.main, ["--sizes", "tiny", "--parts", "scaling,store", "--output",
                                           str(tmp_path / "bench.json")])
    assert "out of luck" in str(done.exception)
    assert "scaling" in json.loads((tmp_path / "bench.json").read_text())["runs"][0]


@pytest.mark.parametrize(("options", "message"), [
    (["--sizes", "S,H"], "'H' is none of S,B,L"),
    (["--parts", "speed"], "'speed' is none of passes,memory,files,kmeans,scaling,store"),
    (["--device", "abacus"], "'abacus' is no device of this torch here"),
])
def test_unknown_names_are_refused(options, message):
    done = CliRunner().invoke(bench.main, options)
    assert done.exit_code == 2
    assert message in done.output


def test_a_file_that_holds_no_benchmark_is_refused(tmp_path):
    output = tmp_path / "bench.json"
    output.write_text("{}")
    done = CliRunner().invoke(bench.main, ["--output", str(output)])
    assert done.exit_code == 1
    assert "holds no benchmark: remove it" in done.output
    assert output.read_text() == "{}"


needs_clear_refs = pytest.mark.skipif(not os.access(memory.CLEAR, os.W_OK), reason="the peak of a process is not told")


@needs_clear_refs
def test_growth_is_the_peak_and_not_what_stays():
    def run(images):
        for _ in range(2):  # one after the other: the peak is one's
            torch.ones(len(images), 2**18)

    assert memory.growth(run, torch.zeros(64, 1)) == pytest.approx(64 * 2**20, rel=0.1)


@needs_clear_refs
@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(memory, "contender_names", lambda size: [PLAIN, ours(1)])
    found = memory.measure_memory("tiny", Conditions(batch=64))
    assert found["batch"] == 64
    hidden = 64 * 17 * 4 * 48 * 4  # bytes of the MLP's hidden layer
    assert all(hidden < grown < 10 * hidden for grown in found["growth"].values())


def test_memory_that_can_not_be_seen_is_left_out(monkeypatch):
    said = []
    monkeypatch.setattr(memory, "CLEAR", Path("/nowhere"))
    assert memory.measure_memory("tiny", Conditions(say=said.append)) is None
    assert said == ["the peak of a process is not told here (no /nowhere): left out"]
