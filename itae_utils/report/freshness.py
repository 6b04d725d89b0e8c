"""Which notebooks need not run again: those that succeeded, and whose parameters, inputs and code have not changed.

A successful run writes `run.json` last and in one step: the signature of everything that decided it, and the SHA-256 of
every file it wrote. A later run with the same signature verifies the files and is skipped. Computing a signature never
downloads anything. If any part is unknown, the notebook runs.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path

import torch

from itae_utils.data.fingerprint import files_digest
from itae_utils.data.folders import image_folder, read_folder
from itae_utils.data.huggingface import PREFIX, place_and_split
from itae_utils.data.published import DATASETS, unpacked_folder
from itae_utils.environment import data_folder, hub_server
from itae_utils.files import PACKAGE, write_json
from itae_utils.models.hub import cached_weights
from itae_utils.models.registry import BACKBONES
from itae_utils.models.weight_files import weight_files
from itae_utils.report.parameters import Notebook
from itae_utils.report.plan import Step
from itae_utils.report.rules import recorded
from itae_utils.results import PACKAGES, read_results, version_of

MARK = "run.json"
MARK_SCHEMA = 2
PACKAGE_FILES = ("*.py", "explorer.*", "*.safetensors", "*.json")  # modules, the explorer, the weights, the schema
DRAWING = ("matplotlib", "seaborn", "pandas", "pillow")  # packages that decide figures and tables, beside PACKAGES

State = dict[str, object]  # what decides a run, by part; None for a part that is unknown


def find_unchanged(steps: Sequence[Step]) -> dict[str, dict]:
    """Return the contents of `run.json` of the steps that need not run again, by the step's folder.

    Args:
        steps: of a report in order, with all their parameters: also the folder each writes to, and collects from.
    """
    marks = {step.folder: mark for step in steps if (mark := _read_mark(_output(step), step.notebook))}
    marked = [step for step in steps if step.folder in marks]
    same = {step.folder for step, state in zip(marked, _states(marked), strict=True)
            if signature(state) == marks[step.folder]["signature"]}
    to_run = [_output(step) for step in steps if step.folder not in same]
    return {step.folder: marks[step.folder] for step in marked if step.folder in same and not (
        step.notebook.collects and any(_overlap(_source(step), folder) for folder in to_run))}


def current_state(step: Step) -> State:
    """Return everything that decides a step's run, as it is now."""
    return next(_states([step]))


def _states(steps: Iterable[Step]) -> Iterable[State]:
    """Yield each step's state; every data set and all weights are examined once."""
    images, weights, common = cache(_images), cache(_weights), _common()
    for step in steps:
        parameters = recorded({name: value for name, value in step.parameters.items() if name != "output_dir"})
        state = common | {"parameters": parameters, "notebook": _or_none(partial(_cells, step.notebook))}
        if dataset := step.setting("dataset"):
            for name, part in zip(("images", "images to fit"), step.parts, strict=False):
                state[name] = _or_none(partial(images, dataset, part["split"]))
        if backbone := step.setting("backbone"):
            state["weights"] = _or_none(partial(weights, backbone, step.setting("checkpoint")))
        if step.notebook.collects:
            state["collected"] = _or_none(partial(_collected, _source(step), _output(step)))
        yield state


def signature(state: State) -> str | None:
    """Return the SHA-256 of everything that decides a run; None if a part of it is unknown."""
    if None in state.values():
        return None
    try:
        return hashlib.sha256(json.dumps(state, sort_keys=True, allow_nan=False).encode()).hexdigest()
    except (TypeError, ValueError):
        return None  # JSON has no form for a parameter


def leave_mark(step: Step, before: State, seconds: float) -> None:
    """Write `run.json` for a successful run, unless its inputs changed while it ran or a figure is missing.

    Args:
        step: as in `find_unchanged`.
        before: its state when it began; a part that was unknown then may have been downloaded by the run.
        seconds: its duration.
    """
    after, folder = current_state(step), _output(step)
    found = signature(after)
    written = {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*"))
               if path.is_file() and not path.name.startswith(".")}
    same = all(before[part] in (None, after[part]) for part in after)
    if found and same and _needed(folder, step.notebook) <= set(written):
        write_json(folder / MARK, {
            "schema": MARK_SCHEMA, "signature": found, "parameters": after["parameters"], "seconds": seconds,
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "files": written,
        })


