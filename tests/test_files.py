import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from itae_utils.errors import ItaeError
from itae_utils.files import in_one_line, make_folder, replacing, write_json

WRITERS, ROUNDS = 4, 100


def write_often(path, writer, barrier):
    barrier.wait(20)
    for _ in range(ROUNDS):
        write_json(path, [writer] * 1000)


def write_often_as_process_1(*args):
    os.getpid = lambda: 1  # in this forked process alone
    write_often(*args)


def check(folder, path):
    content = json.loads(path.read_text())
    assert content == content[:1] * 1000
    assert list(folder.iterdir()) == [path]


def test_threads_can_replace_one_file_at_the_same_time(tmp_path):
    path, barrier = tmp_path / "x.json", multiprocessing.Barrier(WRITERS)
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write_often, [path] * WRITERS, range(WRITERS), [barrier] * WRITERS))
    check(tmp_path, path)


def test_processes_with_equal_ids_can_replace_one_file_at_the_same_time(tmp_path):
    """Several containers may share a folder, and the process of each has number 1."""
    context = multiprocessing.get_context("fork")
    path, barrier = tmp_path / "x.json", context.Barrier(WRITERS)
    processes = [context.Process(target=write_often_as_process_1, args=(path, writer, barrier))
                 for writer in range(WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * WRITERS
    check(tmp_path, path)


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
            raise error

    with pytest.raises(error):
        write_half()
    assert json.loads(path.read_text()) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_part_is_hidden_and_beside_the_file(tmp_path):
    with replacing(tmp_path / "x.json") as part:
        part.write_text("")
        assert list(tmp_path.iterdir()) == [part]
        assert part.name.startswith(".")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ItaeError, match=f"{tmp_path}/file/out"):
        make_folder(tmp_path / "file/out")


def test_an_error_in_one_line():
    assert in_one_line(ValueError("one\n  two")) == "one two"
    assert in_one_line(ValueError()) == "ValueError"
    assert len(in_one_line(ValueError("x" * 999))) == 200
