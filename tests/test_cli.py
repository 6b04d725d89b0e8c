import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

import itae_utils
from itae_utils import cli
from itae_utils.data.datasets import load_dataset
from itae_utils.errors import ItaeError
from itae_utils.report import report, runs
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


def test_report_passes_its_options_on(monkeypatch):
    asked = {}

    def run_report(**options):
        asked.update(options)
        return runs.Report(Path("/somewhere"), "demo", "", ())

    monkeypatch.setattr(report, "run_report", run_report)
    result = run("report", "--profile", "p.yaml", "--backbone", "b", "--dataset", "d", "--only", "1, 03",
                 "-p", "seed", "3", "-p", "alpha", "1e-3", "--output", "o", "--force")
    assert result.exit_code == 0
    assert result.output == "/somewhere/index.html\n"
    assert asked.pop("say")
    assert asked == {"profile": "p.yaml", "backbone": "b", "dataset": "d", "only": ["01", "03"],
                     "parameters": {"seed": 3, "alpha": 0.001}, "output": Path("o"), "force": True}
    run("report")
    assert (asked["force"], asked["only"], asked["output"]) == (False, None, None)


def test_report_is_repeated(monkeypatch):
    asked = []

    def repeat_report(folder, **options):
        asked.append((folder, options["output"]))
        return runs.Report(Path("/somewhere"), "demo", "", ())

    monkeypatch.setattr(report, "repeat_report", repeat_report)
    assert run("report", "--from", "reports/x").output == "/somewhere/index.html\n"
    run("report", "--from", "reports/x", "--output", "o")
    assert asked == [(Path("reports/x"), None), (Path("reports/x"), Path("o"))]


@pytest.mark.parametrize("more", [
    ("--profile", "demo"), ("--backbone", "demo"), ("--dataset", "digits"), ("--only", "01"), ("-p", "seed", "1"),
    ("--dry-run",), ("--force",)])
def test_a_repeated_report_takes_nothing_else(more):
    result = run("report", "--from", "reports/x", *more)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nothing beside it but --output" in result.stderr


