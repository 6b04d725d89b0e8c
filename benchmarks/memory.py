"""Peak memory of a contender above the weights.

    python -m benchmarks.memory SIZE BATCH PRECISION CONTENDER

prints it in bytes, for a CPU. There each contender runs in its own process, because freed memory is rarely returned to
the system. On a GPU torch counts its allocations, and one process is enough.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks.contenders import SIZES, Contender, contender_names, make_contenders, make_workload
from benchmarks.timing import Conditions

ROOT = Path(__file__).parents[1]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# glibc would cache freed memory; with these settings every larger tensor is mapped separately and unmapped when freed
UNPOOLED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure_memory(size: str, conditions: Conditions) -> dict[str, object] | None:
    """Return the peak memory of one batch above weights and images, in bytes by contender.

    Return None if the system does not report the peak of a process.
    """
    if conditions.kind == "cpu" and not os.access(CLEAR, os.W_OK):
        conditions.log(f"skipped: {CLEAR} is needed to measure peak memory")
        return None
    conditions = replace(conditions, batch=conditions.batch or SIZES[size].batches[conditions.kind])
    own = ("benchmarks.memory", size, conditions.batch, conditions.precision)
    measure = partial(in_child, *own) if conditions.kind == "cpu" else growths(size, conditions)
    growth_of = {}
    for name in contender_names(size):
        conditions.log(name)
        growth_of[name] = measure(name)
    return {"batch": conditions.batch, "growth": growth_of}


def growths(size: str, conditions: Conditions) -> Callable[[str], int]:
    """Return a function that measures the growth of a contender, given by name, in this process."""
    work = make_workload(size, conditions)
    contenders = make_contenders(work, conditions)

    def measure(name: str) -> int:
        with conditions.running():
            return growth(contenders[name], work.images)

    return measure


def in_child(module: str, *arguments: object) -> int:
    """Return the number that a module prints when it is run in a new process with the same number of threads."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = os.environ | UNPOOLED | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def growth(run: Contender, images: Tensor) -> int:
    """Return by how many bytes memory grows at the peak of `run(images)`, after a warm-up with one image."""
    run(images[:1])
    return peak(lambda: run(images), images.device)


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Return by how many bytes memory on a device grows at the peak of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    CLEAR.write_text("5")  # resets the peak
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Return the bytes of this process in memory: now (VmRSS) or at the peak (VmHWM)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@click.command(hidden=True)
@click.argument("size")
@click.argument("batch", type=int)
@click.argument("precision")
@click.argument("contender")
def main(size: str, batch: int, precision: str, contender: str) -> None:
    """Print the growth of one contender on the CPU, in bytes."""
    click.echo(growths(size, Conditions("cpu", precision, batch=batch))(contender))


if __name__ == "__main__":
    main()
