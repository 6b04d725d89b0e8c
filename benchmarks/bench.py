"""How long the one pass takes, and how much memory, beside what people would use instead: ratios, side by side.

    python -m benchmarks.bench [--sizes S,B,L] [--parts passes,memory,…] [--repeats 5]

Every ratio is of times taken in turns in one run: a repeat runs every contender once, and what is told is the median
over the repeats of the ratios within them, with the lowest and the highest. Weights and images are random, and models
have their full size. A table is printed; `reports/bench.json` holds every single time, and is written after each piece,
so that a long run can be cut into several: what was measured in the same environment is kept there, and only what is
measured again is replaced. Other environments (a GPU) stand beside it.
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
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from benchmarks.timing import Conditions

ROOT = Path(__file__).parents[1]
ENOUGH_REPEATS = 5
SIZES = ("S", "B", "L")
PARTS = ("passes", "memory", "files", "kmeans", "scaling", "store")


class _Names(click.ParamType):
    """Names out of some, with commas between."""

    name = "names"

    def __init__(self, known: Sequence[str], hidden: Sequence[str] = ()) -> None:
        self.known, self.hidden = known, hidden

    def convert(self, value: object, param: click.Parameter | None, context: click.Context | None) -> list[str]:
        names = value.split(",") if isinstance(value, str) else list(value)
        for name in names:
            if name not in (*self.known, *self.hidden):
                self.fail(f"{name!r} is none of {','.join(self.known)}", param, context)
        return names


@click.command()
@click.option("--sizes", type=_Names(SIZES, hidden=["tiny"]), default=",".join(SIZES), show_default=True,
              help="ViT-S, B and L; files, scaling and store take the first alone, kmeans the demo.")
@click.option("--parts", type=_Names(PARTS), default=",".join(PARTS), show_default=True, help="What is measured.")
@click.option("--repeats", type=click.IntRange(1), default=ENOUGH_REPEATS, show_default=True)
@click.option("--batch", type=click.IntRange(1), help="Images at a time; default S 8, B 4, L 2, on a GPU 256, 128, 64.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N; auto takes CUDA if it's there.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True,
              help="auto is fp32 on a CPU, bf16 on CUDA.")
@click.option("--threads", type=click.IntRange(1), help="Of torch; default all cores, or OMP_NUM_THREADS.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=ROOT / "reports" / "bench.json",
              help="Default reports/bench.json; the figure goes to figures/bench.png beside it.")
def main(sizes: list[str], parts: list[str], repeats: int, batch: int | None, device: str, precision: str,
         threads: int | None, output: Path) -> None:
    """Measure, print the table, write the numbers and the figure."""
    import torch

    from benchmarks.summary import summarize, table
    from benchmarks.timing import Conditions
    from itae_utils.files import make_folder, write_json

    os.environ["ITAE_PROGRESS"] = "0"
    os.environ["ITAE_CACHE"] = click.get_current_context().with_resource(TemporaryDirectory())  # nothing is left behind
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise click.BadParameter(f"{device!r} is no device of this torch here", param_hint="--device") from error
    if precision == "auto":
        precision = "fp32" if device == "cpu" else "bf16"
    how = Conditions(device, precision, repeats, batch)
    make_folder(output.parent)
    contents, environment = _read(output), describe_environment(how)
    click.echo("\n".join(f"{name:<14}{value}" for name, value in environment.items()), err=True)
    run = next((run for run in contents["runs"] if run["environment"] == environment), None)
    if run is None:
        run = {"environment": environment}
        contents["runs"].append(run)
    measures = _measures()
    for part in parts:
        for size in _sizes(part, sizes):
            found = measures[part](size, replace(how, say=_teller(f"{part} {size}")))
            if found is not None:
                run.setdefault(part, {})[size] = found
                run["summary"] = summarize(run)
                write_json(output, contents)
    click.echo("\n".join(table(run)))
    if repeats < ENOUGH_REPEATS:
        click.echo(f"\n{repeats} repeats tell little: take {ENOUGH_REPEATS} or more for numbers to quote", err=True)
    if "passes" in run:
        _draw(run, output.parent)


def _sizes(part: str, sizes: list[str]) -> list[str]:
    if part == "kmeans":
        return ["demo"]
    return sizes if part in ("passes", "memory") else sizes[:1]


def _measures() -> dict[str, Callable[[str, Conditions], dict[str, object] | None]]:
    """What measures each part at a size; what they need is imported here, so that --help answers at once."""
    from benchmarks import wholes
    from benchmarks.memory import measure_memory
    from benchmarks.passes import measure_passes

    measures = (measure_passes, measure_memory, wholes.measure_files, wholes.measure_kmeans, wholes.measure_scaling,
                wholes.measure_store)
    return dict(zip(PARTS, measures, strict=True))


def _read(output: Path) -> dict[str, list]:
    if not output.exists():
        return {"runs": []}
    try:
        return {"runs": json.loads(output.read_text(encoding="utf-8"))["runs"]}
    except (ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{output} holds no benchmark: remove it, or name another --output") from error


def describe_environment(how: Conditions) -> dict[str, object]:
    """What the numbers depend on beside the code; nothing that names the machine or its owner."""
    import torch

    versions = {name: metadata.version(name) for name in ("itae-utils", "torch", "timm", "transformers")}
    on_gpu = how.kind == "cuda"
    return {
        "device": torch.cuda.get_device_name(how.device) if on_gpu else _processor(), "on_gpu": on_gpu,
        "threads": torch.get_num_threads(), "precision": how.precision, "system": platform.system(),
        "python": platform.python_version(), **versions,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines()
             if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _teller(what: str) -> Callable[[str], None]:
    start = time.perf_counter()
    return lambda words: click.echo(f"{what}, {time.perf_counter() - start:.0f} s: {words}", err=True)


def _draw(run: dict[str, object], folder: Path) -> None:
    from benchmarks.figure import benchmark
    from itae_utils.files import make_folder, replacing

    environment = run["environment"]
    conditions = f"{environment['device']}, {environment['threads']} threads, {environment['precision']}"
    with replacing(make_folder(folder / "figures") / "bench.png") as part:
        benchmark(run["summary"], conditions).savefig(part, format="png")


if __name__ == "__main__":
    main()