def test_a_report_without_record_is_refused(tmp_path):
    result = run("report", "--from", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: {tmp_path / 'report.json'} can't be read")
    assert result.stderr.count("\n") == 1


def test_dry_run_writes_nothing(notebooks, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = run("report", "--dry-run", "--only", "01")
    assert result.exit_code == 0
    assert result.output.startswith("profile demo: 1 run of notebooks\n  01_first\n")
    assert sorted(tmp_path.rglob("*")) == before
    assert run("report", "--dry-run", "--dataset", "digit").exit_code == 2


def test_report_tells_its_progress_and_its_place(notebooks, tmp_path):
    result = run("report", "--only", "03", "--output", "out")
    assert result.exit_code == 0
    started, took, index = result.stdout.splitlines()
    assert started == "03_scores …"
    assert took.startswith("03_scores took ")
    assert index == str(tmp_path / "out" / "index.html")
    assert result.stderr == ""
    kept, _ = run("report", "--only", "03", "--output", "out").stdout.splitlines()
    assert kept == took.replace("took", "unchanged, kept (took") + ")"
    again, _, _ = run("report", "--only", "03", "--output", "out", "--force").stdout.splitlines()
    assert again == started


def test_dry_run_tells_what_will_be_kept(notebooks, tmp_path):
    run("report", "--only", "03", "--output", "out")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    lines = run("report", "--dry-run", "--only", "01,03", "--output", "out").output.splitlines()
    assert lines[1] == "  01_first, 03_scores (unchanged, kept)"
    assert any(line.startswith("disk: about 5 MB") for line in lines)  # for one run of two
    everything = run("report", "--dry-run", "--only", "03", "--output", "out").output
    assert "time: none, all is unchanged" in everything
    for other in (["--force"], ["--output", "elsewhere"], ["-p", "seed", "3"]):
        output = run("report", "--dry-run", "--only", "03", "--output", "out", *other).output
        assert "kept" not in output, other
        assert "time: about" in output, other
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_failed_notebook_is_status_1(notebooks, tmp_path):
    result = run("report", "--only", "02", "--output", "out")
    assert result.exit_code == 1
    assert result.stderr == "02_fails: ValueError: of no use at all (cell [4])\n"
    assert (tmp_path / "out" / "index.html").is_file()


def test_a_failure_of_several_notebooks_is_told_once(notebooks, tmp_path):
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
            f"from itae_utils import cli, report; report.notebooks_folder = lambda: pathlib.Path({str(folder)!r}); "
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
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"01_first", "02_fails"}
    write_notebook(folder, "02_fails", "x = 1")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second, _, index = done.stdout.splitlines()
    assert first.startswith("01_first unchanged, kept (took ")
    assert second == "02_fails …"
    assert index == str(tmp_path / "out" / "index.html")


class TinyFeatures(dict):
    targets = np.array([1, 0])

    def __init__(self, **arrays):
        super().__init__(arrays)
        self.settings = {"backbone": "demo", "batch_size": 3}
        self.thresholds = {"baseline": (), "itae": (0.5,)}


class TinyImages(list):
    name, split, classes = "digits", "all (2)", ("a", "b")


@pytest.fixture
def features(monkeypatch):
    """What `itae extract` asked for, and the features it got."""
    asked = {}
    made = TinyFeatures(baseline=np.eye(2, 3, dtype=np.float32), itae=np.ones((2, 3), dtype=np.float32))

    def extract_features(backbone, dataset, variants, **options):
        asked.update(backbone=backbone, dataset=dataset, variants=variants, **options)
        return made

    monkeypatch.setattr(itae_utils, "load_backbone", lambda name: SimpleNamespace(name=name, weights_sha256="ab"))
    monkeypatch.setattr(itae_utils, "load_dataset", lambda name, limit: TinyImages([name, limit]))
    monkeypatch.setattr(itae_utils, "extract_features", extract_features)
    return asked, made


def test_extract_to_npz(features, tmp_path):
    asked, made = features
    path = tmp_path / "new" / "features.npz"
    result = run("extract", "--dataset", "cifar10", "--limit", 2, "--batch-size", 3, "--threshold", "0.5",
                 "--source", "query", "--output", path)
    assert result.exit_code == 0, result.output
    assert (asked["backbone"].name, asked["dataset"], asked["batch_size"]) == ("demo", ["cifar10", 2], 3)
    assert asked["variants"]["baseline"] is None
    assert (asked["variants"]["itae"].source, asked["variants"]["itae"].threshold) == ("query", 0.5)
    with np.load(path) as stored:
        assert set(stored) == {"about", "baseline", "itae", "targets"}
        np.testing.assert_array_equal(stored["baseline"], made["baseline"])
        np.testing.assert_array_equal(stored["targets"], made.targets)
        about = json.loads(str(stored["about"]))
    assert about["thresholds"] == {"baseline": [], "itae": [0.5]}
    assert (about["classes"], about["weights_sha256"], about["split"]) == (["a", "b"], "ab", "all (2)")
    assert [each.name for each in path.parent.iterdir()] == ["features.npz"]


def test_extract_to_parquet(features, tmp_path):
    import pandas as pd

    result = run("extract", "--output", tmp_path / "features.parquet")
    assert result.exit_code == 0, result.output
    table = pd.read_parquet(tmp_path / "features.parquet")
    np.testing.assert_array_equal(np.stack(table["itae"]), features[1]["itae"])
    assert np.stack(table["baseline"]).dtype == np.float32
    assert list(table["targets"]) == [1, 0]
    assert features[0]["variants"]["itae"].threshold == "auto"


def test_extract_without_labels(features, tmp_path, monkeypatch):
    monkeypatch.setattr(TinyFeatures, "targets", None)
    assert run("extract", "--output", tmp_path / "features.npz").exit_code == 0
    with np.load(tmp_path / "features.npz") as stored:
        assert "targets" not in stored


def test_failed_extraction_leaves_no_file(features, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise ItaeError("features are\nnot finite")

    monkeypatch.setattr(itae_utils, "extract_features", fail)
    result = run("extract", "--output", tmp_path / "features.npz")
    assert (result.exit_code, result.stderr) == (2, "Error: features are not finite\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_extract_with_the_embedded_backbone(tmp_path):
    result = run("extract", "--limit", 60, "--output", tmp_path / "features.npz")
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "features.npz") as stored:
        assert stored["baseline"].shape == stored["itae"].shape == (60, 64)
        assert np.abs(stored["baseline"] - stored["itae"]).max() > 0.01
        (threshold,) = json.loads(str(stored["about"]))["thresholds"]["itae"]
    assert threshold > 0


@pytest.mark.parametrize("threshold", ["much", "-", ""])
def test_odd_thresholds_are_refused(threshold, tmp_path):
    result = run("extract", "--threshold", threshold, "--output", tmp_path / "features.npz")
    assert result.exit_code == 2
    assert "neither a number nor auto" in result.stderr


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
