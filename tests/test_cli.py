import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from pyarrow import parquet

import itae_utils
from itae_utils import cli
from itae_utils.data.datasets import load_dataset
from itae_utils.extraction.features import extract_features
from itae_utils.method.setting import ITAE
from itae_utils.models.backbones import load_backbone
from itae_utils.report import report
from tests.fake_execution import FakeExecute
from tests.tiny_notebooks import use_notebooks, write_notebook, write_notebooks


def run(*arguments: object):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture
def execute(tmp_path, monkeypatch):
    use_notebooks(write_notebooks(tmp_path / "nb"), monkeypatch)
    monkeypatch.setattr(report, "execute", execute := FakeExecute())
    return execute


def test_version_help_and_lists():
    assert run("--version").output == f"itae, version {itae_utils.__version__}\n"
    help_text = run("--help").output
    assert all(command in help_text for command in ("report", "extract", "inspect", "store", "backbones", "datasets"))
    for command, expected in [("backbones", {"demo", "demo-clean", "dinov2_vits14", "dinov2_vitg14_reg"}),
                              ("datasets", {"digits", "cifar10", "tiny-imagenet", "imagefolder:PATH"})]:
        assert expected <= {line.split("  ")[0] for line in run(command).output.splitlines()}


class TestReport:
    def record(self, tmp_path, output: str) -> dict:
        return json.loads((tmp_path / output / "report.json").read_text(encoding="utf-8"))

    def test_options_reach_the_notebook_and_the_record(self, execute, tmp_path):
        result = run("report", "--backbone", "demo-clean", "--only", "1", "-p", "seed", "3", "-p", "alpha", "1e-3",
                     "--output", "o")
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.output.splitlines()[-1] == str(tmp_path / "o" / "index.html")
        (entry,) = self.record(tmp_path, "o")["notebooks"]
        assert entry["parameters"] == {"backbone": "demo-clean", "dataset": "digits", "limit": None, "seed": 3,
                                       "alpha": 0.001, "data_dir": "."}
        given = json.loads((tmp_path / "o" / "01_first" / "results.json").read_text())["parameters"]
        assert {name: given[name] for name in ("backbone", "seed", "alpha")} == {
            "backbone": "demo-clean", "seed": 3, "alpha": 0.001}

    def test_a_report_is_repeated_from_its_record(self, execute, tmp_path):
        run("report", "--only", "03", "-p", "seed", "4", "--output", "o")
        result = run("report", "--from", "o")
        assert result.exit_code == 0
        assert result.output.splitlines()[-1] == str(tmp_path / "o-repeated" / "index.html")
        before, after = (self.record(tmp_path, name)["notebooks"][0]["parameters"] for name in ("o", "o-repeated"))
        assert before == after
        assert after["seed"] == 4

    def test_progress_and_the_index_are_printed(self, execute, tmp_path):
        report_03 = ("report", "--only", "03", "--output", "out")
        result = run(*report_03)
        assert (result.exit_code, result.stderr) == (0, "")
        started, took, index = result.stdout.splitlines()
        assert started == "03_scores …"
        assert took.startswith("03_scores took ")
        assert index == str(tmp_path / "out" / "index.html")
        reused, _ = run(*report_03).stdout.splitlines()
        assert reused == took.replace("took", "unchanged, reused (took") + ")"
        assert run(*report_03, "--force").stdout.splitlines()[0] == started

    def test_a_dry_run_writes_nothing_and_names_runs_that_will_be_reused(self, execute, tmp_path):
        dry_run = ("report", "--dry-run", "--only", "01,03")
        before = sorted(tmp_path.rglob("*"))
        assert run(*dry_run).output.startswith("profile demo: 2 runs of notebooks\n  01_first, 03_scores\n")
        assert sorted(tmp_path.rglob("*")) == before
        run("report", "--only", "03", "--output", "out")
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        lines = run(*dry_run, "--output", "out").output.splitlines()
        assert lines[1] == "  01_first, 03_scores (unchanged, reused)"
        assert any(line.startswith("disk: about 5 MB") for line in lines), "for one run of two"
        assert "time: none" in run("report", "--dry-run", "--only", "03", "--output", "out").output
        for other in (["--force"], ["--output", "elsewhere"], ["-p", "seed", "3"]):
            output = run("report", "--dry-run", "--only", "03", "--output", "out", *other).output
            assert "reused" not in output, other
            assert "time: about" in output, other
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    def test_failures_are_status_1_and_each_error_is_printed_once(self, execute, tmp_path):
        execute.during = lambda given: "ValueError: two" if "02" in given["output_dir"] else "ValueError: others"
        result = run("report", "--output", "out")
        assert result.exit_code == 1
        assert result.stderr.splitlines() == ["01_first and 1 more: ValueError: others", "02_fails: ValueError: two"]
        assert result.stdout.splitlines()[-1] == str(tmp_path / "out" / "index.html")
        assert (tmp_path / "out" / "index.html").is_file()


