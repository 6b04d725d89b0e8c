"""After a run that is killed, disturbed or out of disk, the next one resumes: same results, nothing computed twice."""

import errno
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from itae_utils.errors import ItaeError
from tests import faulty
from tests.faulty import extract


def assert_undisturbed(features, count: int) -> None:
    undisturbed = extract(count, None)
    for name in undisturbed:
        assert np.array_equal(features[name], undisturbed[name]), name
        assert np.array_equal(features.artifact_counts[name], undisturbed.artifact_counts[name]), name


@pytest.mark.slow
def test_killed_at_25_random_moments(tmp_path):
    rng, context, count = random.Random(0), faulty.processes(), 600
    store, log = tmp_path / "store", tmp_path / "log"
    log.touch()
    for kill in range(25):
        process = context.Process(target=extract, args=(count, store), kwargs={"pause": 0.003, "log": log})
        target = len(log.read_text().splitlines()) + rng.randrange(1, 10)
        process.start()
        while kill % 5 and len(log.read_text().splitlines()) < target:  # every fifth dies early
            process.join(0.001)
            assert process.exitcode is None
        process.join(rng.uniform(0, 0.05))
        assert process.exitcode is None
        process.kill()
        process.join()
    stored = Counter(log.read_text().splitlines())
    features = extract(count, store, log=log)
    assert 0 < features.computed["itae"] < count
    assert set(Counter(log.read_text().splitlines()).values()) == {1}
    assert len(stored) > 50
    assert_undisturbed(features, count)
    assert set(extract(count, store).computed.values()) == {0}


@pytest.mark.slow
def test_processes_that_share_a_store_and_one_that_outlives_its_command(tmp_path):
    """A kernel whose command was killed continues to write while the next run is at work."""
    context, count = faulty.processes(), 120
    variants = [dict(list(faulty.VARIANTS.items())[part]) for part in (slice(2), slice(1, 3), slice(3))]
    crowd = [context.Process(target=extract, args=(count, tmp_path), kwargs={"pause": 0.002, "variants": some})
             for some in variants]
    for process in crowd:
        process.start()
        time.sleep(0.1)
    features = extract(count, tmp_path)
    for process in crowd:
        process.join()
    assert [process.exitcode for process in crowd] == [0, 0, 0]
    assert_undisturbed(features, count)
    assert set(extract(count, tmp_path).computed.values()) == {0}
    assert not list(tmp_path.rglob("*.partial"))


def refusal(count: int, store: Path) -> str | None:
    try:
        extract(count, store)
    except ItaeError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")  # from zarr, when one of several accesses fails
@pytest.mark.parametrize("method", ["set", "get"])
def test_an_error_of_the_system_at_every_single_access(tmp_path, monkeypatch, method):
    """Accesses fail from the first on, then from the second on, and so on, until a run meets no error; all resume."""
    from zarr.storage import LocalStore

    honest, count = getattr(LocalStore, method), 18
    failures = 0
    for trial in range(1000):
        left = trial

        async def failing(self, *arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return await honest(self, *arguments, **options)

        store = tmp_path / str(trial)
        monkeypatch.setattr(LocalStore, method, failing)
        message = refusal(count, store)
        monkeypatch.undo()
        assert_undisturbed(extract(count, store), count)
        if message is None and left >= 0:
            break
        failures += message is not None
        assert message is None or ("Input/output error" in message and "\n" not in message)
    assert failures > 10
    gc.collect()  # so that zarr's warning is raised here


@pytest.fixture
def mount(tmp_path):
    """Mount a file system of a few hundred KB; `remount(options)` changes it."""
    place = tmp_path / "small"
    place.mkdir()

    def run(*command: str) -> str | None:
        try:
            done = subprocess.run(["mount", *command], capture_output=True, text=True, check=False)
        except OSError as error:
            return str(error)
        return done.stderr.strip() if done.returncode else None

    refused = run("-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place))
    if refused:
        pytest.skip(f"no file system can be mounted here: {refused}")
    yield place, lambda options: run("-o", f"remount,{options}", str(place))
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_in_the_middle_of_a_run(mount):
    place, remount = mount
    with pytest.raises(ItaeError, match=f"{place}.*No space left on device"):
        extract(400, place)
    assert remount("size=20m") is None
    features = extract(400, place)
    assert 0 < features.computed["itae"] < 400
    assert_undisturbed(features, 400)


def test_a_store_that_becomes_read_only(mount):
    place, remount = mount
    assert remount("size=20m") is None
    extract(40, place)
    assert remount("ro") is None
    assert set(extract(40, place).computed.values()) == {0}  # stored features can be read
    with pytest.raises(ItaeError, match=f"{place}.*Read-only file system"):
        extract(60, place)
    assert remount("rw") is None
    assert_undisturbed(extract(60, place), 60)


def command(*arguments: object, store: Path, **more: str) -> subprocess.Popen:
    """Start `itae` in a process of its own that handles an interrupt as usual, whoever starts it."""
    code = ("import signal; from itae_utils.cli import main; "
            "signal.signal(signal.SIGINT, signal.default_int_handler); main()")
    environment = os.environ | {"ITAE_STORE": str(store), "OMP_NUM_THREADS": "1"} | more
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_chunks(store: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while len([path for path in store.rglob("c/*") if path.is_file() or path.is_dir()]) < count:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_an_interrupted_command_ends_at_once_and_resumes_later(tmp_path):
    def run(store: str) -> subprocess.Popen:
        return command("extract", "--batch-size", 8, "--output", tmp_path / f"{store}.npz", store=tmp_path / store)

    process = run("store")
    wait_for_chunks(tmp_path / "store", 1, process)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - sent < 2
    assert (process.returncode, stderr.strip()) == (130, "Error: interrupted")
    assert not list(tmp_path.glob("*.npz"))
    for store in ("store", "other"):
        assert run(store).communicate(timeout=120)[1] == ""
    resumed, fresh = (np.load(tmp_path / f"{store}.npz") for store in ("store", "other"))
    for name in ("baseline", "itae", "targets"):
        assert np.array_equal(resumed[name], fresh[name])


@pytest.mark.slow
def test_a_report_that_is_killed_twice_and_started_again_at_once(tmp_path):
    """Its kernels are not killed with it: they write to the store while the next run does."""
    def run(name: str) -> subprocess.Popen:
        return command("report", "--only", "03", "-p", "limit", 400, "-p", "seeds", 2, "-p", "n_init", 1,
                       "-p", "batch_size", 8, "--output", tmp_path / f"{name}-report",
                       store=tmp_path / name)

    for chunks in (1, 3):
        process = run("store")
        wait_for_chunks(tmp_path / "store", chunks, process)
        process.kill()
        process.communicate()
        assert not (tmp_path / "store-report" / "index.html").exists()
    rows = {}
    for name in ("store", "other"):
        process = run(name)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert (tmp_path / f"{name}-report" / "index.html").is_file()
        results = json.loads((tmp_path / f"{name}-report" / "03_clustering" / "results.json").read_text())
        rows[name] = results["rows"]
    assert rows["store"] == rows["other"]
