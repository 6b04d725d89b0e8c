"""Tiny notebooks with the parameters and results of real ones, for the tests of reports."""

import copy
from functools import reduce
from operator import getitem
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PROVENANCE = {
    "versions": {"itae-utils": "0.1.0", "torch": "2.9.0"}, "python": "3.11.2", "platform": "Linux",
    "date": "2026-01-02T03:04:05+00:00", "git": None,
    "backbone": {"name": "demo", "source": "a tiny ViT in which artifacts were planted", "weights_sha256": "ab" * 32,
                 "dim": 64, "num_blocks": 6, "patch_grid": [7, 7], "image_size": 28, "preprocess": "resize",
                 "pos_embed": "timm"},
    "dataset": {"name": "digits", "split": "all", "source": "scikit-learn", "size": 1797, "classes": 10},
    "device": "cpu", "precision": "fp32",
}
ROWS = [
    {"backbone": "demo", "dataset": "digits", "n": 1797, "variant": variant, "seed": seed, "metric": metric,
     "value": value + seed / 100}
    for variant, value in (("raw pixels", 0.7), ("baseline", 0.6), ("itae", 0.8))
    for metric in ("acc", "nmi", "ari", "inertia")
    for seed in (0, 1)
]
RESULTS = {
    "schema": 1, "notebook": "03_scores", "provenance": PROVENANCE, "parameters": {"backbone": "demo", "k": None},
    "thresholds": {"itae": 1.25, "deep": [None, 1.5], "none": None}, "rows": ROWS, "figures": ["cover"],
    "headline": [{"label": "ACC with ITAE", "value": 0.805, "note": "of 1"}],
}
PARAMETERS = '''\
backbone = "demo"  # a name
dataset = "digits"
output_dir = "../reports/interactive"
limit = None  # all images
seed = 0
'''
MEASURE = f'''\
from itae_utils.results import write_results
provenance = {PROVENANCE!r}
provenance["backbone"] |= {{"name": backbone}}
provenance["dataset"] |= {{"name": dataset}}
write_results(
    output_dir, notebook="NAME", provenance=provenance, thresholds={{"itae": 1.25}}, rows={ROWS!r}, figures=[],
    parameters={{"backbone": backbone, "dataset": dataset, "limit": limit, "seed": seed}},
    headline=[{{"label": "seed of NAME", "value": seed, "note": "as given"}}]);'''
DELETED = object()


def changed(document: dict, place: str, value: object) -> dict:
    """Return a copy of a document with another value at a place such as "rows.0.n", or without it for DELETED."""
    document = copy.deepcopy(document)
    *parents, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    parent = reduce(getitem, parents, document)
    if value is DELETED:
        del parent[last]
    else:
        parent[last] = value
    return document


def use_notebooks(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let reports run the notebooks of a folder, with the folder above it as the working directory."""
    patch.setattr("itae_utils.report.report.notebooks_folder", lambda: folder)
    patch.chdir(folder.parent)


def write_notebook(folder: Path, name: str, *code: str, parameters: str = PARAMETERS, measure: bool = True) -> Path:
    """Write a notebook: title, parameters, code, and a cell that writes results unless `measure` is False."""
    last = [MEASURE.replace("NAME", name)] if measure else []
    cells = [
        new_markdown_cell(f"# Title of {name}\n\nWhat it *shows*.\n\nMore."),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *(new_code_cell(source) for source in (*code, *last)),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / f"{name}.ipynb"
    folder.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def write_profile(folder: Path, name: str, text: str) -> None:
    (folder / "profiles").mkdir(parents=True, exist_ok=True)
    (folder / "profiles" / f"{name}.yaml").write_text(text, encoding="utf-8")


def write_notebooks(folder: Path) -> Path:
    """Write three notebooks and a profile: 01 prints its settings, 02 fails half-way, 03 has scores."""
    write_profile(folder, "demo",
                  'description: Tiny.\ncommon: {backbone: demo, dataset: digits}\n"01": {alpha: 0.25}\n')
    write_notebook(
        folder, "01_first",
        "import os, sys, itae_utils\nhere = os.path.dirname(itae_utils.__file__)\n"
        "print('SEEN', sys.executable, here, os.environ['ITAE_PROGRESS'], os.getcwd(), output_dir, alpha)",
        "import warnings\nwarnings.warn('MUR' + 'MUR')\nprint('MUM' + 'BLE', file=sys.stderr)",
        parameters=PARAMETERS + "alpha = 0.5\ndata_dir = '.'\n")
    write_notebook(folder, "02_fails", "print('BEFORE')", "raise ValueError('of no use\\nat all')", measure=False)
    write_notebook(folder, "03_scores", parameters=PARAMETERS + "k = None\n")
    return folder


COLLECT = """\
from itae_utils.analysis.collection import collect, sources
from itae_utils.results import collected_provenance, write_results
pairings, left_out = collect(results_dir)
print('COLLECTED', *(pairing.title for pairing in pairings))
write_results(
    output_dir, notebook="04_collects", provenance=collected_provenance(sources(pairings, results_dir)), thresholds={},
    rows=[], figures=[], parameters={"results_dir": results_dir},
    headline=[{"label": "pairings", "value": len(pairings), "note": "collected"}]);"""


def write_grid(folder: Path) -> Path:
    """Write notebooks 01 and 03, which measure, 04, which collects, and the profiles `demo` and `grid`."""
    write_profile(folder, "demo", "common: {backbone: demo, dataset: digits}\n")
    write_profile(folder, "grid", "description: Both.\ncommon: {seed: 3}\n"
                                  "grid: {dataset: [digits], backbone: [demo, demo-clean]}\n")
    write_notebook(folder, "01_first")
    write_notebook(folder, "03_scores")
    write_notebook(folder, "04_collects", COLLECT, measure=False,
                   parameters='results_dir = "../reports/grid"\noutput_dir = "x"\n')
    return folder
