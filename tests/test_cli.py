import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

import itae_utils
from itae_utils import cli
from itae_utils.data.datasets import load_dataset
from itae_utils.errors import ItaeError
from itae_utils.extraction.features import extract_features
from itae_utils.method.setting import ITAE
from itae_utils.models.backbones import load_backbone
from itae_utils.report import report
from tests.tiny_notebooks import write_notebook, write_notebooks

HEAVY = {"torch", "torchvision", "timm", "sklearn", "scipy", "pandas", "matplotlib", "papermill", "nbconvert"}


def run(*arguments: object):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("statement", [
    "import itae_utils",
    "from itae_utils.cli import main; main(['--help'], standalone_mode=False)",
    "from itae_utils.cli import main; main(['report', '--help'], standalone_mode=False)",
    "from itae_utils.cli import main; main(['datasets'], standalone_mode=False)",
    "from itae_utils.cli import main; main(['backbones'], standalone_mode=False)",
])
def test_nothing_heavy_is_imported(statement):
    code = f"import sys\n{statement}\nprint('HEAVY', *sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY"


def test_version():
    assert run("--version").output == f"itae, version {itae_utils.__version__}\n"


def test_help_names_every_command():
    output = run("--help").output
    for command in ("report", "extract", "inspect", "backbones", "datasets"):
        assert command in output


def test_backbones_and_datasets_are_listed():
    names = [line.split("  ")[0] for line in run("backbones").output.splitlines()]
    assert {"demo", "demo-clean", "dinov2_vits14", "dinov2_vitg14_reg"} <= set(names)
    names = [line.split("  ")[0] for line in run("datasets").output.splitlines()]
    assert {"digits", "cifar10", "tiny-imagenet", "imagefolder:PATH"} <= set(names)


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    folder = write_notebooks(tmp_path / "nb")
    monkeypatch.setattr(report, "notebooks_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("arguments", [
    ("report", "-p", "sed", "1"),
    ("report", "-p", "seed", "1.5"),
    ("report", "-p", "seed", "[1"),
    ("report", "-p", "seed", "1", "-p", "seed", "2"),
    ("report", "--backbone", "demo", "-p", "backbone", "demo"),
    ("report", "--only", "7"),
    ("report", "--only", ""),
    ("report", "--profile", "papier"),
    ("report", "--dataset", "digit"),
    ("report", "--output", "file/out"),
    ("report", "--output", ""),
    ("report", "--nonsense"),
    ("extract", "--output", "features.csv"),
    ("extract", "--output", "folder.npz"),
    ("extract", "--output", "file/features.npz"),
    ("extract", "--dataset", "digit", "--output", "new/features.npz"),
])
def test_bad_input_is_one_line_and_status_2(notebooks, tmp_path, arguments):
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "folder.npz").mkdir()
    before = sorted(tmp_path.rglob("*"))
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_options_of_the_report_reach_the_notebook_and_its_record(notebooks, tmp_path):
    result = run("report", "--backbone", "demo-clean", "--only", "1", "-p", "seed", "3", "-p", "alpha", "1e-3",
                 "--output", "o")
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == str(tmp_path / "o" / "index.html")
    (entry,) = json.loads((tmp_path / "o" / "report.json").read_text(encoding="utf-8"))["notebooks"]
    assert entry["parameters"] == {"backbone": "demo-clean", "dataset": "digits", "limit": None, "seed": 3,
                                   "alpha": 0.001, "data_dir": "."}


def test_a_report_is_repeated_from_its_record(notebooks, tmp_path):
    run("report", "--only", "03", "-p", "seed", "4", "--output", "o")
    result = run("report", "--from", "o")
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == str(tmp_path / "o-repeated" / "index.html")
    records = [json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8"))
               for name in ("o", "o-repeated")]
    assert records[0]["notebooks"][0]["parameters"] == records[1]["notebooks"][0]["parameters"]
    assert records[1]["notebooks"][0]["parameters"]["seed"] == 4


@pytest.mark.parametrize("more", [
    ("--profile", "demo"), ("--backbone", "demo"), ("--dataset", "digits"), ("--only", "01"), ("-p", "seed", "1"),
    ("--dry-run",), ("--force",)])
