"""Measure time and memory of the one pass beside its alternatives, as ratios.

    python -m benchmarks.bench [--sizes S,B,L] [--parts passes,memory,…] [--repeats 5]

Each repeat runs every contender once, in turns, and ratios are taken within a repeat; the table shows their median,
lowest and highest over the repeats. Models have their full size; weights and images are random.

`reports/bench.json` holds every measured time, grouped by environment. It is written after each part, so that a long
run can be split: later runs in the same environment replace only the parts that they measure.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

from benchmarks import pipeline
from benchmarks.figure import benchmark
from benchmarks.memory import measure_memory
from benchmarks.passes import measure_passes
from benchmarks.shares import measure_shares
from benchmarks.study import STUDY, measure_growth, measure_study
from benchmarks.summary import summarize, table
from benchmarks.timing import Conditions
from itae_utils.files import make_folder, replacing, write_json

ROOT = Path(__file__).parents[1]
ENOUGH_REPEATS = 5
SIZES = ("S", "B", "L")
PARTS: dict[str, Callable[[str, Conditions], dict[str, object] | None]] = {
    "passes": measure_passes, "memory": measure_memory, "files": pipeline.measure_files,
    "scaling": pipeline.measure_scaling, "store": pipeline.measure_store, "study": measure_study,
    "growth": measure_growth, "shares": measure_shares,
}
OTHER_SIZES = {"study": [*STUDY], "growth": ["k-means"], "shares": ["demo", "paper"]}


class _Names(click.ParamType):
    """Comma-separated names; hidden ones are accepted but not listed."""

    name = "names"

    def __init__(self, known: Sequence[str], hidden: Sequence[str] = ()) -> None:
        self.known, self.hidden = known, hidden

    def convert(self, value: object, param: click.Parameter | None, context: click.Context | None) -> list[str]:
        names = value.split(",") if isinstance(value, str) else list(value)
        for name in names:
            if name not in (*self.known, *self.hidden):
                self.fail(f"{name!r} is not one of {','.join(self.known)}", param, context)
        return names


@click.command()
@click.option("--sizes", type=_Names(SIZES, hidden=["tiny"]), default=",".join(SIZES), show_default=True,
              help="ViT-S, B and L. Files, scaling and store use the first one only; study, growth, shares none.")
@click.option("--parts", type=_Names([*PARTS]), default=",".join(PARTS), show_default=True, help="Parts to measure.")
@click.option("--repeats", type=click.IntRange(1), default=ENOUGH_REPEATS, show_default=True)
@click.option("--batch", type=click.IntRange(1), help="Batch size; default S 8, B 4, L 2, on a GPU 256, 128, 64.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N; auto uses CUDA if available.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True,
              help="auto is fp32 on a CPU, bf16 on CUDA.")
@click.option("--threads", type=click.IntRange(1), help="Threads of torch; default all cores, or OMP_NUM_THREADS.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=ROOT / "reports" / "bench.json",
              help="Default reports/bench.json. The figure is written to figures/bench.png beside it.")
def main(sizes: list[str], parts: list[str], repeats: int, batch: int | None, device: str, precision: str,
         threads: int | None, output: Path) -> None:
    """Measure, print the table, write the numbers and the figure."""
    os.environ["ITAE_PROGRESS"] = "0"
    os.environ["ITAE_CACHE"] = click.get_current_context().with_resource(TemporaryDirectory())
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError if torch was built without CUDA
        raise click.BadParameter(f"{device!r} is not available to torch here", param_hint="--device") from error
    if precision == "auto":
        precision = "fp32" if device == "cpu" else "bf16"
    conditions = Conditions(device, precision, repeats, batch)
    make_folder(output.parent)
    contents, environment = _read(output), describe_environment(conditions)
    click.echo("\n".join(f"{name:<14}{value}" for name, value in environment.items()), err=True)
    run = next((run for run in contents["runs"] if run["environment"] == environment), None)
    if run is None:
        run = {"environment": environment}
        contents["runs"].append(run)
    for part in parts:
        for size in OTHER_SIZES.get(part, sizes if part in ("passes", "memory") else sizes[:1]):
            measured = PARTS[part](size, replace(conditions, log=_logger(f"{part} {size}")))
            if measured is not None:
                run.setdefault(part, {})[size] = measured
                run["summary"] = summarize(run)
                write_json(output, contents)
    click.echo("\n".join(table(run)))
    if repeats < ENOUGH_REPEATS:
        click.echo(f"\nrepeats={repeats} is too few for numbers to quote: use {ENOUGH_REPEATS} or more", err=True)
    if "passes" in run:
        label = f"{environment['device']}, {environment['threads']} threads, {environment['precision']}"
        with replacing(make_folder(output.parent / "figures") / "bench.png") as path:
            benchmark(run["summary"], label).savefig(path, format="png")


def _read(output: Path) -> dict[str, list]:
    if not output.exists():
        return {"runs": []}
    try:
        return {"runs": json.loads(output.read_text(encoding="utf-8"))["runs"]}
    except (ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{output} is not a benchmark file: remove it or choose another --output") from error


def describe_environment(conditions: Conditions) -> dict[str, object]:
    """Return the hardware and the versions that decide the numbers; nothing identifies the machine or its owner."""
    versions = {name: metadata.version(name) for name in ("itae-utils", "torch", "timm", "transformers")}
    on_gpu = conditions.kind == "cuda"
    return {
        "device": torch.cuda.get_device_name(conditions.device) if on_gpu else _processor(), "on_gpu": on_gpu,
        "threads": torch.get_num_threads(), "precision": conditions.precision, "system": platform.system(),
        "python": platform.python_version(), **versions,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines()
             if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _logger(task: str) -> Callable[[str], None]:
    """Return a function that prints a message with the task and the seconds since its start."""
    start = time.perf_counter()
    return lambda message: click.echo(f"{task}, {time.perf_counter() - start:.0f} s: {message}", err=True)


if __name__ == "__main__":
    main()
