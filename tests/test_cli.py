import errno
import io
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
from itae_utils.files import OUTPUT_MARK
from itae_utils.method.setting import ITAE
from itae_utils.models.backbones import load_backbone
from itae_utils.report import report
from tests.fake_execution import FakeExecute
from tests.tiny_notebooks import PARAMETERS, use_notebooks, write_notebook, write_notebooks


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
    assert all(command in help_text for command in ("report", "extract", "explore", "inspect", "store", "backbones",
                                                    "datasets"))
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

    @pytest.mark.parametrize("as_options", [True, False])
    def test_loading_options_are_parameters(self, execute, tmp_path, monkeypatch, as_options):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr("itae_utils.report.plan.check_checkpoint", lambda *_: None)
        write_notebook(tmp_path / "nb", "01_first", parameters=PARAMETERS + "options = {'alpha': 0.5}\n")
        (tmp_path / "w.pth").touch()
        given = {"checkpoint": "~/w.pth", "image_size": "112", "device": "cpu", "on_error": "skip", "split": "all",
                 "preprocess": "meta-eval", "format": "paper", "store": "~/s"}
        options = [each for name, value in given.items()
                   for each in (("--" + name.replace("_", "-"),) if as_options else ("-p", name)) + (value,)]
        result = run("report", "--only", "01", "--backbone", "dinov2_vits14", *options, "--output", "~/o")
        assert result.exit_code == 0, result.output
        found = self.record(tmp_path, "o")["notebooks"][0]["parameters"]["options"]
        expected = given | {"checkpoint": str(tmp_path / "w.pth"), "image_size": 112}
        del expected["store"]
        assert {name: found[name] for name in expected} == expected

    def test_a_profile_a_folder_and_a_record_may_be_in_the_home_folder(self, execute, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "mine.yaml").write_text("common: {dataset: ~/photos, limit: 1e2}", encoding="utf-8")
        (tmp_path / "photos").mkdir()
        load_dataset("digits")[0][0].save(tmp_path / "photos" / "1.png")
        monkeypatch.chdir(tmp_path / "nb")
        assert run("report", "--profile", "~/mine.yaml", "--only", "01", "--output", "~/o").exit_code == 0
        assert run("report", "--from", "~/o").exit_code == 0
        given = self.record(tmp_path, "o-repeated")["notebooks"][0]["parameters"]
        assert (given["dataset"], given["limit"]) == (f"imagefolder:{tmp_path}/photos", 100)

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
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        report.LOCK, OUTPUT_MARK, "01_first", "02_fails"}
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
    @pytest.mark.parametrize(("suffix", "setting"), [
        ("npz", ITAE()), ("parquet", ITAE()), ("npz", ITAE(source="value", threshold=9)),
        ("npz", ITAE(source="token", threshold="share:2%", attenuation="substitute")),
        ("parquet", ITAE(source="direction", threshold="sd:2", rank=3, attenuation="spread")),
        ("npz", ITAE(source="query", threshold="share:3%", tail="high"))])
    def test_the_file_holds_features_labels_and_settings(self, tmp_path, suffix, setting):
        path = tmp_path / "new" / f"features.{suffix}"
        given = {name: getattr(setting, name) for name in ("source", "threshold", "tail", "rank", "attenuation")}
        options = [each for name, value in given.items() if value is not None for each in (f"--{name}", value)]
        result = run("extract", "--limit", 60, "--batch-size", 7, *options, "--output", path)
        assert result.exit_code == 0, result.output
        assert list(path.parent.iterdir()) == [path]
        backbone, dataset = load_backbone("demo"), load_dataset("digits", limit=60)
        variants = {"baseline": None, "itae": setting}
        expected = extract_features(backbone, dataset, variants, batch_size=7, store=None)
        found, about = read_features(path)
        assert set(found) == {*variants, "targets"}
        for name in variants:
            np.testing.assert_array_equal(found[name], expected[name], strict=True)
        np.testing.assert_array_equal(found["targets"], dataset.targets)
        assert np.abs(found["baseline"] - found["itae"]).max() > 0.01
        assert about["thresholds"] == {name: list(expected.thresholds[name]) for name in variants}
        assert {name: about[name] for name in given if name != "threshold"} == {
            "source": setting.source, "tail": setting.side, "rank": setting.rank, "attenuation": setting.attenuation}
        assert about["weights_sha256"] == backbone.weights_sha256
        assert (about["classes"], about["split"], about["batch_size"]) == (dataset.classes, dataset.split, 7)

    def test_without_labels(self, picture):
        output = picture.with_name("features.npz")
        result = run("extract", "--dataset", f"imagefolder:{picture.parent}", "--threshold", 1, "--output", output)
        assert result.exit_code == 0, result.output
        arrays, _ = read_features(output)
        assert set(arrays) == {"baseline", "itae", "names"}
        assert list(arrays["names"]) == ["a.png"]

    @pytest.mark.parametrize("suffix", ["npz", "parquet"])
    def test_the_names_of_files_are_stored_in_the_order_of_the_features(self, picture, suffix):
        names = ["b/a c.png", "b/é.png", "ä/字.png"]
        for name in reversed(names):
            (path := picture.parent / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture.read_bytes())
        output = picture.parent / f"features.{suffix}"
        result = run("extract", "--dataset", picture.parent / "photos", "--limit", "1e1", "--output", output)
        assert result.exit_code == 0, result.output
        arrays, _ = read_features(output)
        assert list(arrays["names"]) == names
        assert list(arrays["targets"]) == [0, 0, 1]

    @pytest.mark.parametrize(("options", "said"), [
        (("--limit", 20), "no θ on the norm of the key: 980 patches"),
        (("--limit", 20, "--threshold", "1e-9"), "θ = 1e-09 on the norm of the key: 0 of 980 patches lie at or below"),
        (("--limit", "2e1", "--threshold", 9), "θ = 9 on the norm of the key: "),
        (("--source", "token", "--threshold", "share:2%"), "norm of the token: 59 of 2,940 patches lie at or above"),
        (("--tail", "high", "--threshold", "share:2%"), "norm of the key: 59 of 2,940 patches lie at or above"),
        (("--source", "attention", "--threshold", "1"), "[CLS] attention: 0 of 2,940 patches lie at or above"),
        (("--source", "direction", "--threshold", "share:1%"), "direction: 30 of 2,940 patches lie at or above"),
        (("--source", "token", "--tail", "low"), "set tail='high'")])
    def test_it_says_which_threshold_was_used_and_if_nothing_changed(self, tmp_path, options, said):
        result = run("extract", "--limit", 60, *options, "--output", tmp_path / "f.npz")
        arrays, _ = read_features(tmp_path / "f.npz")
        assert said in result.output
        assert ("equal to baseline" in result.output) == np.array_equal(arrays["itae"], arrays["baseline"])

    def test_loading_options(self, picture, tmp_path):
        (tmp_path / "photos" / "train").mkdir(parents=True)
        (tmp_path / "photos" / "val").mkdir()
        for name in ("train/1.png", "train/2.png", "val/3.png"):
            (tmp_path / "photos" / name).write_bytes(picture.read_bytes())
        (tmp_path / "photos" / "train" / "bad.png").write_text("no image")
        result = run("extract", "--dataset", tmp_path / "photos", "--split", "train", "--on-error", "skip",
                     "--image-size", 32, "--device", "cpu", "--output", tmp_path / "f.npz")
        arrays, about = read_features(tmp_path / "f.npz")
        assert [name.rpartition("/")[2] for name in arrays["names"]] == ["1.png", "2.png"]
        assert len(arrays["baseline"]) == 2
        assert "bad.png" in result.output
        assert any("bad.png" in note for note in about["notes"])

    def test_a_full_disk_leaves_no_file(self, tmp_path, monkeypatch):
        def savez(file, **_arrays):
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(np, "savez", savez)
        result = run("extract", "--limit", 9, "--threshold", 1, "--output", tmp_path / "features.npz")
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert os.strerror(errno.ENOSPC) in result.stderr
        assert not list(tmp_path.iterdir())


