import os

import pytest

from itae_utils import machine
from itae_utils.machine import available_cores, available_memory

PAGES = 1000  # of 4,096 bytes on the made machine
UNLIMITED = "9223372036854771712"  # as version 1 writes it


@pytest.fixture
def limits(tmp_path, monkeypatch):
    """A machine of 8 cores; call it with this process's lines of membership and the files of its cgroups."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "self")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: range(8), raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": PAGES}.__getitem__, raising=False)

    def write(membership: str, files: dict[str, str]) -> None:
        (tmp_path / "self").write_text(membership)
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")

    return write


V2 = "0::/a/b\n"
V1 = "3:memory:/a/b\n2:cpu,cpuacct:/a/b\n1:name=systemd:/a/b\n0::/a/b\n"


@pytest.mark.parametrize(("membership", "files", "cores", "memory"), [
    (V2, {}, 8, 4096 * PAGES),
    (V2, {"a/b/cpu.max": "max 100000", "a/b/memory.max": "max"}, 8, 4096 * PAGES),
    (V2, {"a/b/cpu.max": "300000 100000", "a/b/memory.max": "5000"}, 3, 5000),
    (V2, {"a/b/cpu.max": "350000 100000"}, 3, 4096 * PAGES),
    (V2, {"a/b/cpu.max": "20000 100000"}, 1, 4096 * PAGES),
    (V2, {"a/b/cpu.max": "1600000 100000", "a/b/memory.max": "99999999999"}, 8, 4096 * PAGES),
    (V2, {"a/b/cpu.max": "600000 100000", "a/cpu.max": "200000 100000", "a/memory.max": "700"}, 2, 700),
    (V2, {"cpu.max": "200000 100000", "memory.max": "800"}, 2, 800),  # the root of a container is its own
    ("0::/../x\n", {"cpu.max": "200000 100000", "memory.max": "800"}, 2, 800),
    (V1, {"cpu/a/b/cpu.cfs_quota_us": "400000", "cpu/a/b/cpu.cfs_period_us": "100000",
          "memory/a/b/memory.limit_in_bytes": "6000"}, 4, 6000),
    (V1, {"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/a/b/cpu.cfs_period_us": "100000",
          "memory/a/b/memory.limit_in_bytes": UNLIMITED}, 8, 4096 * PAGES),
    (V1, {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000",
          "memory/memory.limit_in_bytes": "7000", "memory/a/memory.limit_in_bytes": "6500"}, 2, 6500),
    (V1, {"a/b/cpu.max": "300000 100000", "memory/c/memory.limit_in_bytes": "1"}, 3, 4096 * PAGES),
])
def test_the_lowest_limit_counts(limits, membership, files, cores, memory):
    limits(membership, files)
    assert (available_cores(), available_memory()) == (cores, memory)


def test_a_system_without_cgroups(limits, monkeypatch):
    assert (available_cores(), available_memory()) == (8, 4096 * PAGES)
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert (available_cores(), available_memory()) == (5, None)


def test_this_machine():
    assert 1 <= available_cores() <= os.cpu_count()
    assert available_memory() is None or available_memory() > 10**8
