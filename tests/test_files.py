import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

import pytest

from itae_utils.errors import ItaeError
from itae_utils.files import OUTPUT_MARK, in_one_line, make_folder, replacing, write_json

WRITERS, ROUNDS = 4, 100


def start_together(barrier):
    barrier.wait(20)


def start_together_as_process_1(barrier):
    os.getpid = lambda: 1  # in this forked process alone
    barrier.wait(20)


def write_often(path, writer):
    for _ in range(ROUNDS):
        write_json(path, [writer] * 1000)


FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize("pool", [
    partial(ThreadPoolExecutor, initializer=start_together),
    partial(ProcessPoolExecutor, initializer=start_together_as_process_1, mp_context=FORK),
], ids=["threads", "processes"])
def test_several_writers_can_replace_one_file_at_the_same_time(tmp_path, pool):
    """Several containers may share a folder, and the process of each has number 1."""
    path = tmp_path / "x.json"
    with pool(WRITERS, initargs=(FORK.Barrier(WRITERS),)) as executor:
        list(executor.map(write_often, [path] * WRITERS, range(WRITERS)))
    content = json.loads(path.read_text())
    assert content == content[:1] * 1000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_an_ordinary_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / "ordinary").touch()
        write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "x.json").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_block_leaves_the_old_file_and_no_part(tmp_path, error):
    path = tmp_path / "x.json"
    write_json(path, "old")

    def write_half():
        with replacing(path) as part:
            part.write_text("half")
            assert part.parent == tmp_path
            assert part.name.startswith(".")
            raise error

    with pytest.raises(error):
        write_half()
    assert json.loads(path.read_text()) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ItaeError, match=f"{tmp_path}/file/out"):
        make_folder(tmp_path / "file/out")


@pytest.mark.parametrize(("message", "line"), [
    ("one\n  two", "one two"), ("", "ValueError"), ("x" * 200, "x" * 200),
    ("a" * 900 + "b" * 99, "a" * 131 + " … " + "b" * 66)])
def test_an_error_becomes_one_line_with_its_beginning_and_its_end(message, line):
    assert in_one_line(ValueError(message)) == line


def test_a_folder_for_output_is_marked(tmp_path):
    assert list(make_folder(tmp_path / "a" / "b", mark=True).iterdir()) == [tmp_path / "a" / "b" / OUTPUT_MARK]
    (tmp_path / "c" / OUTPUT_MARK).mkdir(parents=True)
    make_folder(tmp_path / "c", mark=True)
