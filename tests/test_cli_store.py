"""`itae store`, and `--store` wherever features are made."""

import os

import numpy as np
import pytest
from click.testing import CliRunner

from itae_utils import cli
from itae_utils.store.store import open_store
from itae_utils.store.variants import InStore


def run(*arguments: object):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ITAE_STORE", str(tmp_path / "store"))  # and set back, for --store sets it


@pytest.fixture
def filled(tmp_path):
    entry = {"backbone": "tiny", "device": "cpu", "precision": "fp32", "batch_size": 5, "size": 5000, "dim": 4,
             "shard_size": 5000}
    variant = InStore(open_store(tmp_path / "store"), entry, {}, {"dataset": "digits"})
    variant.prepare()
    variant.save(0, np.zeros((5000, 4)), np.zeros(5000))
    return tmp_path / "store"


def test_list(filled):
    header, line, total = run("store", "list").output.splitlines()
    assert header.split()[:2] == ["entry", "backbone"]
    assert line.split()[1:5] == ["tiny", "digits", "5,000", "cpu"]
    assert total.startswith(f"{filled}: 10")
    assert total.endswith(" KB")


def test_list_of_an_empty_store(tmp_path):
    assert run("store", "list", "--store", tmp_path / "new").output == f"{tmp_path / 'new'}: 0 B\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("criterion", [("--older-than", "0"), ("--max-size", "1KB"), ("--max-size", "0")])
def test_prune(filled, criterion):
    tried = run("store", "prune", *criterion, "--dry-run")
    assert "would be removed" in tried.output
    assert run("store", "list").output.count("tiny") == 1
    done = run("store", "prune", *criterion)
    assert done.output.splitlines()[-1].endswith(f"removed from {filled}, 0 B stay")
    assert run("store", "list").output == f"{filled}: 0 B\n"


def test_prune_leaves_what_is_new_and_small(filled):
    assert run("store", "prune", "--older-than", "1", "--max-size", "1GB").output.startswith("0 B removed from")
    assert run("store", "list").output.count("tiny") == 1


@pytest.mark.parametrize(("arguments", "words"), [
    (("prune",), "say what to remove: --older-than DAYS, --max-size SIZE, or both"),
    (("prune", "--max-size", "big"), "'big' is not a size"),
    (("prune", "--older-than", "0", "--store", "none"), "no feature store is in use"),
    (("list", "--store", "none"), "no feature store is in use"),
    (("list", "--store", "nonsense://x"), "nonsense"),
])
def test_bad_input_is_one_line(filled, arguments, words):
    result = run("store", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_store_is_named_absolutely_to_those_who_work_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("store", "list", "--store", "here")
    assert os.environ["ITAE_STORE"] == str(tmp_path / "here")
    run("store", "list", "--store", "memory://x")
    assert os.environ["ITAE_STORE"] == "memory://x"
    run("store", "list", "--store", "none")
    assert os.environ["ITAE_STORE"] == "none"


@pytest.mark.parametrize("command", [("report",), ("extract", "--output", "x.npz")])
def test_a_place_that_nothing_opens_is_told_before_anything_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*command, "--store", "nonsense://x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: feature store 'nonsense://x' can't be opened")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_extract_finds_what_an_earlier_run_stored(tmp_path):
    for name in ("a", "b"):
        output = tmp_path / f"{name}.npz"
        assert run("extract", "--limit", 60, "--store", tmp_path / "s", "--output", output).exit_code == 0
    first, second = (np.load(tmp_path / f"{name}.npz") for name in "ab")
    assert all(np.array_equal(first[name], second[name]) for name in ("baseline", "itae"))
    assert "demo" in run("store", "list", "--store", tmp_path / "s").output
