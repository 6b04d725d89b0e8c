import itertools
import json
import os
import platform
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench, memory, passes, pipeline, shares, study
from benchmarks.contenders import (
    ALL_SOURCES,
    BIAS,
    CONTROLS,
    EAGER,
    EDITS,
    LATE,
    PLAIN,
    REGISTERS,
    SHARES,
    SIZES,
    SOURCE_ORDER,
    START,
    UNITS,
    contender_names,
    loop,
    make_all_sources,
    make_contenders,
    make_registers,
    make_variants,
    make_workload,
    ours,
)
from benchmarks.passes import check_agreement, flop
from benchmarks.study import ELKAN, FAISS, LLOYD, OURS, Clustering
from benchmarks.summary import HEADINGS, summarize, table
from benchmarks.timing import Conditions, interleaved
from itae_utils.method.one_pass import OnePass
from itae_utils.method.registers import apply_registers
from itae_utils.method.setting import ATTENUATIONS, SOURCES
from itae_utils.method.statistics import qkv_norms

CPU = Conditions()
SMALL = Clustering(n=240, dim=16, k=4, seeds=2)


@pytest.fixture(autouse=True)
def _restored_environment(monkeypatch):
    for name in ("ITAE_PROGRESS", "ITAE_CACHE"):  # set by the command
        monkeypatch.setenv(name, os.environ.get(name, ""))


@pytest.fixture(autouse=True)
def _small_product(monkeypatch):
    monkeypatch.setattr(passes, "MATMUL_SIDE", {"cpu": 64})


@pytest.fixture(scope="module")
def work():
    return make_workload("tiny", CPU)


@pytest.fixture(scope="module")
def outputs(work):
    with CPU.running():
        return {name: run(work.images) for name, run in make_contenders(work, CPU).items()}


@pytest.fixture
def run_bench(tmp_path, monkeypatch):
    """Return a function that runs the command on the tiny model and returns the result and the numbers written."""
    for name, small in {"FEW_IMAGES": 12, "BATCHES": {"cpu": 1}}.items():
        monkeypatch.setattr(pipeline, name, small)
    monkeypatch.setattr(study, "STUDY", {"k=10": SMALL, "ablation": replace(SMALL, n_init=3, matrices=2)})
    monkeypatch.setitem(bench.OTHER_SIZES, "study", ["k=10", "ablation"])
    monkeypatch.setattr(study, "BASE", SMALL)
    monkeypatch.setattr(study, "GROWTH", {"images": ("n", (60, 120, 240)), "starts": ("seeds", (1, 2))})
    monkeypatch.setattr(study, "in_child", lambda *arguments: 2e6)

    def run(*options: str, exit_code=0):
        output = tmp_path / "bench.json"
        result = CliRunner().invoke(bench.main, ["--sizes", "tiny", "--output", str(output), *options])
        assert result.exit_code == exit_code, result.output
        return result, json.loads(output.read_text())

    return run


def measured(monkeypatch, **parts):
    """Replace measurements by the given numbers."""
    monkeypatch.setattr(bench, "PARTS", {part: lambda size, conditions, found=found: found
                                         for part, found in parts.items()})


def scaling(seconds: float) -> dict:
    return {"counts": {"images": [10, 100]}, "seconds": {"10 images": [1.0], "100 images": [seconds]}}


def made_passes(size: str, **seconds) -> dict:
    """Return measured passes in which every contender is as slow as a plain pass, except for those given."""
    times = {name: [1.0] * 3 for name in contender_names(size)} | seconds
    return {"model": "m", "batch": 2, "image_size": 56, "seconds": times, "flop_per_image": 3e9,
            "matmul_flop_per_second": 12e9, "agreement": {"largest_difference": 1e-6, "smallest_effect": 0.1}}


def summary(on_gpu=False, **parts) -> dict:
    """Return the rows of a run by heading, size and contender."""
    rows = summarize({"environment": {"on_gpu": on_gpu}} | parts)
    return {(row["heading"], row["size"], row["what"]): row for row in rows}


