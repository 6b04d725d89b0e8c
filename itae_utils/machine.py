"""The cores and the memory that this process may use: the machine's, within the limits of its control group (cgroup).

Containers and job schedulers set these limits, in the files of version 1 or version 2 of cgroups.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Return the number of cores of the CPU affinity, or fewer if a cgroup grants less CPU time; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [*_limits("", "cpu.max"), *_limits("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    return max(1, min([cores, *(quota // period for quota, period in quotas if quota > 0)]))


def available_memory() -> int | None:
    """Return the bytes of the machine's memory, or fewer if a cgroup grants less; None if the system reports neither.

    Memory that is in use counts as well.
    """
    found = [limit for limit, in (*_limits("", "memory.max"), *_limits("memory", "memory.limit_in_bytes"))]
    if hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)


def _limits(controller: str, *names: str) -> Iterator[list[int]]:
    """Yield the numbers in the files `names`, for this process's cgroup and for each parent that has these files.

    Args:
        controller: of version 1; "" stands for version 2, which has a single hierarchy.
        names: files of one number each, or a file of several numbers.
    """
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:  # not Linux
        return
    root = CGROUPS / controller
    for _, controllers, path in (line.split(":", 2) for line in lines):  # such as 0::/user.slice
        if controller not in controllers.split(","):
            continue
        group = root / path.lstrip("/")  # in a container this folder may be missing, and the root may be its own
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # no such file, or "max", which is no limit
                yield [int(word) for name in names for word in (folder / name).read_text().split()]
