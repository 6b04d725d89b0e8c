"""The report's pages: one a notebook, with its code out of sight, and the index. They load nothing from elsewhere."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from itae_utils.results import replacing

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from itae_utils.parameters import Notebook
    from itae_utils.report import Report, Run

TEMPLATES = Path(__file__).parent / "templates"
SCORES = ("acc", "nmi", "ari")  # shown in this order; other metrics only where none of these could be measured
SCORES_NOTEBOOK = "03"
SHOWN_TYPES = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]  # no scripts


def notebook_page(run: Run, selected: Sequence[Notebook], output: Path) -> Path:
    """Render an executed notebook to `output/NAME/NAME.html`, with links to the index and to its neighbours."""
    import nbformat
    from nbconvert.exporters import HTMLExporter
    from pygments.formatters import HtmlFormatter
    from traitlets.config import Config

    name = run.notebook.name
    place = selected.index(run.notebook)
    notebook = nbformat.read(output / name / f"{name}.ipynb", as_version=4)
    exporter = HTMLExporter(
        template_name="notebook",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_anchor_links=True,
        config=Config({"NbConvertBase": {"display_data_priority": SHOWN_TYPES}}),
    )
    page, _ = exporter.from_notebook_node(_presentable(notebook), {"report": {
        "run": run,
        "previous": selected[place - 1] if place else None,
        "next": selected[place + 1] if place + 1 < len(selected) else None,
        "css": _style() + HtmlFormatter(style="friendly").get_style_defs(".highlight"),
    }})
    path = output / name / f"{name}.html"
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def _presentable(notebook: NotebookNode) -> NotebookNode:
    """Without papermill's marks, and stderr only of cells that failed; images are named after their section."""
    notebook.cells = [cell for cell in notebook.cells
                      if cell.source.strip() and "papermill-error-cell-tag" not in cell.metadata.get("tags", [])]
    section = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)
            section = headings[-1] if headings else section
        if cell.cell_type != "code":
            continue
        if not any(output.output_type == "error" for output in cell.outputs):
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            for kind in {"image/png", "image/jpeg"} & set(output.get("data", ())):
                output.metadata.setdefault(kind, {}).setdefault("alt", f"Figure: {section}")
    return notebook


def index_page(report: Report) -> Path:
    """Write `index.html` in one step; all that it says comes from the notebooks' `results.json`."""
    import jinja2
    from nbconvert.filters import markdown2html

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"markdown": markdown2html, "value": _shown, "duration": _duration}
    measured = {run.notebook.key: run.results for run in report.runs if run.results}
    first = report.runs[0]
    page = environment.get_template("index.html.j2").render(
        report=report,
        backbone=first.parameters.get("backbone", ""),
        dataset=str(first.parameters.get("dataset", "")),
        css=_style(),
        sources=_distinct(measured, lambda results: results["provenance"]["backbone"]["source"]),
        facts=_facts(measured),
        versions=_distinct(measured, _versions),
        headline=[fact for results in measured.values() for fact in results["headline"]],
        scores=score_table(measured[SCORES_NOTEBOOK]["rows"]) if SCORES_NOTEBOOK in measured else None,
        thresholds=[(key, name, value) for key, results in measured.items()
                    for name, value in results["thresholds"].items()],
        parameters=_parameter_table(report.runs),
        covers={key: results["figures"][0] for key, results in measured.items() if results["figures"]},
        seconds=sum(run.seconds for run in report.runs),
    )
    with replacing(report.index) as part:
        part.write_text(page, encoding="utf-8")
    return report.index


def score_table(rows: Iterable[Mapping[str, object]]) -> dict[str, list] | None:
    """Mean and standard deviation over seeds, variants down and metrics across, in the order of `rows`.

    Returns:
        {"metrics": names, "unit": whether all values are in [0, 1],
        "rows": [{"variant", "backbone", "cells": [(mean, sd or None, number of seeds) or None]}]}; None without rows.
        `backbone` is None where there is one for all.
    """
    values: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        values[row["variant"], row["backbone"]][row["metric"]].append(row["value"])
    present = list(dict.fromkeys(metric for scores in values.values() for metric in scores))
    metrics = [metric for metric in SCORES if metric in present] or present
    several = len({backbone for _, backbone in values}) > 1
    table = [
        {"variant": variant, "backbone": backbone if several else None,
         "cells": [_spread(scores[metric]) if metric in scores else None for metric in metrics]}
        for (variant, backbone), scores in values.items() if any(metric in scores for metric in metrics)
    ]
    unit = all(0 <= cell[0] <= 1 for row in table for cell in row["cells"] if cell)
    return {"metrics": metrics, "unit": unit, "rows": table} if table else None


def _spread(values: Sequence[float]) -> tuple[float, float | None, int]:
    return mean(values), stdev(values) if len(values) > 1 else None, len(values)


def _facts(measured: Mapping[str, dict]) -> list[tuple[str, list[str]]]:
    """What was run, as labels and texts."""
    wanted: dict[str, Callable[[dict], str | None]] = {
        "Backbone": lambda p: "{name} · {num_blocks} blocks · width {dim}".format(**p["backbone"]),
        "Weights SHA-256": lambda p: p["backbone"]["weights_sha256"],
        "Image size": lambda p: "{image_size} px, {preprocess}".format(**p["backbone"]),
        "Data set": lambda p: "{name} · {size:,} images · {split}".format(**p["dataset"]),
        "Device": lambda p: f"{p['device']} · {p['precision']}",
        "Commit": lambda p: p["git"] and p["git"]["commit"][:12] + ("" if p["git"]["clean"] else ", with changes"),
        "System": lambda p: f"Python {p['python']} · {p['platform']}",
    }
    facts = [(label, _distinct(measured, lambda results, tell=tell: tell(results["provenance"])))
             for label, tell in wanted.items()]
    dates = [results["provenance"]["date"] for results in measured.values()]
    return [(label, texts) for label, texts in facts if texts] + [
        ("Date", [min(dates)[:16].replace("T", " ") + " UTC"]) for _ in dates[:1]]


def _distinct(measured: Mapping[str, dict], tell: Callable[[dict], str | None]) -> list[str]:
    """What each notebook's results tell, once; with the notebooks' numbers where they don't all tell the same."""
    told = defaultdict(list)
    for key, results in measured.items():
        if text := tell(results):
            told[text].append(key)
    if len(told) == 1:
        return list(told)
    return [f"{text} ({', '.join(keys)})" for text, keys in told.items()]


def _versions(results: dict) -> str:
    return " · ".join(f"{name} {version}" for name, version in results["provenance"]["versions"].items())


def _parameter_table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Each parameter with its value in each run, or a dash."""
    tables = [run.results["parameters"] if run.results else run.parameters for run in runs]
    names = dict.fromkeys(name for table in tables for name in table if name != "output_dir")
    return [(name, [_shown(table[name]) if name in table else "–" for table in tables]) for name in names]


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return "none" if value is None else str(value).replace(" %", "\u00a0%")  # a line must not end before the sign


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _style() -> str:
    return (TEMPLATES / "style.css").read_text(encoding="utf-8")