def test_contenders_give_the_same_features(outputs):
    assert list(outputs) == contender_names("tiny")
    assert [len(outputs[ours(count)]) for count in (0, 1, 8, 48)] == [1, 2, 9, 49]
    baseline = outputs[PLAIN]["baseline"]
    assert baseline.shape == (4, 48)
    torch.testing.assert_close(outputs[ours(0)]["baseline"], baseline, atol=1e-4, rtol=0)
    for one, other in [(EAGER, ours(1)), (loop(8), ours(8)), (ours(8), ours(48))]:
        for name in outputs[one]:
            torch.testing.assert_close(outputs[one][name], outputs[other][name], atol=1e-4, rtol=0)
    controls, settings = outputs[CONTROLS], outputs[ours(48)]
    assert len(outputs[ALL_SOURCES]) == 49
    assert torch.equal(outputs[ALL_SOURCES]["baseline"], settings["baseline"])
    same = [name for name in controls if torch.equal(controls[name], settings[name.rpartition(" ")[0] or name])]
    assert len(controls) == 49
    assert 33 <= len(same) < 49  # the baseline and 32 settings; a control may change nothing
    assert len(outputs[loop(8)]) == 8
    for name, features in outputs[loop(8)].items():
        assert (features - baseline).abs().max() > 1e-2, name


def test_contenders_that_disagree_are_refused(outputs):
    wrong = outputs | {EAGER: {name: features + 0.01 for name, features in outputs[EAGER].items()}}
    with pytest.raises(RuntimeError, match=r"0\.01"):
        check_agreement("tiny", wrong, "fp32")
    assert check_agreement("tiny", wrong, "bf16")["largest_difference"] == pytest.approx(0.01, rel=0.01)


def test_contenders_leave_the_model_unchanged(work, outputs):
    assert all(block.attn.fused_attn for block in work.model.blocks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in work.model.modules())


