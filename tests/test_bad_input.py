"""Bad input is reported in one line, with exit status 2, and leaves nothing behind."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from itae_utils.cli import main
from itae_utils.report import report
from itae_utils.report.runs import read_record
from tests.data.test_datasets import truncated_jpeg
from tests.report.test_rules import INVALID
from tests.tiny_notebooks import DELETED, changed

LETTERS = "abcxyz0189 -_.,:;/\\'\"{}[]<>()*?!%&$#@~^|äßθ字\t\n\x1b\u2028"
RECORD = {"schema": 3, "profile": "demo", "description": "", "grid": {}, "notebooks": [
    {"notebook": "01_artifact_discovery", "pairing": "", "parameters": {"backbone": "demo"}}]}
EXTRACT = ["extract", "--output", "new/features.npz"]

NAMES = [
    ("--backbone", "dinov2_vits15"), ("--backbone", "resnet50"), ("--backbone", "vit_base_patch16_224.dyno"),
    ("--backbone", "vit_base_patch16_siglip_224"), ("--backbone", "hf-hub:a/b"), ("--backbone", ""),
    ("--dataset", "Digit-s-s"), ("--dataset", "imagefolder"), ("--dataset", "imagefolder:"), ("--dataset", ""),
    ("--dataset", "imagefolder:nowhere"), ("--dataset", "imagefolder:file"), ("--dataset", "imagefolder:empty"),
    ("--dataset", "imagefolder:mixed"), ("--dataset", "imagefolder:~nobody/x"), ("--dataset", "imagefolder:\0"),
    ("--dataset", "imagefolder:broken/loop"), ("--dask", "local:0"), ("--dask", "local:many"),
    *(("--dataset", name) for name in ("file", "./mixed", "~nobody/x", "empty", "hf:", ".", "C:\\photos")),
    ("--split", "train"), ("--split", ""), ("--label-column", "y"), ("--on-error", "ignore"),
    *(("--image-size", size) for size in ("13", "1:30", "")), *(("--device", device) for device in ("gpu", "cuda:99")),
    ("--preprocess", "square"), ("--checkpoint", ""), ("--checkpoint", "file"), ("--store", ""),
    ("--backbone", "vit_tiny_patch16_224", "--checkpoint", "file"),
    ("--backbone", "vit_tiny_patch16_224", "--checkpoint", "C:\\weights.pth")]
REPORT = [
    ("--only", "1;2"), ("--only", "01,,03"), ("--only", ""), ("--only", "04"), ("--only", "-1"), ("--profile", ""),
    ("--profile", "Demo"), ("--profile", "nowhere.yaml"), ("--profile", "empty.yaml"), ("word",), ("--output",),
    ("-p", "seed"), ("--force=1",),
    ("--only", "01,"), ("--only", "9"), ("--only", "1-3"), ("--profile", "~/nowhere.yaml"),
    # contradictions
    ("--checkpoint", "file", "-p", "checkpoint", "file"), ("--dataset", "flat", "--only", "01", "--output", "flat"),
    ("-p", "seed", "1", "-p", "seed", "2"), ("--backbone", "demo", "-p", "backbone", "demo-clean"),
    ("--dataset", "digits", "-p", "dataset", "digits"), ("-p", "output_dir", "here"),
    ("--only", "01", "-p", "clusters", "5"), ("--only", "04", "-p", "results_dir", "nowhere"),
    ("--only", "04", "-p", "results_dir", "file"), ("--profile", "paper", "--only", "04"),
    ("--only", "04", "-p", "results_dir", "empty", "--output", "empty"),
    *(("--from", "record", *more) for more in [
        ("--profile", "demo"), ("--backbone", "demo"), ("--dataset", "digits"), ("--only", "01"), ("--force",),
        ("--dry-run",), ("-p", "seed", "1"), ("--checkpoint", "file"), ("--split", "train")]),
    ("--from", "nowhere"), ("--from", "file"), ("--from", ""), ("-p", "checkpoint", "nowhere.pth"),
    ("-p", "checkpoint", "file"), ("-p", "checkpoint", "''"), ("--dry-run", "--dataset", "digit"),
    ("--backbone", "dinov2_vits14", "-p", "checkpoint", "nowhere.pth"), ("--dry-run", "-p", "alpha", "7"),
    ("--backbone", "dinov2_vits14", "-p", "image_size", "225"), ("-p", "image_size", "13"),
    ("--backbone", "vit_tiny_patch16_224", "-p", "image_size", "100"),
    # values
    ("-p", "alpha", ".nan"), ("-p", "clusters", "1798"), ("-p", "dataset", "3"), ("-p", "dataset", "[digits]"),
    *(("-p", "limit", text) for text in ("", " ", "# 5", "1_000", "010", "0x10", "0o17", "1,000", "1e3000", "1e-3")),
    *(("-p", "normalize", word) for word in ("yes", "no", "on", "off", "y", "1")),
    ("-p", "source", "attention", "-p", "tail", "low"), ("-p", "threshold", "share:0%"), ("-p", "threshold", "sd:0"),
    ("-p", "limit", "'3'"), ("-p", "limit", "2024-01-01"), ("-p", "normalize", "maybe"), ("-p", "source", "KEY"),
    *(("-p", name, json.dumps(value)) for name, value in INVALID[::3]),
    *(("-p", "limit", text) for text in [
        "[1", "{a", "'", '"', "a: b: c", "[1, 2}", "&", "*unknown", "!!python/object:os.system x", "!x 1", "%", "@",
        "`", "0100", "1:30", "1" * 5000, "[" * 2000, "- a\n b: c: d", "\x00", "\x07", "? :", "=", "<<", "0b", "._"]),
    *(("--only", "02,03", "--output", output) for output in [
        "file", "file/out", "file/a/b", "/dev/null/out", "/proc/nowhere/out", "", "z" * 300, "z\udcff"])]
SETTINGS = [
    *(("--threshold", threshold) for threshold in [
        "-1", "nan", "inf", "much", "", "1,5", "null", "share:0%", "share:50%", "share:2", "sd:0", "sd:-1", "sd:"]),
    *(("--rank", rank) for rank in ["0", "1.5", "x", "", "null"]), ("--source", "direction", "--rank", "65"),
    ("--tail", "both"), ("--source", "attention", "--tail", "low"), ("--source", "direction", "--tail", "low"),
    ("--source", "keys"), ("--attenuation", "max")]
EXTRACTIONS = [
    *(("--output", output) for output in [
        "features", "features.csv", "file/features.npz", "", "folder.npz", "new/.npz"]),
    *(("--limit", limit) for limit in ["0", "-1", "x", "1.5", "", "010"]),
    *(("--batch-size", size) for size in ["0", "many"])]
INSPECTIONS = [
    ("nowhere.png",), ("empty",), ("file",), ("good.png", "text.png"), ("good.png",) * 51, ("",), (),
    *(("good.png", "--output", output) for output in ["x", "x.gif", "file/x.png", "", "folder.png"]),
    ("good.png", "--backbone", "resnet50"), ("good.png", "--image-size", "13"),
    ("good.png", "--checkpoint", "file"), ("good.png", "--device", "gpu"), ("text.png", "--on-error", "skip"),
    ("good.png", "nowhere.png", "--on-error", "skip"), ("~nobody/good.png",)]
OTHERS = [
    ["zzreport"], ["--report"], ["-x"], ["extract"], ["backbones", "demo"], ["datasets", "--all"],
    ["store", "nonsense"], ["store", "prune"], ["store", "prune", "--older-than", "-1"],
    ["store", "prune", "--max-size", "much"]]
PROFILES = [
    "[1, 2]", "just words", "common: [1]", "common: {sed: 1}", "common: {seed: x}", "common: {1: 2}", "'07': {}",
    "'01': 3", "'01': {k: 1}", "grid: {seed: [1]}", "grid: {dataset: digits}", "grid: {dataset: []}", "grid: [a]",
    "grid: {dataset: [nonsense]}", "grid: {backbone: [demo, demo]}", "grid: {backbone: [1]}", "a: b: c", "\t",
    "common: {output_dir: x}", "common: {image_size: 13}", "common: {limit: 0}", "[" * 2000, "2024-13-45: 1",
    "common: {percents: [0]}", "grid: {dataset: [[digits]]}", "grid: {dataset: [null]}", "common: {dataset: null}",
    "nonsense: {seed: 1}", "04: {results_dir: nowhere}", "common: {backbone: demo, checkpoint: nowhere}",
    "common: *a", "\x00", "{{a: b}: c}"]
RECORDS = ["", "{", "[]", "null", *(json.dumps(changed(RECORD, place, value)) for place, value in [
    *((key, value) for key in RECORD for value in (DELETED, 4)), ("notebooks.0.notebook", "zz"),
    ("notebooks.0.pairing", "../zz"), ("notebooks.0.parameters", {"zz": 3}), ("notebooks.0.parameters", DELETED)])]


def bad_commands(folder: Path) -> Iterator[list[str]]:
    """Yield the arguments of each command; a profile or a record is written just before its command."""
    rng = random.Random(4)
    words = ["zz" + "".join(rng.choices(LETTERS, k=rng.randint(1, 12))) for _ in range(9)]
    for word in [*words, "z" * 5000]:
        yield from (["report", option, word] for option in ("--profile", "--backbone", "--dataset", "--only"))
        yield from (["report", "-p", word, "3"], ["report", f"--{word}"], [*EXTRACT, "--dataset", word],
                    ["report", "--dataset", f"imagefolder:{word}"])
    yield from (["inspect", word] for word in [*words, "z" * 5000])
    yield from (["report", *options] for options in (*NAMES, *REPORT))
    yield from ([*EXTRACT, *options] for options in (*NAMES, *SETTINGS, *EXTRACTIONS))
    yield from (["inspect", *options] for options in (*INSPECTIONS, *(("good.png", *each) for each in SETTINGS)))
    yield from OTHERS
    for content in [*(text.encode() for text in PROFILES), b"\xff\xfe\xfd"]:
        (folder / "profile.yaml").write_bytes(content)
        yield ["report", "--profile", "profile.yaml"]
    for text in RECORDS:
        (folder / "record" / "report.json").write_text(text, encoding="utf-8")
        yield ["report", "--from", "record"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Make a working folder with the files that bad input refers to; every command would write below it."""
    for name in ("empty", "flat", "mixed/class", "broken", "record", "folder.npz", "folder.png"):
        (tmp_path / name).mkdir(parents=True)
    picture = Image.fromarray(np.zeros((8, 8), dtype=np.uint8))
    for name in ("good.png", "flat/a.png", "mixed/a.png", "mixed/class/b.png"):
        picture.save(tmp_path / name)
    (tmp_path / "broken" / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "record" / "report.json").write_text(json.dumps(RECORD))
    read_record(tmp_path / "record")  # it is valid; commands that name it are bad for another reason
    for variable in ("ITAE_DATA", "ITAE_CACHE", "ITAE_STORE"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def check(arguments: list[str], status: int, stdout: str, stderr: str) -> None:
    context = f"{arguments!r} gave {status}, {stdout!r}, {stderr[-2000:]!r}"
    assert (status, stdout, len(stderr.splitlines())) == (2, "", 1), context
    assert stderr.startswith("Error: "), context
    assert stderr.endswith("\n"), context


def test_all_in_one_process(place, monkeypatch):
    def execute(*_arguments):
        raise AssertionError("a notebook ran")

    monkeypatch.setattr(report, "execute", execute)
    for arguments in bad_commands(place):
        before = state(place)
        result = CliRunner().invoke(main, arguments)
        if not isinstance(result.exception, SystemExit):
            raise AssertionError(f"{arguments!r}") from result.exception
        check(arguments, result.exit_code, result.stdout, result.stderr)
        assert state(place) == before, arguments


@pytest.mark.slow
def test_some_in_processes_of_their_own(place):
    command = [sys.executable, "-c", "from itae_utils.cli import main; main()"]
    possible = [arguments for arguments in bad_commands(place) if "\0" not in "".join(arguments)]
    for arguments in possible[::len(possible) // 5]:
        before = state(place)
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        check(arguments, done.returncode, done.stdout, done.stderr)
        assert state(place) == before, arguments


@pytest.mark.slow
def test_an_error_that_only_a_notebook_finds_is_one_line_too(place):
    named = "photos/broken.jpg"
    (place / "photos").mkdir()
    truncated_jpeg(place / "photos" / "broken.jpg")  # its header is whole
    result = CliRunner().invoke(main, ["report", "--only", "01", "--output", "out", "--dataset", "photos"])
    assert result.exit_code == 1
    assert result.stderr.startswith("01_artifact_discovery: ItaeError: ")
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout.splitlines()[-1] == str(place / "out" / "index.html")
    assert named in (place / "out" / "index.html").read_text(encoding="utf-8").partition("<pre>")[2]
    assert not (place / "out" / "01_artifact_discovery" / "run.json").exists()
