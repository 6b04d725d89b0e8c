"""Write `reports/readme.json`: the measured numbers of README and documents, in the words in which they stand there.

    python -m benchmarks.readme

makes the demo's report twice in a temporary folder, first with nothing stored, then with nothing changed, and reads
`reports/bench.json`. A test compares the file with the documents, and with the report that `make report` writes.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import pandas as pd

from benchmarks.contenders import EAGER, LATE, PREFIX, START, TRANSFORMERS, loop, ours
from benchmarks.study import ELKAN, FAISS, LLOYD, OURS
from itae_utils.analysis.words import percent
from itae_utils.files import write_json
from itae_utils.results import read_results

ROOT = Path(__file__).parents[1]
PATH, BENCH = ROOT / "reports" / "readme.json", ROOT / "reports" / "bench.json"
SCORED = {("no model", "raw pixels"): "raw pixels", ("demo", "untrained"): "untrained model",
          ("demo", "baseline"): "baseline: trained model with planted artifacts",
          ("demo", "random control"): "random control: attenuates as many random patches per image",
          ("demo", "itae"): "**ITAE**, θ found without labels",
          ("demo", "oracle"): "oracle: attenuates the true artifacts",
          ("demo-clean", "baseline"): "demo-clean: the model before planting"}
PASSES = {PREFIX: "prefix alone", TRANSFORMERS: "`transformers` `Dinov2Model`, SDPA",
          ours(0): "one pass, baseline alone", ours(1): "one pass, 1 variant", ours(8): "one pass, 8 variants",
          ours(48): "**one pass, 48 variants**", EAGER: "eager attention with a hook, 1 variant",
          loop(48): "loop over 48 variants", loop(8): "loop over 8 variants"}
STUDIED = {"k=10": "10,000 × 768, k = 10, 10 starts", "k=100": "10,000 × 768, k = 100, 10 starts",
           "k=200": "10,000 × 768, k = 200, 10 starts", "demo": "1,797 × 64, k = 10, 100 starts",
           "ablation": "24 matrices of 1,797 × 64, k = 10, 50 starts each"}


def demo_numbers(report: Path) -> dict[str, str]:
    """Return the demo's numbers from its report, by name."""
    rows = pd.concat([pd.DataFrame(read_results(path)["rows"]) for path in
                      sorted(report.glob("0[13]_*/results.json"))])
    values = rows.set_index(["backbone", "variant", "metric"]).value.sort_index()
    numbers = {"scores " + "/".join(key): _score_row(label, values, key) for key, label in SCORED.items()}
    acc = {key: float(values[(*key, "acc")].mean()) for key in SCORED}
    before, itae, clean = (acc[key] for key in (("demo", "baseline"), ("demo", "itae"), ("demo-clean", "baseline")))
    attention = {variant: values["demo", variant, "attention_on_artifacts"].item() for variant in ("baseline", "itae")}
    return numbers | {
        "artifacts": f"{percent(values['demo', 'itae', 'artifact_share'].item())} of the patches",
        "precision": f"precision of {values['demo', 'key', 'precision'].item():.4f}",
        "recall": f"recall of {values['demo', 'key', 'recall'].item():.3f}",
        "attention before": percent(attention["baseline"]),
        "attention after": percent(attention["itae"]),
        "recovered": f"{percent((itae - before) / (clean - before))} of the ACC",
    }


def _score_row(label: str, values: pd.Series, key: tuple[str, str]) -> str:
    cells = [f"{values[(*key, metric)].mean():.3f} ± {values[(*key, metric)].std():.3f}" for metric in
             ("acc", "nmi", "ari")]
    difference = ""
    if (*key, "acc_difference") in values.index:
        middle, low, high = (f"{values[(*key, name)].item():+.3f}".replace("-", "−") for name in
                             ("acc_difference", "acc_difference_low", "acc_difference_high"))
        difference = f"{middle} [{low}, {high}]"
    return f"| {label} | {' | '.join(cells)} | {difference} |"


def measure_demo() -> dict[str, dict[str, str]]:
    """Make the demo's report twice, and return its numbers and how long each took."""
    seconds = []
    with TemporaryDirectory() as folder:
        command = ["itae", "report", "--profile", "demo", "--output", f"{folder}/report", "--store", f"{folder}/store"]
        for _ in range(2):
            start = time.perf_counter()
            subprocess.run(command, check=True)
            seconds.append(time.perf_counter() - start)
        numbers = demo_numbers(Path(folder) / "report")
    return {"demo": numbers, "times": {"cold": f"{seconds[0]:.0f} s", "unchanged": f"{seconds[1]:.0f} s"}}


def bench_lines(contents: Mapping[str, list]) -> dict[str, list[str]]:
    """Return the rows of the benchmark's tables from the contents of `bench.json`."""
    cpu, gpu = ([run for run in contents["runs"] if run["environment"]["on_gpu"] is on_gpu] for on_gpu in (False, True))
    return {"one pass, CPU": [*_pass_rows(cpu[0], memory=True)], "one pass, GPU": [*_pass_rows(gpu[0])],
            "registers": [_registers(run) for run in [*cpu, *gpu] if START in run["passes"]["S"]["seconds"]],
            "k-means": [*_study_rows(cpu[0])]}


def _by_size(run: Mapping, heading: str) -> dict[tuple[str, str], Mapping]:
    return {(row["what"], row["size"]): row for row in run["summary"] if row["heading"] == heading}


def _spread(row: Mapping | None, digits: int = 2) -> str:
    if row is None:
        return "–"
    return f"{row['ratio']:.{digits}f} ({row['low']:.{digits}f}–{row['high']:.{digits}f})"


def _pass_rows(run: Mapping, *, memory: bool = False) -> Iterator[str]:
    times, peaks = _by_size(run, "passes"), _by_size(run, "memory")
    for what, label in PASSES.items():
        cells = [_spread(times.get((what, size))) for size in "SBL"]
        if memory:
            kept = [peaks.get((what, size)) for size in "SBL"]
            cells.append(" / ".join("–" if row is None else f"{row['ratio']:.2f}" for row in kept))
        yield f"| {label} | {' | '.join(cells)} |"


def _registers(run: Mapping) -> str:
    more = _by_size(run, "registers")
    return f"{_spread(more[START, 'S'])} from the start, {_spread(more[LATE, 'S'])} from half of the depth"


def _study_rows(run: Mapping) -> Iterator[str]:
    ratios = _by_size(run, "study")
    for size, label in STUDIED.items():
        seconds = run["study"][size]["seconds"]
        cells = [_seconds(pd.Series(seconds[name])) for name in (OURS, LLOYD, ELKAN, FAISS)]
        faster = min((ratios[name, size] for name in (LLOYD, ELKAN)), key=lambda row: row["ratio"])
        yield f"| {label} | {' | '.join(cells)} | {_spread(faster, 1)} |"


def _seconds(values: pd.Series) -> str:
    digits = 1 if values.median() >= 10 else 2
    return f"{values.median():.{digits}f} s ({values.min():.{digits}f}–{values.max():.{digits}f})"


@click.command()
def main() -> None:
    """Measure, and write the file."""
    benchmark = bench_lines(json.loads(BENCH.read_text(encoding="utf-8")))
    write_json(PATH, measure_demo() | {"benchmark": benchmark})


if __name__ == "__main__":
    main()
