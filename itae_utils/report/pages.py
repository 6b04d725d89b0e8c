"""Render the report's pages: one per notebook, with its code hidden, and the index; and the page of `itae explore`.

They load nothing but the figures beside them, and run no script but the explorer's and the tables' own. A policy in
each page says so, and the browser enforces it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import jinja2
import nbformat
from nbconvert.exporters import HTMLExporter
from nbconvert.filters import markdown2html
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from itae_utils.figures.explorer.page import script_hash, script_hashes
from itae_utils.files import PACKAGE, replacing
from itae_utils.report.methods import citations, methods_paragraph
from itae_utils.report.parameters import Notebook
from itae_utils.report.rules import recorded
from itae_utils.report.runs import Report, Run
from itae_utils.report.tables import SORTING, measured_tables, plain_tables
from itae_utils.results import is_collection

TEMPLATES = PACKAGE / "report/templates"
METRICS = ("acc", "nmi", "ari")  # shown in this order; other metrics are shown only if none of these was measured
SCORES_NOTEBOOK = "03"
SHOWN_TYPES = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]  # no scripts
POLICY = ("default-src 'none'; script-src 'none'; style-src 'unsafe-inline'; img-src data: 'self' file:; "
          "base-uri 'none'; form-action 'none'")


def notebook_page(run: Run, selected: Sequence[Notebook], output: Path) -> Path:
    """Render an executed notebook to its page below `output`, with links to the index and to its neighbours.

    Args:
        run: of the notebook.
        selected: the notebooks of its group, itself included, in reading order.
        output: the report's folder.
    """
    place = selected.index(run.notebook)
    path = output / run.page
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    exporter = HTMLExporter(
        template_name="notebook",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_anchor_links=True,
        config=Config({"NbConvertBase": {"display_data_priority": SHOWN_TYPES}}),
    )
    exporter.register_filter("plain_tables", plain_tables)
    exporter.register_filter("measured_tables", measured_tables)
    page, _ = exporter.from_notebook_node(_presentable(notebook), {"report": {
        "run": run,
        "index": "../" * run.page.count("/") + "index.html",
        "previous": selected[place - 1] if place else None,
        "next": selected[place + 1] if place + 1 < len(selected) else None,
        "policy": POLICY,
        "css": _style() + _code_style(),
    }})
    page = _with_sorting(_with_contents(page))
    page = page.replace(POLICY, _policy(page), 1)
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def _policy(html: str) -> str:
    """Return the policy of a page that holds some HTML: it lets the explorer's and the tables' own scripts run."""
    hashes = script_hashes(html) + [script_hash(SORTING)] * (SORTING in html)
    return POLICY.replace("script-src 'none'", f"script-src {' '.join(hashes)}") if hashes else POLICY


def explorer_page(path: Path, view: str, about: str, *, backbone: str, dataset: str) -> None:
    """Write a page that holds the explorer's view alone, from `explorer_html`, and Markdown about it."""
    write_page(path, "explorer.html.j2", view=view, about=about, backbone=backbone, dataset=_short_names([dataset])[0],
           policy=_policy(view))


def write_single(path: Path, first: str, pages: Sequence[tuple[str, str, str]]) -> None:
    """Write the report's pages as one: the first, and place, title and content of the others."""
    html = first + "".join(page for _, _, page in pages)
    script = SORTING if _has_sortable(html) else ""
    title = re.sub(r"<[^>]+>", "", re.search(r"<h1[^>]*>(.*?)</h1>", first, re.DOTALL)[1])
    write_page(path, "single.html.j2", first=first, pages=pages, title=title, script=script,
               policy=_policy(html + script), css=_style() + _code_style())


def write_page(path: Path, template: str, **content: object) -> None:
    """Render one of our templates to a page in one step."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"markdown": markdown2html, "value": shown_value, "duration": _duration}
    page = environment.get_template(template).render({"css": _style(), **content})
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")


def _presentable(notebook: NotebookNode) -> NotebookNode:
    """Drop papermill's marks, and stderr except of failed cells; give images the name of their section as alt text."""
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


def _with_sorting(page: str) -> str:
    """Add the script that sorts long tables, if the page has any."""
    if not _has_sortable(page):
        return page
    start, end, rest = page.rpartition("</body>")
    return f"{start}<script>{SORTING}</script>\n{end}{rest}"


def _has_sortable(page: str) -> bool:
    return re.search(r'<table[^>]* class="[^"]*\bsortable\b', page) is not None