IGNORES_SIGNALS = """
import os, pathlib, signal, threading, time
def survive(*_):
    threading.Timer(2, pathlib.Path("survived").touch).start()
signal.signal(signal.SIGINT, survive)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path("started").write_text(str(os.getpid()))
while True:
    time.sleep(0.1)"""


@pytest.mark.slow
def test_an_interrupt_is_status_130_kills_the_kernel_at_once_and_the_report_resumes(tmp_path):
    folder = write_notebooks(tmp_path / "nb")
    write_notebook(folder, "02_fails", IGNORES_SIGNALS)
    code = ("import signal, pathlib; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from itae_utils import cli; from itae_utils.report import report; "
            f"report.notebooks_folder = lambda: pathlib.Path({str(folder)!r}); "
            f"cli.main(['report', '--only', '01,02', '--output', {str(tmp_path / 'out')!r}])")
    command, started = [sys.executable, "-c", code], folder / "started"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "Error: interrupted\n"
    assert stdout.splitlines()[-1] == "02_fails …"
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    time.sleep(3)
    assert not (folder / "survived").exists(), "a kernel that is asked to end lives on for seconds"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", "01_first", "02_fails"}
    write_notebook(folder, "02_fails", "x = 1")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second, _, index = done.stdout.splitlines()
    assert first.startswith("01_first unchanged, reused (took ")
    assert second == "02_fails …"
    assert index == str(tmp_path / "out" / "index.html")


@pytest.fixture
def picture(tmp_path):
    """Write a digit as a file."""
    load_dataset("digits")[1][0].save(tmp_path / "a.png")
    return tmp_path / "a.png"


def read_features(path):
    """Return the arrays of a feature file by name, and its settings."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            arrays = dict(file)
        return arrays, json.loads(str(arrays.pop("about")))
    columns = pd.read_parquet(path)
    arrays = {name: np.stack(columns[name]) for name in columns}
    return arrays, json.loads(parquet.read_schema(path).metadata[b"about"])


class TestExtract:
    @pytest.mark.parametrize(("suffix", "source", "threshold"), [
        ("npz", "key", "auto"), ("parquet", "key", "auto"), ("npz", "value", 9)])
    def test_the_file_holds_features_labels_and_settings(self, tmp_path, suffix, source, threshold):
        path = tmp_path / "new" / f"features.{suffix}"
        result = run("extract", "--limit", 60, "--batch-size", 7, "--threshold", threshold, "--source", source,
                     "--output", path)
        assert result.exit_code == 0, result.output
        assert list(path.parent.iterdir()) == [path]
        backbone, dataset = load_backbone("demo"), load_dataset("digits", limit=60)
        variants = {"baseline": None, "itae": ITAE(source=source, threshold=threshold)}
        expected = extract_features(backbone, dataset, variants, batch_size=7, store=None)
        found, about = read_features(path)
        assert set(found) == {*variants, "targets"}
        for name in variants:
            np.testing.assert_array_equal(found[name], expected[name], strict=True)
        np.testing.assert_array_equal(found["targets"], dataset.targets)
        assert np.abs(found["baseline"] - found["itae"]).max() > 0.01
        assert about["thresholds"] == {name: list(expected.thresholds[name]) for name in variants}
        assert about["weights_sha256"] == backbone.weights_sha256
        assert (about["classes"], about["split"], about["batch_size"]) == (dataset.classes, dataset.split, 7)

    def test_without_labels(self, picture):
        output = picture.with_name("features.npz")
        result = run("extract", "--dataset", f"imagefolder:{picture.parent}", "--threshold", 1, "--output", output)
        assert result.exit_code == 0, result.output
        arrays, _ = read_features(output)
        assert set(arrays) == {"baseline", "itae", "names"}
        assert list(arrays["names"]) == ["a.png"]

    def test_a_full_disk_leaves_no_file(self, tmp_path, monkeypatch):
        def savez(file, **_arrays):
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(np, "savez", savez)
        result = run("extract", "--limit", 9, "--threshold", 1, "--output", tmp_path / "features.npz")
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert os.strerror(errno.ENOSPC) in result.stderr
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "jpg"])
def test_inspect_draws_in_the_format_of_its_output(picture, suffix):
    output = picture.parent / "out" / f"look.{suffix}"
    result = run("inspect", picture, "--threshold", "2.5", "--source", "value", "--output", output)
    assert "θ = 2.5 on the norm of the value" in result.output
    assert result.output.endswith(f"{output} written\n")
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml", "jpg": b"\xff\xd8"}[suffix]
    assert output.read_bytes().startswith(start)
    assert list(output.parent.iterdir()) == [output]