def test_a_repeated_report_takes_nothing_else(more):
    result = run("report", "--from", "reports/x", *more)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--from" in result.stderr


def test_a_report_without_record_is_refused(tmp_path):
    result = run("report", "--from", tmp_path)
    assert result.exit_code == 2
    assert str(tmp_path / "report.json") in result.stderr
    assert result.stderr.count("\n") == 1


def test_dry_run_writes_nothing(notebooks, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = run("report", "--dry-run", "--only", "01")
    assert result.exit_code == 0
    assert result.output.startswith("profile demo: 1 run of notebooks\n  01_first\n")
    assert sorted(tmp_path.rglob("*")) == before
    assert run("report", "--dry-run", "--dataset", "digit").exit_code == 2


def test_report_prints_its_progress_and_its_place(notebooks, tmp_path):
    result = run("report", "--only", "03", "--output", "out")
    assert result.exit_code == 0
    started, took, index = result.stdout.splitlines()
    assert started == "03_scores …"
    assert took.startswith("03_scores took ")
    assert index == str(tmp_path / "out" / "index.html")
    assert result.stderr == ""
    reused, _ = run("report", "--only", "03", "--output", "out").stdout.splitlines()
    assert reused == took.replace("took", "unchanged, reused (took") + ")"
    again, _, _ = run("report", "--only", "03", "--output", "out", "--force").stdout.splitlines()
    assert again == started


def test_dry_run_names_runs_that_will_be_reused(notebooks, tmp_path):
    run("report", "--only", "03", "--output", "out")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    lines = run("report", "--dry-run", "--only", "01,03", "--output", "out").output.splitlines()
    assert lines[1] == "  01_first, 03_scores (unchanged, reused)"
    assert any(line.startswith("disk: about 5 MB") for line in lines)  # for one run of two
    everything = run("report", "--dry-run", "--only", "03", "--output", "out").output
    assert "time: none" in everything
    for other in (["--force"], ["--output", "elsewhere"], ["-p", "seed", "3"]):
        output = run("report", "--dry-run", "--only", "03", "--output", "out", *other).output
        assert "reused" not in output, other
        assert "time: about" in output, other
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_failed_notebook_is_status_1(notebooks, tmp_path):
    result = run("report", "--only", "02", "--output", "out")
    assert result.exit_code == 1
    assert result.stderr == "02_fails: ValueError: of no use at all (cell [4])\n"
    assert (tmp_path / "out" / "index.html").is_file()


def test_a_failure_of_several_notebooks_is_printed_once(notebooks, tmp_path):
    for name in ("04_fails", "05_fails", "06_fails"):
        cause = "no" if name == "06_fails" else "of no use\\nat all"
        write_notebook(tmp_path / "nb", name, "print()", f"raise ValueError('{cause}')", measure=False)
    result = run("report", "--only", "02,04,05,06", "--output", "out")
    assert result.stderr.splitlines() == [
        "02_fails and 2 more: ValueError: of no use at all (cell [4])", "06_fails: ValueError: no (cell [4])"]


DEAF = """
import os, pathlib, signal, threading, time
def survive(*_):
    threading.Timer(2, pathlib.Path("survived").touch).start()
signal.signal(signal.SIGINT, survive)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path("started").write_text(str(os.getpid()))
while True:
    time.sleep(0.1)"""


@pytest.mark.slow
def test_interrupt_is_one_line_and_status_130_kills_the_kernel_at_once_and_keeps_what_was_finished(tmp_path):
    folder = write_notebooks(tmp_path / "nb")
    write_notebook(folder, "02_fails", DEAF)
    code = (f"import signal, pathlib; signal.signal(signal.SIGINT, signal.default_int_handler); "
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


def stored(path):
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays}


def test_extract_to_npz(tmp_path):
    path = tmp_path / "new" / "features.npz"
    result = run("extract", "--limit", 60, "--batch-size", 7, "--threshold", "2.5", "--source", "query",
                 "--output", path)
    assert result.exit_code == 0, result.output
    assert [each.name for each in path.parent.iterdir()] == ["features.npz"]
    backbone, dataset = load_backbone("demo"), load_dataset("digits", limit=60)
    variants = {"baseline": None, "itae": ITAE(source="query", threshold=2.5)}
    expected, found = extract_features(backbone, dataset, variants, batch_size=7, store=None), stored(path)
    assert set(found) == {"about", "baseline", "itae", "targets"}
    for name in variants:
        np.testing.assert_array_equal(found[name], expected[name])
    np.testing.assert_array_equal(found["targets"], dataset.targets)
    about = json.loads(str(found["about"]))
    assert about["thresholds"] == {"baseline": [], "itae": [2.5]}
    assert about["weights_sha256"] == backbone.weights_sha256
    assert (about["classes"], about["split"], about["batch_size"]) == (dataset.classes, dataset.split, 7)


def test_extract_to_parquet_with_a_fitted_threshold(tmp_path):
    import pandas as pd

    for name in ("features.parquet", "features.npz"):
        assert run("extract", "--limit", 60, "--output", tmp_path / name).exit_code == 0
    table, arrays = pd.read_parquet(tmp_path / "features.parquet"), stored(tmp_path / "features.npz")
    for name in ("baseline", "itae"):
        np.testing.assert_array_equal(np.stack(table[name]), arrays[name])
        assert np.stack(table[name]).dtype == np.float32
    assert list(table["targets"]) == arrays["targets"].tolist()
    (threshold,) = json.loads(str(arrays["about"]))["thresholds"]["itae"]
    assert threshold > 0
    assert np.abs(arrays["baseline"] - arrays["itae"]).max() > 0.01


def test_extract_without_labels(picture):
    result = run("extract", "--dataset", f"imagefolder:{picture.parent}", "--threshold", 1, "--output",
                 picture.parent / "features.npz")
    assert result.exit_code == 0, result.output
    assert set(stored(picture.parent / "features.npz")) == {"about", "baseline", "itae"}


def test_failed_extraction_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise ItaeError("features are\nnot finite")

    monkeypatch.setattr(itae_utils, "extract_features", fail, raising=False)
    result = run("extract", "--limit", 9, "--output", tmp_path / "features.npz")
    assert (result.exit_code, result.stderr) == (2, "Error: features are not finite\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("threshold", ["much", "-", "", "-1", "null"])
def test_odd_thresholds_are_refused(threshold, tmp_path):
    result = run("extract", f"--threshold={threshold}", "--output", tmp_path / "features.npz")
    assert result.exit_code == 2
    assert "threshold=" in result.stderr


@pytest.fixture
def picture(tmp_path):
    """A digit as a file, and the folder that it is in as the working directory."""
    load_dataset("digits")[1][0].save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "jpg"])
def test_inspect_draws_in_the_format_of_its_output(picture, suffix):
    output = picture.parent / "out" / f"look.{suffix}"
    result = run("inspect", picture, "--threshold", "2.5", "--source", "value", "--output", output)
    assert "θ = 2.5 on the norm of the value" in result.output
    assert result.output.endswith(f"{output} written\n")
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml", "jpg": b"\xff\xd8"}[suffix]
    assert output.read_bytes().startswith(start)
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("output", ["look.txt", "folder.png", "a.png/look.png"])
def test_inspect_refuses_an_output_that_can_t_be_written(picture, output, monkeypatch):
    monkeypatch.chdir(picture.parent)
    (picture.parent / "folder.png").mkdir()
    before = set(picture.parent.iterdir())
    result = run("inspect", "a.png", "--threshold", "2.5", "--output", output)
    assert result.exit_code == 2
    assert output.removesuffix("/look.png") in result.stderr
    assert set(picture.parent.iterdir()) == before


def test_interrupt_in_any_command(monkeypatch):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "itae_utils.analysis.inspection", SimpleNamespace(inspect_images=interrupt))
    result = run("inspect", "a.png", "--output", "o.png")
    assert (result.exit_code, result.stderr) == (130, "Error: interrupted\n")
