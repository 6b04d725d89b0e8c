"""Tiny notebooks that keep the real ones' contract, for the tests of the report."""

from pathlib import Path

import nbformat
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


def write_notebook(folder: Path, name: str, *code: str, parameters: str = PARAMETERS, measure: bool = True) -> Path:
    """A notebook of a title, a parameters cell, code cells, and the cell that writes results.json."""
    last = [MEASURE.replace("NAME", name)] if measure else []
    cells = [
        new_markdown_cell(f"# Title of {name}\n\nWhat it *shows*.\n\nMore."),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *(new_code_cell(source) for source in (*code, *last)),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def write_notebooks(folder: Path) -> Path:
    """Three notebooks: one that says what it was run by, one that fails half-way, one with scores; and a profile."""
    (folder / "profiles").mkdir(parents=True)
    (folder / "profiles" / "demo.yaml").write_text(
        'description: Tiny.\ncommon: {backbone: demo, dataset: digits}\n"01": {alpha: 0.25}\n', encoding="utf-8")
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
    """Notebooks 01 and 03, which measure, 04, which collects; and the profiles `demo` and `grid`, of two pairings."""
    (folder / "profiles").mkdir(parents=True)
    (folder / "profiles" / "demo.yaml").write_text("common: {backbone: demo, dataset: digits}\n", encoding="utf-8")
    (folder / "profiles" / "grid.yaml").write_text(
        "description: Both.\ncommon: {seed: 3}\ngrid: {dataset: [digits], backbone: [demo, demo-clean]}\n",
        encoding="utf-8")
    write_notebook(folder, "01_first")
    write_notebook(folder, "03_scores")
    write_notebook(folder, "04_collects", COLLECT, measure=False,
                   parameters='results_dir = "../reports/grid"\noutput_dir = "x"\n')
    return folder