def _read_mark(folder: Path, notebook: Notebook) -> dict | None:
    """Read `run.json` of a run's folder; None if a file of the run is missing or changed."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        valid = mark["schema"] == MARK_SCHEMA and mark["signature"] and mark["seconds"] >= 0
        whole = valid and _needed(folder, notebook) <= set(mark["files"]) and all(
            _sha256(folder / name) == digest for name, digest in mark["files"].items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # not written, or damaged
    return mark if whole else None


def _needed(folder: Path, notebook: Notebook) -> set[str]:
    """Return the files that a complete run has: the executed notebook, its results and the figures they name."""
    figures = read_results(folder / "results.json")["figures"]
    return {f"{notebook.name}.ipynb", "results.json"} | {
        f"figures/{name}.{kind}" for name in figures for kind in ("png", "pdf")}


def _output(step: Step) -> Path:
    return Path(str(step.parameters["output_dir"]))


def _source(step: Step) -> Path:
    return Path(str(step.parameters["results_dir"]))


def _overlap(folder: Path, other: Path) -> bool:
    return folder.is_relative_to(other) or other.is_relative_to(folder)


def _or_none(compute: Callable[[], object]) -> object | None:
    """Return `compute()`, or None if it raises; the notebook then runs and reports the error itself."""
    try:
        return compute()
    except Exception:
        return None


def _common() -> State:
    """Return the state that all notebooks share."""
    code = (path for pattern in PACKAGE_FILES for path in PACKAGE.rglob(pattern))
    return {
        "code": _or_none(partial(files_digest, code, PACKAGE)),
        "versions": {name: version_of(name) for name in (*PACKAGES, *DRAWING)} | {"python": platform.python_version()},
        "environment": {"hub": hub_server() or "", "data": str(data_folder())},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _cells(notebook: Notebook) -> list[object]:
    """Return type, source and tags of each cell; other metadata does not count."""
    cells = json.loads(notebook.path.read_text(encoding="utf-8"))["cells"]
    return [[cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])] for cell in cells]


def _images(dataset: str, split: str | None) -> str | list | None:
    """Return the hash of a data set's files; those of embedded data sets belong to a package's version."""
    if folder := image_folder(dataset):
        contents = read_folder(folder, split)
        return [files_digest(contents.images, folder), *contents.notes]  # results hold the notes, too
    if dataset.startswith(PREFIX):
        place = Path(place_and_split(dataset, split)[0])
    elif DATASETS[dataset].megabytes:
        place = unpacked_folder(dataset)
    else:
        return "embedded"
    return files_digest([path for path in place.rglob("*") if path.is_file()], place)


def _weights(backbone: str, checkpoint: str | None) -> str | list | None:
    """Return the hash of a checkpoint, or path, size and time of the file in the hub's cache, named by its SHA-256."""
    if checkpoint is not None:
        path = Path(checkpoint).expanduser()
        if path.is_dir():
            return files_digest([each for each in path.rglob("*") if each.is_file()], path.parent)
        files, config = weight_files(path)[0], path.with_name("config.json")
        return files_digest([*files, *([config] if config.is_file() else [])], path.parent)
    entry = BACKBONES.get(backbone)
    if entry and entry.timm_name is None:
        return "embedded"
    path = cached_weights(entry.timm_name if entry else backbone)
    if path is None:
        return None
    path = path.resolve()
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def _collected(results_dir: Path, own: Path) -> str | None:
    """Return the hash of all results.json below a folder and of the figures beside them, except the collector's."""
    results = [path for path in results_dir.rglob("results.json") if own not in path.parents]
    figures = [path for each in results for path in (each.parent / "figures").glob("*.p*") if path.is_file()]
    return files_digest(results + figures, results_dir)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