def test_inspect_takes_loading_options(picture, monkeypatch):
    bad = picture.with_name("bad.png")
    bad.write_text("no image")
    monkeypatch.setenv("HOME", str(picture.parent))
    result = run("inspect", "~/a.png", bad, "--image-size", 56, "--device", "cpu", "--on-error", "skip",
                 "--output", "~/look.png")
    assert result.exit_code == 0, result.output
    assert "56 × 56" in result.output
    assert "bad.png" in result.output
    assert (picture.parent / "look.png").is_file()
    no_model = run("inspect", picture, "--backbone", "vit_tiny_patch16_224", "--checkpoint", "~/bad.png")
    assert (no_model.exit_code, no_model.stderr.count("\n")) == (2, 1)
    assert str(bad) in no_model.stderr


def test_inspect_takes_a_setting(picture, monkeypatch):
    monkeypatch.chdir(picture.parent)
    for options, found in [
        (("--source", "attention", "--threshold", "share:10%"), "[CLS] attention follows from share:10%: 5 of 49"),
        (("--source", "direction", "--rank", "2", "--threshold", "0"), "direction was given: 49 of 49 patches"),
        (("--tail", "high", "--threshold", "share:10%", "--attenuation", "substitute"), "5 of 49 patches lie at or"),
    ]:
        result = run("inspect", picture, *options)
        assert result.exit_code == 0, result.output
        assert found in result.output
        assert ("the attention stays" in result.output) == ("substitute" in options)


@pytest.mark.parametrize(("encoding", "arguments", "status"), [
    *((name, ["report", "--only", "01", "--output", "字"], 0) for name in ("latin-1", "cp1252", "cp437", "ascii")),
    ("latin-1", ["report", "--only", "01", "--dry-run"], 0), ("latin-1", ["report", "-h"], 0),
    ("latin-1", ["backbones"], 0), ("cp437", ["datasets"], 0), ("latin-1", ["store", "list", "--store", "字"], 0),
    ("latin-1", ["report", "--profile", "字"], 2)])
def test_what_an_encoding_lacks_is_replaced(execute, tmp_path, monkeypatch, encoding, arguments, status):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, errors=errors) for errors in ("strict", "backslashreplace"))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == status
    stream = err if status else out
    stream.flush()
    assert len(stream.buffer.getvalue()) > 20


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "jpg"])
def test_inspect_draws_in_the_format_of_its_output(picture, suffix):
    output = picture.parent / "out" / f"look.{suffix}"
    result = run("inspect", picture, "--threshold", "2.5", "--source", "value", "--output", output)
    assert "θ = 2.5 on the norm of the value" in result.output
    assert result.output.endswith(f"{output} written\n")
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml", "jpg": b"\xff\xd8"}[suffix]
    assert output.read_bytes().startswith(start)
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize(("words", "said"), [
    (["report", "--source", "token"], "-p source VALUE"), (["report", "--n-init", "3"], "-p n_init VALUE"),
    (["report", "--nothing"], "report --help"), (["compare", "--source", "x"], "compare --help")])
def test_an_option_that_is_a_parameter_says_so(words, said):
    result = CliRunner().invoke(cli.main, words)
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1)
    assert said in result.output