def _with_contents(page: str) -> str:
    """Number the sections of a page, and list them at its top; a page without sections has no list."""
    titles = re.findall(r"<h2>(.*?)</h2>", page, re.DOTALL)
    for number, title in enumerate(titles, start=1):
        page = page.replace(f"<h2>{title}</h2>", f'<h2 id="section-{number}">{title}</h2>', 1)
    links = "".join(f'<li><a href="#section-{number}">{title}</a></li>' for number, title in enumerate(titles, start=1))
    contents = f'<nav class="contents" aria-label="Contents"><ol>{links}</ol></nav>' if titles else ""
    return re.sub(r'<nav aria-label="Contents"[^>]*>\s*</nav>', lambda _: contents, page, count=1)


def index_page(report: Report, beside: str | None = None) -> Path:
    """Write `index.html` in one step, from the notebooks' `results.json` alone; `beside` is a page that it links to."""
    measured = {run.label: run.results for run in report.runs if run.results}
    own = {label: results for label, results in measured.items() if not is_collection(results)}
    scores = [run.results for run in report.runs if run.results and run.notebook.key == SCORES_NOTEBOOK]
    write_page(
        report.index,
        "index.html.j2",
        report=report,
        beside=beside,
        groups=_groups(report.runs),
        backbones=_values(report.runs, "backbone"),
        datasets=_short_names(_values(report.runs, "dataset")),
        policy=POLICY,
        sources=list(dict.fromkeys((about["name"], about["source"]) for about in (
            results["provenance"]["backbone"] for results in own.values()))),
        facts=_facts(measured, named=bool(report.grid)),
        versions=_distinct(measured, _versions),
        headline=_headline(measured, named=bool(report.grid)),
        methods=[methods_paragraph(each) for each in scores if "options" in each["parameters"]],
        citations=citations(measured) if measured else None,
        scores=mean_scores(scores[0]["rows"]) if len(scores) == 1 else None,
        images=_images(own.values()),
        thresholds=_thresholds(measured),
        parameters=_parameter_table(report.runs),
        parameter_keys=list(dict.fromkeys(run.notebook.key for run in report.runs)),
        covers={run.label: run.results["figures"][0] for run in report.runs if run.results and run.results["figures"]},
        seconds=sum(run.seconds for run in report.runs),
        reused=sum(run.reused for run in report.runs),
    )
    return report.index


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs by pairing; runs over all pairings come first, under the empty name."""
    groups: dict[str, list[Run]] = {"": []}
    for run in runs:
        groups.setdefault(run.pairing, []).append(run)
    return {pairing: members for pairing, members in groups.items() if members}


def _values(runs: Sequence[Run], parameter: str) -> list[str]:
    """Return the distinct values of a parameter over all runs."""
    return list(dict.fromkeys(str(run.parameters[parameter]) for run in runs if parameter in run.parameters))


def _short_names(names: Sequence[str]) -> list[str]:
    """Return the names of data sets; of a folder only its last part, unless others have the same."""
    short = [Path(name).name if name.startswith("imagefolder:") else name for name in names]
    return [name.removeprefix("imagefolder:") if short.count(last) > 1 else last
            for name, last in zip(names, short, strict=True)]


def _images(measured: Iterable[Mapping]) -> dict[str, list[str]]:
    """Return sentences on the number of images and on what was left out, by data set, if there is anything to say."""
    datasets = {about["name"]: about for about in (results["provenance"]["dataset"] for results in measured)
                if about.get("notes")}
    def used(about: Mapping) -> str:
        drawn = f" ({about['split']})" if "drawn" in about["split"] else ""  # by `limit`
        return f"{about['size']:,} images are used{drawn}."

    return {name: [used(about), *about["notes"]]
            for name, about in zip(_short_names(list(datasets)), datasets.values(), strict=True)}


def _headline(measured: Mapping[str, Mapping], named: bool) -> list[Mapping]:
    """Return the main results: those of a collection, else of all runs, with their labels if `named`."""
    collected = [fact for results in measured.values() if is_collection(results) for fact in results["headline"]]
    return collected or [{**fact, "note": f"{label}: {fact['note']}" if named else fact["note"]}
                         for label, results in measured.items() for fact in results["headline"]]


def _thresholds(measured: Mapping[str, Mapping]) -> list[tuple[str, str, str]]:
    """Return each θ once: what it is for, its value, and the labels of the runs that have it."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for label, results in measured.items():
        for name, value in results["thresholds"].items():
            found[name, "none found" if value is None else shown_value(value)].append(label)
    return [(name, value, ", ".join(labels)) for (name, value), labels in found.items()]


