"""Which notebooks need not run again: those that ran through, and whose parameters, inputs and code are as they were.

A run that went through leaves a mark, `run.json`, last of all and in one step: the signature of what decided it, and
the SHA-256 of every file it left. A later run with the same signature finds the mark, checks the files, and is spared.
Nothing is ever downloaded for a signature, and what can't be told is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch

from itae_utils.data.datasets import DATASETS, unpacked_folder
from itae_utils.data.fingerprint import fingerprint
from itae_utils.data.folders import image_folder, read_folder
from itae_utils.files import PACKAGE, write_json
from itae_utils.models.hub import cached_weights
from itae_utils.models.registry import BACKBONES
from itae_utils.report.parameters import Notebook
from itae_utils.report.plan import Step
from itae_utils.results import PACKAGES, _version, read_results

MARK = "run.json"
MARK_SCHEMA = 1
CODE = ("*.py", "*.safetensors", "*.json")  # of the package: its modules, the embedded weights, the schema
DRAWING = ("matplotlib", "seaborn", "pandas", "pillow")  # packages that decide figures and tables, beside PACKAGES
ENVIRONMENT = ("HF_ENDPOINT", "ITAE_DATA")  # where weights and images come from

State = dict[str, object]  # what decides a run, by part; None for what can't be told


def find_kept(steps: Sequence[Step]) -> dict[str, dict]:
    """The marks of those steps that need not run again, by the step's folder.

    Args:
        steps: of a report in order, told all they will be told: also the folder each writes to, and collects from.
    """
    marks = {step.folder: mark for step in steps if (mark := _read_mark(_place(step), step.notebook))}
    marked = [step for step in steps if step.folder in marks]
    same = {step.folder for step, state in zip(marked, look(marked), strict=True)
            if signature(state) == marks[step.folder]["signature"]}
    to_come = [_place(step) for step in steps if step.folder not in same]
    return {step.folder: marks[step.folder] for step in marked if step.folder in same and not (
        step.notebook.collects and any(_touches(_source(step), folder) for folder in to_come))}


def look(steps: Iterable[Step]) -> list[State]:
    """What decides each step's run, as it is now; every data set and all weights are looked at once."""
    images, weights, common = cache(_images), cache(_weights), _common()
    states = []
    for step in steps:
        told = {name: value for name, value in step.parameters.items() if name != "output_dir"}
        state = common | {"parameters": told, "notebook": _or_none(partial(_cells, step.notebook))}
        if "dataset" in told:
            state["images"] = _or_none(partial(images, told["dataset"]))
        if "backbone" in told:
            state["weights"] = _or_none(partial(weights, told["backbone"], told.get("checkpoint")))
        if step.notebook.collects:
            state["collected"] = _or_none(partial(_collected, _source(step), _place(step)))
        states.append(state)
    return states


def signature(state: State) -> str | None:
    """SHA-256 of what decides a run; None where a part of it can't be told."""
    if None in state.values():
        return None
    try:
        return hashlib.sha256(json.dumps(state, sort_keys=True, allow_nan=False).encode()).hexdigest()
    except (TypeError, ValueError):
        return None  # a parameter that JSON has no word for


def leave_mark(step: Step, before: State, seconds: float) -> None:
    """Mark a run that has gone through, unless what decided it changed meanwhile, or it lacks a figure it names.

    Args:
        step: as in `find_kept`.
        before: what decided it when it began; what was not there then may have been brought by it.
        seconds: how long it took.
    """
    (after,) = look([step])
    folder, found = _place(step), signature(after)
    left = {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")}
    same = all(before[part] in (None, after[part]) for part in after)
    if found and same and _needed(folder, step.notebook) <= set(left):
        write_json(folder / MARK, {
            "schema": MARK_SCHEMA, "signature": found, "parameters": after["parameters"], "seconds": seconds,
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "files": left,
        })


def _read_mark(folder: Path, notebook: Notebook) -> dict | None:
    """The mark in a run's folder, where all is there that the run left, byte for byte."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        told = mark["schema"] == MARK_SCHEMA and mark["signature"] and mark["seconds"] >= 0
        whole = told and _needed(folder, notebook) <= set(mark["files"]) and all(
            _sha256(folder / name) == digest for name, digest in mark["files"].items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # never marked, or damaged
    return mark if whole else None


def _needed(folder: Path, notebook: Notebook) -> set[str]:
    """The files without which a run is not whole: the executed notebook, its numbers, the figures they name."""
    figures = read_results(folder / "results.json")["figures"]
    return {f"{notebook.name}.ipynb", "results.json"} | {
        f"figures/{name}.{kind}" for name in figures for kind in ("png", "pdf")}


def _place(step: Step) -> Path:
    return Path(str(step.parameters["output_dir"]))


def _source(step: Step) -> Path:
    return Path(str(step.parameters["results_dir"]))


def _touches(folder: Path, other: Path) -> bool:
    return folder.is_relative_to(other) or other.is_relative_to(folder)


def _or_none(tell: Callable[[], object]) -> object | None:
    """What `tell` tells; None where it fails, for whatever reason: then the notebook is run, and says it better."""
    try:
        return tell()
    except Exception:
        return None


def _common() -> State:
    """What decides the run of any notebook."""
    return {
        "code": _or_none(_code),
        "versions": {name: _version(name) for name in (*PACKAGES, *DRAWING)} | {"python": platform.python_version()},
        "environment": {name: os.environ.get(name, "") for name in ENVIRONMENT},
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _code() -> str:
    paths = sorted(path for pattern in CODE for path in PACKAGE.rglob(pattern))
    lines = [f"{path.relative_to(PACKAGE).as_posix()}\t{_sha256(path)}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _cells(notebook: Notebook) -> list[object]:
    """Kind, source and tags of each cell; what an editor notes beside them doesn't count."""
    cells = json.loads(notebook.path.read_text(encoding="utf-8"))["cells"]
    return [[cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])] for cell in cells]


def _images(dataset: str) -> str | None:
    """What tells the images of a data set: the bytes of its files; those of the digits come with scikit-learn."""
    if folder := image_folder(dataset):
        paths, _, _ = read_folder(folder)
        return _of_files(paths, folder)
    if not DATASETS[dataset].megabytes:
        return "embedded"
    place = unpacked_folder(dataset)
    return _of_files([path for path in place.rglob("*") if path.is_file()], place)


def _weights(backbone: str, checkpoint: str | None) -> str | list | None:
    """What tells the weights: the bytes of a checkpoint, the file that the hub's client keeps; else it is code."""
    if checkpoint is not None:
        path = Path(checkpoint)
        return _of_files([each for each in path.iterdir() if each.is_file()] if path.is_dir() else [path], path.parent)
    entry = BACKBONES.get(backbone)
    if entry and entry.timm_name is None:
        return "embedded"
    path = cached_weights(entry.timm_name if entry else backbone)
    if path is None:
        return None
    path = path.resolve()  # named by its SHA-256
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def _collected(results_dir: Path, own: Path) -> str | None:
    """The bytes of every results.json below a folder, and of the figures beside it; without the collector's own."""
    results = [path for path in results_dir.rglob("results.json") if own not in path.parents]
    figures = [path for each in results for path in (each.parent / "figures").glob("*.p*") if path.is_file()]
    return _of_files(results + figures, results_dir)


def _of_files(paths: Sequence[Path], folder: Path) -> str | None:
    """The fingerprint of files, by their path below a folder; None for none. An unchanged file is read once."""
    return fingerprint(SimpleNamespace(name=f"imagefolder:{folder}", images=list(paths), targets=None))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
