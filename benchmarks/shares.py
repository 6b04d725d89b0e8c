"""The shares of a report's time, and the dry run's estimate of it: for the demo, and for a cell of the paper's size."""

from __future__ import annotations

import ast
import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

import nbformat
import torch

from benchmarks.contenders import make_contenders, make_workload, ours
from benchmarks.study import OURS, TURNS, Clustering, labels_of, made_features
from benchmarks.timing import Conditions
from itae_utils.analysis.metrics import paired_bootstrap, score_runs
from itae_utils.extraction.fitting import SAMPLE
from itae_utils.report import estimate, kernel, report

REPORT = {"profile": "demo", "parameters": {}}
KINDS = {"imports": r"^(import|from) ", "θ": r"fit_thresholds\(|register_settings\(",
         "features": r"extract_features\(|pooled_features\(|observe(_attention)?\(|pixel_",
         "k-means": r"remembered\.clusters|score_variants\(|score_labels\(|remedy_scores\(",
         "intervals": r"difference_table\(", "t-SNE": r"tsne\(",
         "figures": r"run\.show\("}  # the first that a statement holds
CELL, MODEL = Clustering(n_init=10), "B"
VARIANTS, COMPARISONS, PASSES = 6, 5, 2  # of notebook 03; one pass is that of the model without training
UNITS = {"s": 1, "min": 60, "h": 3600}


def measure_shares(size: str, conditions: Conditions) -> dict[str, object]:
    """Return seconds by kind of work, and estimated and measured seconds of what the dry run estimates."""
    return _demo(conditions) if size == "demo" else _cell(conditions)


def _demo(conditions: Conditions) -> dict[str, object]:
    """Run the demo's report with an empty store, and add up the time of the statements of its notebooks."""
    threads = str(torch.get_num_threads())
    with (TemporaryDirectory() as folder, patch.dict(os.environ, OMP_NUM_THREADS=threads),
          patch.object(report, "execute", _by_statement)):
        parameters = {"device": conditions.device, "store": f"{folder}/store"} | REPORT["parameters"]
        options = REPORT | {"parameters": parameters}
        estimated = estimated_report(options)
        start = time.perf_counter()
        written = report.run_report(**options, output=f"{folder}/report", say=conditions.log)
        total = time.perf_counter() - start
        if written.failed:
            raise RuntimeError(f"the report failed: {', '.join(written.failures)}")
        seconds = sum((statement_seconds(written.folder / run.folder / run.notebook.path.name)
                       for run in written.runs), Counter())
    runs = sum(run.seconds for run in written.runs)
    seconds["kernels"] += runs - seconds.total()
    seconds["pages"] = total - runs
    return {"seconds": dict(seconds), "estimate": {"whole report": [estimated, total]}}


def _by_statement(path: Path, target: Path, parameters: Mapping[str, object], kernels: kernel.Kernels) -> str | None:
    """Run a notebook with every statement in a cell of its own, so that each is timed."""
    with TemporaryDirectory() as folder:
        nbformat.write(split(nbformat.read(path, 4)), Path(folder) / path.name)
        return kernel.execute(Path(folder) / path.name, target, parameters, kernels)


def split(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a notebook with every statement in a cell of its own, except for the parameters."""
    cells = []
    for cell in notebook.cells:
        if cell.cell_type != "code" or "parameters" in cell.metadata.get("tags", ()):
            cells.append(cell)
        else:
            cells += [nbformat.v4.new_code_cell(ast.get_source_segment(cell.source, statement))
                      for statement in ast.parse(cell.source).body]
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


def statement_seconds(path: Path) -> Counter[str]:
    """Return the seconds of an executed notebook's cells by kind of work."""
    seconds: Counter[str] = Counter()
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            seconds[kind_of(cell.source)] += cell.metadata.papermill.duration or 0
    return seconds


def kind_of(statement: str) -> str:
    """Return the kind of work that a statement does, "rest" if none of `KINDS`."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, statement)), "rest")


def _cell(conditions: Conditions) -> dict[str, object]:
    """Measure one variant of notebook 03 on made-up features, one comparison and a batch, and multiply."""
    points, classes = made_features(CELL)
    cluster = partial(labels_of, OURS, CELL, [points], conditions.device)
    work = make_workload(MODEL, conditions)
    call = partial(make_contenders(work, conditions)[ours(8)], work.images)
    with conditions.running():
        per_image = median(conditions.seconds(call) for _ in range(1 + TURNS)) / len(work.images)
    taken = {"θ": SAMPLE * per_image, "features": PASSES * CELL.n * per_image}
    conditions.log("k-means and scores")
    labels = [cluster(first=first)[0] for first in (0, CELL.seeds)]
    calls = {"k-means": (VARIANTS, cluster), "scores": (VARIANTS, partial(score_runs, classes, labels[0])),
             "intervals": (COMPARISONS, partial(paired_bootstrap, classes, *labels))}
    taken |= {what: times * conditions.seconds(call) for what, (times, call) in calls.items()}
    estimated = estimated_cell(conditions)
    return {"seconds": taken, "estimate": {what: [seconds, taken[what]] for what, seconds in estimated.items()}}


def estimated_report(options: Mapping[str, object]) -> float:
    """Return the seconds that the dry run estimates for a report."""
    lines = "\n".join(estimate.dry_run(report.plan_report(**options)))
    number, unit = re.search(r"^time: about ([\d.,]+) (s|min|h)", lines, re.MULTILINE).groups()
    return float(number.replace(",", "")) * UNITS[unit]


def estimated_cell(conditions: Conditions) -> dict[str, float]:
    """Return the seconds that the dry run counts for k-means and intervals of `CELL`."""
    size = estimate.Size(parameters=0, dim=CELL.dim, tokens=0)
    needed = estimate.work("03", {"seeds": CELL.seeds, "n_init": CELL.n_init}, size, CELL.n, CELL.k)
    rate = estimate.matmul_rate(conditions.device)
    return {"k-means": needed.kmeans / (estimate.KMEANS_EFFICIENCY * rate), "intervals": needed.interval_seconds}