def mean_scores(rows: Iterable[Mapping[str, object]]) -> dict[str, list] | None:
    """Return mean and standard deviation over seeds, a row per variant and a column per metric, in the order of `rows`.

    Returns:
        {"metrics": names, "unit": whether all values are in [0, 1], "spread": whether any variant has several seeds,
        "rows": [{"variant", "backbone", "cells": [(mean, sd or None, number of seeds) or None]}]}; None without rows.
        `backbone` is None if all rows have the same.
    """
    values: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        values[row["variant"], row["backbone"]][row["metric"]].append(row["value"])
    present = list(dict.fromkeys(metric for scores in values.values() for metric in scores))
    metrics = [metric for metric in METRICS if metric in present] or present
    several = len({backbone for _, backbone in values}) > 1
    table = [
        {"variant": variant, "backbone": backbone if several else None,
         "cells": [_spread(scores[metric]) if metric in scores else None for metric in metrics]}
        for (variant, backbone), scores in values.items() if any(metric in scores for metric in metrics)
    ]
    unit = all(0 <= cell[0] <= 1 for row in table for cell in row["cells"] if cell)
    spread = any(cell[1] is not None for row in table for cell in row["cells"] if cell)
    return {"metrics": metrics, "unit": unit, "spread": spread, "rows": table} if table else None


def _spread(values: Sequence[float]) -> tuple[float, float | None, int]:
    return mean(values), stdev(values) if len(values) > 1 else None, len(values)


def _facts(measured: Mapping[str, dict], named: bool) -> list[tuple[str, list[str]]]:
    """Return the settings of the runs, as labels and texts.

    Args:
        measured: results by label of the run.
        named: whether hashes are shown with the name of their model or data set; otherwise a text that not all runs
            share is followed by the labels of those that do.
    """
    def of(thing: dict, text: str | None) -> str | None:
        return f"{thing['name']}: {text}" if named and text else text

    own: dict[str, Callable[[dict], str | None]] = {
        "Backbone": lambda p: "{name} · {num_blocks} blocks · width {dim}".format(**p["backbone"]),
        "Weights SHA-256": lambda p: of(p["backbone"], p["backbone"]["weights_sha256"]),
        "Image size": lambda p: "{image_size} px, {preprocess}".format(**p["backbone"]),
        "Position embedding": lambda p: "{pos_embed}'s rule, where it is resized".format(**p["backbone"]),
        "Data set": lambda p: "{name} · {size:,} images · {split}".format(**p["dataset"]),
        "Images SHA-256": lambda p: of(p["dataset"], p["dataset"].get("fingerprint")),
        "Device": lambda p: f"{p['device']} · {p['precision']}",
    }
    common: dict[str, Callable[[dict], str | None]] = {
        "Commit": lambda p: p["git"] and p["git"]["commit"][:12] + ("" if p["git"]["clean"] else ", with changes"),
        "System": lambda p: f"Python {p['python']} · {p['platform']}",
    }
    measuring = {label: results for label, results in measured.items() if not is_collection(results)}
    facts = [(label, _distinct(which, lambda results, text_of=text_of: text_of(results["provenance"]),
                               labelled=not named))
             for wanted, which in ((own, measuring), (common, measured)) for label, text_of in wanted.items()]
    dates = [results["provenance"]["date"] for results in measured.values()]
    return [(label, texts) for label, texts in facts if texts] + [
        ("Date", [min(dates)[:16].replace("T", " ") + " UTC"]) for _ in dates[:1]]


def _distinct(
    measured: Mapping[str, dict], text_of: Callable[[dict], str | None], *, labelled: bool = True
) -> list[str]:
    """Return the distinct texts of all runs' results; if there are several, each with the labels of its runs."""
    texts = defaultdict(list)
    for label, results in measured.items():
        if text := text_of(results):
            texts[text].append(label)
    if len(texts) == 1 or not labelled:
        return list(texts)
    return [f"{text} ({', '.join(labels)})" for text, labels in texts.items()]


def _versions(results: dict) -> str:
    return " · ".join(f"{name} {version}" for name, version in results["provenance"]["versions"].items())


def _parameter_table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return each parameter and option with its values in each notebook, or a dash."""
    tables: dict[str, list[Mapping[str, object]]] = defaultdict(list)
    for run in runs:
        parameters = run.results["parameters"] if run.results else recorded(run.parameters)
        tables[run.notebook.key].append({**parameters, **parameters.get("options", {})})
    names = dict.fromkeys(name for ran in tables.values() for table in ran for name in table
                          if name not in ("output_dir", "options"))
    return [(name, [" | ".join(dict.fromkeys(shown_value(table[name]) for table in ran if name in table)) or "–"
                    for ran in tables.values()]) for name in names]


def shown_value(value: object) -> str:
    """Return a parameter or a number as text for a page."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown_value, value))
    return "none" if value is None else str(value).replace(" %", "\u00a0%")  # a line must not break before the sign


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _code_style() -> str:
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("friendly", "github-dark"))
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n.highlight {{ background: none; }}"


def _style() -> str:
    return (TEMPLATES / "style.css").read_text(encoding="utf-8")
