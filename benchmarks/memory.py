"""Peak memory of a contender above the weights.

    python -m benchmarks.memory SIZE BATCH PRECISION CONTENDER

prints it in bytes for a CPU, where each is measured in a process of its own: freed memory is seldom given back. On a
GPU torch counts what it hands out, and no process is needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch

from benchmarks.contenders import SIZES, contender_names, make_contenders, make_workload
from benchmarks.timing import Conditions

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.contenders import Contender

ROOT = Path(__file__).parents[1]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# glibc would keep freed memory for later: so every larger tensor is mapped by itself, and unmapped when it is freed
UNPOOLED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure_memory(size: str, how: Conditions) -> dict[str, object] | None:
    """Bytes that one batch takes above weights and images at its peak, by contender; None where it can't be seen."""
    if how.kind == "cpu" and not os.access(CLEAR, os.W_OK):
        how.say(f"the peak of a process is not told here (no {CLEAR}): left out")
        return None
    how = replace(how, batch=how.batch or SIZES[size].batches[how.kind])
    measure = partial(_in_child, size, how) if how.kind == "cpu" else growths(size, how)
    grown = {}
    for name in contender_names(size):
        how.say(name)
        grown[name] = measure(name)
    return {"batch": how.batch, "growth": grown}


def growths(size: str, how: Conditions) -> Callable[[str], int]:
    """Gives the growth of any contender in this process."""
    work = make_workload(size, how)
    contenders = make_contenders(work, how)

    def measure(name: str) -> int:
        with how.running():
            return growth(contenders[name], work.images)

    return measure


def _in_child(size: str, how: Conditions, name: str) -> int:
    """The growth of a contender on the CPU in a new process, which has as many threads as this one."""
    command = [sys.executable, "-m", "benchmarks.memory", size, str(how.batch), how.precision, name]
    environment = os.environ | UNPOOLED | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def growth(run: Contender, images: Tensor) -> int:
    """Bytes that the peak of `run(images)` lies above what is held before; one image goes first, to warm up."""
    run(images[:1])
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        run(images)
        torch.cuda.synchronize(images.device)
        return torch.cuda.max_memory_allocated(images.device) - before
    CLEAR.write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    run(images)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at the peak (VmHWM)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@click.command(hidden=True)
@click.argument("size")
@click.argument("batch", type=int)
@click.argument("precision")
@click.argument("contender")
def main(size: str, batch: int, precision: str, contender: str) -> None:
    """Print the growth of one contender on the CPU."""
    click.echo(growths(size, Conditions("cpu", precision, batch=batch))(contender))


if __name__ == "__main__":
    main()
