"""Bad input is reported in one line, with exit status 2, and leaves nothing behind."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from itae_utils.cli import main
from itae_utils.report import report
from tests.data.test_datasets import truncated_jpeg

COUNT = 200
LETTERS = "abcxyz0189 -_.,:;/\\'\"{}[]<>()*?!%&$#@~^|äßθ字\t\n\x1b\u2028"
WHOLE = ["limit", "image_size", "sample", "examples", "clusters", "seeds", "n_init", "batch_size", "seed"]
CHOICES = ["source", "attenuation", "preprocess", "pos_embed", "precision", "on_error"]
RECORD = {"schema": 3, "profile": "demo", "description": "", "grid": {}, "notebooks": [
    {"notebook": "01_artifact_discovery", "pairing": "", "parameters": {"backbone": "demo"}}]}


def word(rng: random.Random) -> str:
    """Any text, but none that means anything."""
    return "zz" + "".join(rng.choices(LETTERS, k=rng.randint(1, 12)))


def too_long(_rng) -> str:
    return "z" * 5000


def somewhere_impossible(rng, folder):
    return rng.choice(["file", "file/out", "file/a/b", "/dev/null/out", "/proc/nowhere/out", "", "z" * 300, "z\udcff",
                       str(folder / "file")])


def unknown_name(rng, folder):
    option = rng.choice(["--profile", "--backbone", "--dataset", "--only"])
    return ["report", option, rng.choice([word, too_long])(rng)]


def near_miss(rng, folder):
    return ["report", *rng.choice([
        ("--backbone", "dinov2_vits15"), ("--backbone", "resnet50"), ("--backbone", "vit_base_patch16_224.dyno"),
        ("--backbone", "vit_base_patch16_siglip_224"), ("--backbone", "hf-hub:a/b"), ("--dataset", "Digits"),
        ("--dataset", "imagefolder"), ("--dataset", "imagefolder:"), ("--only", "1;2"), ("--only", "01,,03"),
        ("--only", ""), ("--only", "04"), ("--only", "-1"), ("--profile", ""), ("--profile", "Demo"),
        ("--backbone", ""), ("--dataset", "")])]


def bad_folder(rng, folder):
    path = rng.choice(["nowhere", "file", "empty", "mixed", "~nobody/x", "broken/loop", "\0", word(rng)])
    command = rng.choice([["report"], ["extract", "--output", "new/features.npz"]])
    return [*command, "--dataset", f"imagefolder:{path}"]


def unknown_parameter(rng, folder):
    return ["report", "-p", word(rng), str(rng.randint(0, 9))]


def wrong_type(rng, folder):
    name, value = rng.choice([
        *((name, value) for name in WHOLE for value in ("1.5", "true", "[1]", "{a: 1}", "'3'", "2024-01-01")),
        *((name, value) for name in CHOICES for value in ("1", "true", "[key]", "null")),
        *((name, value) for name in ("sources", "attenuations", "percents") for value in ("key", "1", "null", "{}")),
        ("normalize", "1"), ("normalize", "maybe"), ("alpha", "small"), ("alpha", "true"), ("threshold", "true"),
        ("threshold", "null"), ("dataset", "3"), ("dataset", "[digits]"), ("backbone", "1.0"), ("checkpoint", "3"),
        ("percents", "[one]"), ("sources", "[[key]]"), ("sources", "[1]")])
    return ["report", "-p", name, value]


def malformed_yaml(rng, folder):
    return ["report", "-p", rng.choice(WHOLE), rng.choice([
        "[1", "{a", "'", '"', "a: b: c", "[1, 2}", "&", "*unknown", "!!python/object:os.system x", "!x 1", "%", "@",
        "`", "0100", "1:30", "1" * 5000, "[" * 5000, "- a\n b: c: d", "\x00", "\x07", "? :", "=", "<<", "0b", "._"])]


def out_of_range(rng, folder):
    name, value = rng.choice([
        *((name, value) for name in WHOLE for value in (-1, -(10**9), 2**31, 10**30, "1e30", ".inf")),
        *((name, 0) for name in WHOLE if name != "seed"), ("clusters", 1), ("clusters", 1798),
        ("alpha", 0), ("alpha", 1), ("alpha", -0.5), ("alpha", 2), ("alpha", ".nan"), ("alpha", ".inf"),
        ("threshold", -1), ("threshold", ".nan"), ("threshold", ".inf"), ("percents", "[0]"), ("percents", "[100]"),
        ("percents", "[1, -2]"), ("percents", "[.nan]"), ("sources", "[]"), ("attenuations", "[]"),
        ("image_size", 13), ("image_size", 27)])
    return ["report", "-p", name, str(value)]


def wrong_choice(rng, folder):
    name = rng.choice([*CHOICES, "threshold", "sources", "attenuations"])
    return ["report", "-p", name, rng.choice(["nonsense", "KEY", "''", "[nonsense]", "means"])]


def impossible_output(rng, folder):
    return ["report", "--only", rng.choice(["01", "02,03"]), "--output", somewhere_impossible(rng, folder)]


def bad_profile(rng, folder):
    path = folder / "profile.yaml"
    text = rng.choice([
        "[1, 2]", "just words", "common: [1]", "common: {sed: 1}", "common: {seed: x}", "common: {1: 2}", "'07': {}",
        "'01': 3", "'01': {k: 1}", "grid: {seed: [1]}", "grid: {dataset: digits}", "grid: {dataset: []}", "grid: [a]",
        "grid: {dataset: [nonsense]}", "grid: {backbone: [demo, demo]}", "grid: {backbone: [1]}", "a: b: c", "\t",
        "common: {output_dir: x}", "common: {image_size: 13}", "common: {limit: 0}", "[" * 5000, "2024-13-45: 1",
        "common: {percents: [0]}", "grid: {dataset: [[digits]]}", "grid: {dataset: [null]}", "common: {dataset: null}",
        "nonsense: {seed: 1}", "04: {results_dir: nowhere}", "common: {backbone: demo, checkpoint: nowhere}",
        "common: *a", "\x00", "{{a: b}: c}", f"common: {{source: {word(rng)!r}}}"])
    path.write_text(text, encoding="utf-8")
    if rng.random() < 0.1:
        path.write_bytes(b"\xff\xfe\xfd")
    return ["report", "--profile", rng.choice([str(path), "profile.yaml", "nowhere.yaml", "empty.yaml"])]


def usage(rng, folder):
    command = rng.choice(["report", "extract", "inspect", "backbones", "datasets"])
    return rng.choice([
        [command, "--" + word(rng).replace("=", "")], [f"zz{command}"], ["--" + command], [command, "-p"],
        ["report", word(rng)], ["report", "--output"], ["report", "-p", "seed"], ["extract"], ["inspect"], ["-x"],
        ["backbones", "demo"], ["datasets", "--all"], ["store", "nonsense"], ["store", "prune"],
        ["store", "prune", "--older-than", "-1"], ["store", "prune", "--max-size", "much"], ["report", "--force=1"]])


def contradiction(rng, folder):
    return ["report", *rng.choice([
        ("-p", "seed", "1", "-p", "seed", "2"), ("--backbone", "demo", "-p", "backbone", "demo-clean"),
        ("--dataset", "digits", "-p", "dataset", "digits"), ("-p", "limit", "5", "-p", "k", "5", "-p", "limit", "5"),
        ("-p", "output_dir", "here"), ("--only", "01", "-p", "clusters", "5"), ("--only", "04"),
        ("--only", "04", "-p", "results_dir", "nowhere"), ("--only", "04", "-p", "results_dir", "file"),
        ("--only", "04", "-p", "results_dir", "empty", "--output", "empty"), ("--from", "record", "--only", "01"),
        ("--from", "record", "--force"), ("--from", "record", "--dry-run"), ("--from", "record", "-p", "seed", "1"),
        ("-p", "checkpoint", "nowhere.pth"), ("-p", "checkpoint", "file"), ("-p", "checkpoint", "''"),
        ("--backbone", "dinov2_vits14", "-p", "checkpoint", "nowhere.pth"), ("--dry-run", "--dataset", "digit"),
        ("--dry-run", "-p", "alpha", "7"), ("--backbone", "dinov2_vits14", "-p", "image_size", "225"),
        ("--backbone", "vit_tiny_patch16_224", "-p", "image_size", "100"), ("--profile", "paper", "--only", "04"),
        ("--dask", "local:0"), ("--dask", "local:many")])]


def bad_record(rng, folder):
    record = json.loads(json.dumps(RECORD))
    entry = record["notebooks"][0]
    where, key = rng.choice([(record, key) for key in record] + [(entry, key) for key in entry])
    if rng.random() < 0.5:
        del where[key]
    else:
        where[key] = {"pairing": "../zz", "notebook": "zz", "parameters": {"zz": 3}}.get(key, 3)
    text = rng.choice([json.dumps(record), "", "{", "[]", "null", json.dumps(record)])
    (folder / "record" / "report.json").write_text(text, encoding="utf-8")
    return ["report", "--from", rng.choice(["record", "record", "record", "nowhere", "file", ""])]


def bad_extraction(rng, folder):
    options = {"--output": "new/features.npz"} | dict([rng.choice([
        ("--output", rng.choice(["features", "features.csv", "file/features.npz", "", "folder.npz", "new/.npz"])),
        ("--limit", rng.choice(["0", "-1", "x", "1.5", ""])), ("--batch-size", rng.choice(["0", "-3", "many", ""])),
        ("--threshold", rng.choice(["-1", "nan", "inf", "much", "", "1,5"])),
        ("--source", rng.choice(["keys", "", "KEY"])), ("--dataset", word(rng)), ("--backbone", word(rng)),
        ("--backbone", "vit_base_patch16_224.dyno"), ("--backbone", "resnet50"), ("--dask", "local:0")])])
    return ["extract", *(text for pair in options.items() for text in pair)]


def bad_inspection(rng, folder):
    return ["inspect", *rng.choice([
        ["nowhere.png"], ["empty"], ["file"], ["good.png", "text.png"], ["good.png"] * 51, [word(rng)], [""],
        ["good.png", "--output", rng.choice(["x", "x.gif", "file/x.png", "", "folder.png"])],
        ["good.png", "--threshold", rng.choice(["-1", "nan", "much", ""])],
        ["good.png", "--source", rng.choice(["keys", ""])], ["good.png", "--backbone", word(rng)],
        ["good.png", "--backbone", "resnet50"]])]


KINDS: list[Callable] = [
    unknown_name, near_miss, bad_folder, unknown_parameter, wrong_type, malformed_yaml, out_of_range, wrong_choice,
    impossible_output, bad_profile, usage, contradiction, bad_record, bad_extraction, bad_inspection]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with what the bad input refers to; all that is ever written would be written below it."""
    for name in ("empty", "mixed/class", "broken", "record", "folder.npz", "folder.png"):
        (tmp_path / name).mkdir(parents=True)
    picture = Image.fromarray(np.zeros((8, 8), dtype=np.uint8))
    for name in ("good.png", "mixed/a.png", "mixed/class/b.png"):
        picture.save(tmp_path / name)
    (tmp_path / "broken" / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "record" / "report.json").write_text(json.dumps(RECORD))
    for variable in ("ITAE_DATA", "ITAE_CACHE", "ITAE_STORE"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def check(arguments: list[str], status: int, stdout: str, stderr: str) -> None:
    context = f"{arguments!r} gave {status}, {stdout!r}, {stderr[-2000:]!r}"
    assert status == 2, context
    assert stdout == "", context
    assert stderr.startswith("Error: "), context
    assert stderr.endswith("\n"), context
    assert len(stderr.splitlines()) == 1, context


def cases(folder: Path, count: int):
    """So many sets of arguments, all kinds in turn, and what lies in the folder before each is tried."""
    rng = random.Random(4)
    for number in range(count):
        arguments = KINDS[number % len(KINDS)](rng, folder)
        yield arguments, state(folder)


@pytest.mark.slow
def test_two_hundred_sets_in_one_process(place, monkeypatch):
    def execute(*_arguments):
        raise AssertionError("a notebook was run")

    monkeypatch.setattr(report, "execute", execute)
    for arguments, before in cases(place, COUNT):
        result = CliRunner().invoke(main, arguments)
        if not isinstance(result.exception, SystemExit):
            raise AssertionError(f"{arguments!r}") from result.exception
        check(arguments, result.exit_code, result.stdout, result.stderr)
        assert state(place) == before, arguments


@pytest.mark.slow
def test_five_sets_in_a_process_of_their_own(place):
    command = [sys.executable, "-c", "from itae_utils.cli import main; main()"]
    plain = [(arguments, before) for arguments, before in cases(place, 30) if "\0" not in "".join(arguments)]
    for arguments, _ in plain[::len(plain) // 5][:5]:
        before = state(place)
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        check(arguments, done.returncode, done.stdout, done.stderr)
        assert state(place) == before, arguments


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), [
    (("--dataset", "imagefolder:photos"), "ItaeError: can't read the image"),
    (("--backbone", "dinov2_vits14", "-p", "checkpoint", "file"), "ItaeError: checkpoint"),
])
def test_what_only_a_notebook_can_see_is_one_line_too(place, arguments, message):
    (place / "photos").mkdir()
    truncated_jpeg(place / "photos" / "broken.jpg")  # its header is whole
    result = CliRunner().invoke(main, ["report", "--only", "01", "--output", "out", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"01_artifact_discovery: {message}")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout.splitlines()[-1] == str(place / "out" / "index.html")
    assert message in (place / "out" / "index.html").read_text(encoding="utf-8").replace("&#39;", "'")
    assert not (place / "out" / "01_artifact_discovery" / "run.json").exists()