def test_registers_are_a_handful_of_neurons_at_half_of_the_depth(work, outputs):
    settings = make_registers(work, CPU)
    assert list(settings) == list(REGISTERS)
    depth = len(work.model.blocks)
    assert {setting.neurons for setting in settings.values()} == {((depth // 2, tuple(range(UNITS))),)}
    assert [(each.form, each.first_block) for each in settings.values()] == [
        ("token", 0), ("token", depth // 2), ("bias", 0)]
    for name, setting in settings.items():
        assert list(outputs[name]) == ["baseline", name]
        assert torch.equal(outputs[name]["baseline"], outputs[ours(0)]["baseline"])
        with CPU.running(), apply_registers(work.model, setting):
            expected = work.model.forward_features(work.images)[:, 0]
        torch.testing.assert_close(outputs[name][name], expected, atol=1e-4, rtol=0)
        assert (outputs[name][name] - outputs[name]["baseline"]).abs().max() > 1e-3, name


def test_variants_differ_and_the_first_few_cover_the_settings():
    work = make_workload("tiny", Conditions(batch=16))
    variants = make_variants(work, 60, CPU)
    assert len({(itae.source, itae.attenuation, itae.threshold) for itae in variants.values()}) == 60
    assert next(iter(variants)) == "key min 5%"
    first = list(itertools.islice(variants.values(), 8))
    assert {itae.source for itae in first} == set(SOURCE_ORDER)
    assert {itae.attenuation for itae in first} == set(EDITS)
    norms = qkv_norms(work.model, work.images)
    for name, itae in variants.items():
        share = float((norms[itae.source] <= itae.threshold).double().mean())
        assert share == pytest.approx(float(name.split()[-1].removesuffix("%")) / 100, abs=0.5 / 256), name


def test_48_settings_cover_all_sources_and_edits_and_find_artifacts(work):
    settings = make_all_sources(work, 48, CPU)
    assert len(settings) == 48
    assert {(itae.source, itae.attenuation) for itae in settings.values()} == set(itertools.product(
        SOURCES, ATTENUATIONS))
    with CPU.running():
        results = OnePass(work.model, settings)(work.images, 0).values()
    for (_, artifacts), share in zip(results, itertools.cycle(SHARES)):
        assert float(artifacts.double().mean()) == pytest.approx(share, abs=1 / artifacts.numel())


@pytest.mark.parametrize(("repeats", "options", "order"), [
    (4, {}, "abc" "bca" "cab" "abc"),
    (2, {"turns": 2, "once": ["b"]}, "abc" "ca" "cab" "ac"),  # b is long
])
def test_calls_take_turns_and_every_turn_begins_with_the_next(repeats, options, order):
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = interleaved(calls, Conditions(repeats=repeats), **options)
    assert "".join(called) == order
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", repeats)


def test_operations_are_those_that_torch_counts(work):
    for block in work.model.blocks:
        block.attn.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        work.model.forward_features(work.images[:1])
    for block in work.model.blocks:
        block.attn.fused_attn = True
    assert flop(work.model) == counter.get_total_flops()


class TestSummary:
    def test_ratios_are_taken_within_a_repeat(self):
        """In the second repeat the machine is slower, for both contenders alike."""
        rows = summary(passes={"S": made_passes("S", **{PLAIN: [1.0, 3.0, 1.0], ours(1): [0.9, 2.7, 0.91]})})
        row = rows["passes", "S", ours(1)]
        assert (row["ratio"], row["low"], row["high"]) == tuple(map(pytest.approx, (0.9, 0.9, 0.91)))
        assert (row["target"], row["verdict"]) == ("≤ 0.92", "met")
        assert rows["rate", "S", PLAIN]["ratio"] == pytest.approx(2 * 3e9 / 12e9)

    def test_registers_are_measured_beyond_the_baseline_alone(self):
        times = {START: [2.0, 6.0, 2.2], LATE: [1.5, 4.5, 1.6], PLAIN: [1.0, 3.0, 1.0], ours(0): [0.9, 2.7, 0.9]}
        rows = summary(passes={size: made_passes(size, **times) for size in "SB"})
        start, late, bias = (rows["registers", "S", name] for name in (START, LATE, BIAS))
        assert [row["ratio"] for row in (start, late)] == pytest.approx([1.1, 0.6])
        assert (start["low"], start["high"]) == (pytest.approx(1.1), pytest.approx(1.3))
        assert [row["target"] for row in (start, late, bias)] == ["≤ 1.15", "≤ 0.65", None]
        assert start["verdict"] == late["verdict"] == "met"
        assert rows["registers", "B", START]["target"] is None
        assert rows["passes", "S", START]["ratio"] == pytest.approx(2)

    def test_runs_from_before_registers_were_measured_have_a_summary(self):
        found = made_passes("S")
        for name in REGISTERS:
            del found["seconds"][name]
        assert not [key for key in summary(passes={"S": found}) if key[0] == "registers"]

    def test_a_target_is_met_or_missed_by_a_difference(self):
        rows = summary(passes={"S": made_passes("S", **{loop(48): [44.0] * 3, ALL_SOURCES: [1.04] * 3}),
                               "L": made_passes("L")},
                       memory={"S": {"growth": dict.fromkeys(contender_names("S"), 100) | {ours(8): 150}}})
        assert rows["passes", "S", ours(48)]["verdict"] == "missed by 0.030"
        assert rows["passes", "L", ours(48)]["verdict"] == rows["passes", "S", ALL_SOURCES]["verdict"] == "met"
        assert rows["loop", "S", loop(48)]["verdict"] == "missed by 1.000"
        assert rows["memory", "S", ours(8)]["verdict"] == "missed by 0.400"

    def test_a_loop_over_8_variants_is_extrapolated_to_48(self):
        rows = summary(passes={"B": made_passes("B", **{loop(8): [8.0] * 3, ours(8): [1.0] * 3, ours(48): [1.5] * 3})})
        measured, extrapolated = rows["loop", "B", loop(8)], rows["loop", "B", f"{loop(48)} (extrapolated from 8)"]
        assert (measured["ratio"], measured["target"]) == (pytest.approx(8), None)
        assert (extrapolated["ratio"], extrapolated["verdict"]) == (pytest.approx(32), "missed by 13.000")

    def test_reading_files_has_a_target_on_a_gpu_only(self):
        files = {"L": {"seconds": {"bare forward": [0.9], "from files": [1.0]}}}
        (on_cpu,), (on_gpu,) = (summary(on_gpu, files=files).values() for on_gpu in (False, True))
        assert (on_cpu["ratio"], on_cpu["target"]) == (pytest.approx(0.9), None)
        assert (on_gpu["target"], on_gpu["verdict"]) == ("≥ 0.95", "missed by 0.050")

    def test_the_target_of_the_study_is_against_the_faster_algorithm_of_scikit_learn(self):
        found = {"seconds": {OURS: [1.0] * 3, LLOYD: [9.0] * 3, ELKAN: [8.5, 7.5, 7.0], FAISS: [2.0] * 3},
                 "inertia": {OURS: [[101.0, 100.0]], LLOYD: [[100.0, 100.0]], ELKAN: [[100.0, 100.0]],
                             FAISS: [[103.0, 102.0]]}, "flop": 3e9, "matmul_flop_per_second": 12e9}
        rows = summary(study={"k=200": found})
        of = lambda heading, what: rows[heading, "k=200", what]  # noqa: E731
        assert of("study", ELKAN)["verdict"] == "missed by 0.500"
        assert [of("study", name)["target"] for name in (LLOYD, FAISS)] == [None, None]
        assert of("inertia", f"{OURS}, mean of the runs")["ratio"] == pytest.approx(1.005)
        assert of("inertia", f"{OURS}, mean of the runs")["verdict"] == "missed by 0.004"
        assert of("rate", "our k-means, its matrix products")["ratio"] == pytest.approx(0.25)

    def test_growth_is_a_ratio_per_step(self):
        found = {"counts": {"clusters": [2, 4, 8]}, "seconds": {"2 clusters": [1.0], "4 clusters": [3.0],
                                                                "8 clusters": [12.0]}}
        rows = summary(growth={"k-means": found})
        assert [row["ratio"] for row in rows.values()] == [3, 4]

    def test_the_table_has_a_line_per_row_below_its_heading(self):
        run = {"environment": {"on_gpu": False}, "passes": {"S": made_passes("S", **{ours(1): [0.8, 0.9, 1.0]})}}
        run["summary"] = summarize(run)
        lines = list(table(run))
        place = next(place for place, line in enumerate(lines) if ours(1) in line)
        assert lines.index(HEADINGS["passes"]) < place < lines.index(HEADINGS["loop"])
        assert all(text in lines[place] for text in ("0.900", "0.800 – 1.000", "0.92", "met"))


class TestCommand:
    def test_it_writes_numbers_and_a_figure(self, run_bench, tmp_path):
        result, contents = run_bench("--parts", "passes,files,scaling,store,study,growth", "--repeats", "2")
        (run,) = contents["runs"]
        assert run["environment"]["torch"] == torch.__version__.partition("+")[0]
        seconds = run["passes"]["tiny"]["seconds"]
        assert list(seconds) == contender_names("tiny")
        assert {len(times) for times in seconds.values()} == {2}
        assert run["scaling"]["tiny"]["counts"] == {"images": [12, 120], "variants": [5, 50], "tokens": [26, 257]}
        assert run["growth"]["k-means"]["counts"] == {"images": [60, 120, 240], "starts": [1, 2]}
        assert {"k=10", "ablation"} == set(run["study"])
        assert np.shape(run["study"]["ablation"]["inertia"][OURS]) == (2, 4)  # of two turns
        assert all(name in result.stdout for name in (OURS, LLOYD, ELKAN))
        assert run["files"]["tiny"]["images"] == SIZES["tiny"].batches["cpu"]
        assert {row["heading"] for row in run["summary"]} == set(HEADINGS) - {"memory", "shares", "estimate"}
        assert all(np.isfinite(row["ratio"]) and (row["ratio"] > 0 or row["heading"] == "registers")  # a difference
                   for row in run["summary"])
        assert (tmp_path / "figures" / "bench.png").stat().st_size > 10_000
        assert HEADINGS["passes"] in result.stdout
        assert "repeats=2" in result.stderr
        written = json.dumps(contents)
        for private in (platform.node(), str(Path.home()), str(bench.ROOT), os.environ.get("USER", platform.node())):
            assert private not in written

    def test_a_later_run_replaces_only_what_it_measures(self, run_bench, monkeypatch):
        measured(monkeypatch, scaling=scaling(9.0), passes=made_passes("tiny"))
        run_bench("--parts", "passes")
        run_bench("--parts", "scaling")
        measured(monkeypatch, scaling=scaling(8.0))
        (run,) = run_bench("--parts", "scaling")[1]["runs"]
        assert run["passes"]["tiny"]["model"] == "m"
        assert [row["ratio"] for row in run["summary"] if row["heading"] == "scaling"] == [8]

    def test_another_environment_is_another_run(self, run_bench, monkeypatch):
        measured(monkeypatch, scaling=scaling(9.0))
        run_bench("--parts", "scaling")
        runs = run_bench("--parts", "scaling", "--precision", "bf16")[1]["runs"]
        assert [run["environment"]["precision"] for run in runs] == ["fp32", "bf16"]

    def test_a_failing_part_leaves_the_numbers_of_those_before(self, run_bench, monkeypatch):
        def fail(size, conditions):
            raise RuntimeError

        monkeypatch.setattr(bench, "PARTS", {"scaling": lambda size, conditions: scaling(9.0), "store": fail})
        _, contents = run_bench("--parts", "scaling,store", exit_code=1)
        assert "scaling" in contents["runs"][0]

    @pytest.mark.parametrize("options", [["--sizes", "S,H"], ["--parts", "speed"], ["--device", "abacus"]])
    def test_unknown_names_are_refused(self, options):
        result = CliRunner().invoke(bench.main, options)
        assert result.exit_code == 2
        assert repr(options[1].removeprefix("S,")) in result.output

    def test_a_file_that_is_not_a_benchmark_is_refused(self, tmp_path):
        output = tmp_path / "bench.json"
        output.write_text("{}")
        result = CliRunner().invoke(bench.main, ["--output", str(output)])
        assert result.exit_code == 1
        assert str(output) in result.output
        assert output.read_text() == "{}"


def test_a_warm_store_spares_every_image(monkeypatch):
    monkeypatch.setattr(pipeline, "BATCHES", {"cpu": 1})
    monkeypatch.setattr(pipeline, "PICTURES", 3)  # the fourth file is a link
    computed, extract = [], pipeline.extract_features

    def recording(*args, **options):
        features = extract(*args, **options)
        computed.append(set(features.computed.values()))
        return features

    monkeypatch.setattr(pipeline, "extract_features", recording)
    seconds = pipeline.measure_store("tiny", Conditions(repeats=2))["seconds"]
    assert computed == [{4}, {4}, {0}, {4}, {0}]  # the first call is a warm-up without a store
    assert [len(times) for times in seconds.values()] == [2, 2]


class TestStudy:
    @pytest.mark.parametrize("name", [OURS, LLOYD, ELKAN, pytest.param(FAISS, marks=pytest.mark.skipif(
        study.faiss is None, reason="needs faiss"))])
    def test_every_contender_finds_separated_classes(self, name):
        points, classes = study.made_features(replace(SMALL, k=3))
        points += 10 * np.eye(16, dtype=np.float32)[classes]
        (runs,) = study.labels_of(name, replace(SMALL, k=3, n_init=5), [points])
        assert runs.shape == (2, 240)
        assert all(adjusted_rand_score(classes, labels) == 1 for labels in runs)

    def test_many_matrices_are_clustered_as_each_alone(self):
        matrices = [study.made_features(SMALL, seed)[0] for seed in range(3)]
        together = study.labels_of(OURS, SMALL, matrices, first=5)
        for points, labels in zip(matrices, together, strict=True):
            np.testing.assert_array_equal(labels, study.labels_of(OURS, SMALL, [points], first=5)[0])

    def test_features_are_unit_vectors_of_every_class(self):
        points, classes = study.made_features(SMALL)
        assert (points.shape, points.dtype) == ((240, 16), np.float32)
        np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, rtol=1e-6)
        assert set(classes) == set(range(4))

    def test_inertia_is_that_of_scikit_learn(self):
        points = study.made_features(SMALL)[0] + 3
        found = KMeans(4, n_init=1, tol=0, random_state=0).fit(points)
        assert study.inertia(points, found.labels_, 4) == pytest.approx(found.inertia_, rel=1e-6)
        assert study.inertia(points, found.labels_, 9) == pytest.approx(found.inertia_, rel=1e-6)  # some are empty

    def test_it_runs_without_faiss(self, monkeypatch):
        messages = []
        monkeypatch.setattr(study, "faiss", None)
        monkeypatch.setattr(study, "in_child", lambda *arguments: 0)
        monkeypatch.setattr(study, "STUDY", {"k=10": SMALL})
        found = study.measure_study("k=10", Conditions(repeats=5, log=messages.append))
        assert list(found["seconds"]) == [OURS, LLOYD, ELKAN]
        assert {len(times) for times in found["seconds"].values()} == {3}
        assert any("faiss-cpu" in message for message in messages)

    @pytest.mark.skipif(not os.access(memory.CLEAR, os.W_OK), reason=f"needs {memory.CLEAR}")
    @pytest.mark.slow
    def test_memory_is_measured_in_a_child(self):
        work = Clustering(n=20_000, dim=8, k=20, seeds=5)
        scores = 4 * work.n * work.k * work.seeds
        assert scores < study._memory([OURS], work, CPU)[OURS] < 20 * scores


class TestShares:
    def test_every_statement_is_timed_as_one_kind_of_work(self, tmp_path):
        code = nbformat.v4.new_code_cell
        parameters = code("seeds = 3\nlimit = None", metadata={"tags": ["parameters"]})
        notebook = shares.split(nbformat.v4.new_notebook(cells=[
            nbformat.v4.new_markdown_cell("# A title"), code("import numpy as np\nfrom math import pi"), parameters,
            code("fits = itae.fit_thresholds(\n    vit)\nfeatures = itae.extract_features(vit)"),
            code("if targets is None:\n    pass\nelse:\n    run.show(figures.embeddings(points), 'tsne')"),
            code("points = {name: remembered.tsne(each) for name in names}\nMarkdown('a')")]))
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert len(cells) == 8
        assert parameters in cells
        for number, cell in enumerate(cells):
            cell.metadata["papermill"] = {"duration": 2.0**number}
        nbformat.write(notebook, tmp_path / "n.ipynb")
        assert shares.statement_seconds(tmp_path / "n.ipynb") == {
            "imports": 3, "θ": 8, "features": 16, "figures": 32, "t-SNE": 64, "rest": 4 + 128}

    def test_every_kind_of_work_occurs_in_the_notebooks(self):
        statements = [cell.source for path in Path(bench.ROOT / "notebooks").glob("*.ipynb")
                      for cell in shares.split(nbformat.read(path, 4)).cells if cell.cell_type == "code"]
        assert set(shares.KINDS) == {shares.kind_of(statement) for statement in statements} - {"rest"}

    def test_a_cell_of_the_papers_size_is_multiplied_up(self, monkeypatch):
        monkeypatch.setattr(shares, "MODEL", "tiny")
        monkeypatch.setattr(shares, "CELL", SMALL)
        monkeypatch.setattr(Conditions, "seconds", lambda self, call: (call(), 1.0)[1])  # every call takes a second
        found = shares.measure_shares("paper", CPU)
        assert found["seconds"] == {"θ": 512 / 4, "features": 2 * 240 / 4, "k-means": 6, "scores": 6, "intervals": 5}
        assert [measured for _, measured in found["estimate"].values()] == [6, 5]
        assert all(row["ratio"] > 0 for row in summary(shares={"paper": found}).values())

    def test_the_dry_run_of_the_demo_is_read_in_seconds(self):
        assert 1 < shares.estimated_report({"profile": "demo"}) < 3600

    @pytest.mark.slow
    def test_the_shares_of_a_report_add_up_to_its_time(self, monkeypatch):
        monkeypatch.setattr(shares, "REPORT", {"only": ["03"], "parameters": {"limit": 100, "seeds": 2, "n_init": 1}})
        found = shares.measure_shares("demo", CPU)
        assert set(found["seconds"]) == {*shares.KINDS, "rest", "kernels", "pages"}
        assert all(seconds > 0 for seconds in found["seconds"].values())
        assert sum(found["seconds"].values()) == pytest.approx(found["estimate"]["whole report"][1])


class TestMemory:
    needs_clear_refs = pytest.mark.skipif(not os.access(memory.CLEAR, os.W_OK), reason=f"needs {memory.CLEAR}")

    @needs_clear_refs
    def test_growth_is_that_of_the_peak(self):
        def run(images):
            for _ in range(2):  # one after the other, so the peak holds one
                torch.ones(len(images), 2**18)

        # The system may take other pages of this process away meanwhile, so that the growth looks smaller.
        assert max(memory.growth(run, torch.zeros(64, 1)) for _ in range(3)) == pytest.approx(64 * 2**20, rel=0.1)

    @needs_clear_refs
    @pytest.mark.slow
    def test_each_contender_is_measured_in_its_own_process(self, monkeypatch):
        monkeypatch.setattr(memory, "contender_names", lambda size: [PLAIN, ours(1)])
        found = memory.measure_memory("tiny", Conditions(batch=64))
        assert found["batch"] == 64
        hidden = 64 * 17 * 4 * 48 * 4  # bytes of the MLP's hidden layer
        assert all(hidden < growth < 10 * hidden for growth in found["growth"].values())

    def test_it_is_skipped_if_the_system_does_not_report_it(self, monkeypatch):
        messages = []
        monkeypatch.setattr(memory, "CLEAR", Path("/nowhere"))
        assert memory.measure_memory("tiny", Conditions(log=messages.append)) is None
        assert "/nowhere" in messages[0]
