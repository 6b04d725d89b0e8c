"""`itae store`, and the option `--store` of other commands."""

import re

import numpy as np
import pytest
from click.testing import CliRunner

from itae_utils import cli
from itae_utils.store.store import open_store
from itae_utils.store.variants import StoredVariant


def run(*arguments: object):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ITAE_STORE", str(tmp_path / "store"))


@pytest.fixture
def filled(tmp_path):
    entry = {"backbone": "tiny", "device": "cpu", "precision": "fp32", "batch_size": 5, "size": 5000, "dim": 4,
             "shard_size": 5000}
    variant = StoredVariant(open_store(tmp_path / "store"), entry, {}, {"dataset": "digits"})
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
    assert re.search(rf"removed from {filled}, 0 B \w+$", done.output)
    assert run("store", "list").output == f"{filled}: 0 B\n"


def test_prune_does_not_remove_new_and_small_entries(filled):
    assert run("store", "prune", "--older-than", "1", "--max-size", "1GB").output.startswith("0 B removed from")
    assert run("store", "list").output.count("tiny") == 1


@pytest.mark.parametrize(("arguments", "words"), [
    (("prune",), "--older-than DAYS, --max-size SIZE"),
    (("prune", "--max-size", "big"), "'big'"),
    (("prune", "--older-than", "0", "--store", "none"), "--store"),
    (("list", "--store", "none"), "--store"),
    (("list", "--store", "nonsense://x"), "nonsense"),
])
def test_bad_input_is_one_line(filled, arguments, words):
    result = run("store", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("report",), ("extract", "--output", "x.npz")])
def test_an_unknown_kind_of_url_is_refused_before_anything_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*command, "--store", "nonsense://x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "'nonsense://x'" in result.stderr
    assert not list(tmp_path.iterdir())
