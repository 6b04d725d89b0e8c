"""A report's own record, `report.json`: what was run with what, enough to run it again and to compare."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from itae_utils.errors import ItaeError
from itae_utils.report.parameters import Notebook, Profile, find_notebooks, resolve
from itae_utils.report.plan import Plan, Step, check_steps, safe_name
from itae_utils.results import is_collection


@dataclass(frozen=True)
class Run:
    """One notebook's run.

    Attributes:
        notebook: what was run.
        parameters: what it ran with, defaults included.
        seconds: how long it took.
        error: what stopped it, in one line; None where it ran through.
        results: what it measured; None where it didn't get there.
        cell: the part of the grid it belongs to; empty without a grid and for what runs once over all of it.
        kept: whether it is an earlier run, of which nothing has changed since.
    """

    notebook: Notebook
    parameters: dict[str, object]
    seconds: float
    error: str | None
    results: dict | None
    cell: str = ""
    kept: bool = False

    @property
    def folder(self) -> str:
        """Where its page, results and figures are, seen from the report's folder."""
        return f"{self.cell}/{self.notebook.name}".removeprefix("/")

    @property
    def page(self) -> str:
        """Its page, seen from the report's folder."""
        return f"{self.folder}/{self.notebook.name}.html"

    @property
    def label(self) -> str:
        """What it is called in tables: "03", and in a grid "demo-digits 03"."""
        return f"{self.cell} {self.notebook.key}".strip()


@dataclass(frozen=True)
class Report:
    """A written report: its folder, and the runs in it in reading order; `grid` is empty where there is none."""

    folder: Path
    profile: str
    description: str
    runs: tuple[Run, ...]
    grid: Mapping[str, Sequence[object]] = field(default_factory=dict)

    @property
    def index(self) -> Path:
        """The page to open."""
        return self.folder / "index.html"

    @property
    def failed(self) -> tuple[Run, ...]:
        """Runs that did not go through."""
        return tuple(run for run in self.runs if run.error)

    @property
    def failures(self) -> dict[str, list[Run]]:
        """The runs that did not go through, by what stopped them."""
        return {error: [run for run in self.failed if run.error == error]
                for error in dict.fromkeys(run.error for run in self.failed)}


RECORD_SCHEMA = 2


def make_record(report: Report) -> dict[str, object]:
    """The record of a report; what only its own folder decides is left out of the parameters."""
    return {
        "schema": RECORD_SCHEMA,
        "profile": report.profile,
        "description": report.description,
        "grid": dict(report.grid),
        "seconds": round(sum(run.seconds for run in report.runs), 1),
        "notebooks": [
            {
                "notebook": run.notebook.name,
                "cell": run.cell,
                "page": run.page,
                "results": f"{run.folder}/results.json" if run.results else None,
                "seconds": round(run.seconds, 1),
                "kept": run.kept,
                "error": run.error,
                "parameters": {name: value for name, value in run.parameters.items()
                               if name != "output_dir" and (name, value) != ("results_dir", str(report.folder))},
                **_used(run),
            }
            for run in report.runs
        ],
    }


def _used(run: Run) -> dict[str, object]:
    """Which weights and images a run used; None where that isn't known."""
    about = {} if run.results is None or is_collection(run.results) else run.results["provenance"]
    return {"weights": about.get("backbone", {}).get("weights_sha256"),
            "images": about.get("dataset", {}).get("fingerprint")}


def read_record(folder: Path) -> dict[str, object]:
    """The record of the report in `folder`.

    Raises:
        ItaeError: there is none, or it is of another schema or damaged.
    """
    path = folder / "report.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ItaeError(f"{path} can't be read ({error.strerror}): only a whole report can be repeated") from error
    except ValueError as error:
        raise ItaeError(f"{path} is no JSON: run the report anew") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != RECORD_SCHEMA:
        raise ItaeError(f"{path} is of schema {schema!r}, but {RECORD_SCHEMA} is needed: run the report anew")
    if not _is_whole(record):
        raise ItaeError(f"{path} is damaged: run the report anew")
    return record


def _is_whole(record: dict[str, object]) -> bool:
    """Whether a record has what running it again takes; a cell's name is that of one folder."""
    def typed(thing: object, types: Mapping[str, type]) -> bool:
        return isinstance(thing, dict) and all(isinstance(thing.get(name), kind) for name, kind in types.items())

    return (
        typed(record, {"profile": str, "description": str, "grid": dict, "notebooks": list})
        and bool(record["notebooks"])
        and all(isinstance(values, list) for values in record["grid"].values())
        and all(typed(entry, {"notebook": str, "cell": str, "parameters": dict})
                and entry["cell"] == safe_name(entry["cell"]).strip(".") for entry in record["notebooks"])
    )


def plan_again(record: Mapping[str, object], folder: Path) -> Plan:
    """The plan that runs what a record says was run, with the notebooks in `folder` as they are now.

    Raises:
        ItaeError: a notebook, parameter or name that is no more.
    """
    notebooks = {notebook.name: notebook for notebook in find_notebooks(folder)}
    nothing, steps = Profile(record["profile"], "", {}, {}), []
    for entry in record["notebooks"]:
        if entry["notebook"] not in notebooks:
            raise ItaeError(f"the record's notebook {entry['notebook']!r} is no more: there are {', '.join(notebooks)}")
        notebook = notebooks[entry["notebook"]]
        told = resolve([notebook], [notebook], nothing, entry["parameters"])[notebook.key]
        steps.append(Step(notebook, told, entry["cell"]))
    check_steps(steps)
    return Plan("", record["profile"], record["description"], record["grid"], tuple(steps))


def differences(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """A line for each backbone and data set whose bytes are not those of the earlier record; one line where all are."""
    lines, known = {}, 0
    for old, new in zip(before["notebooks"], after["notebooks"], strict=True):
        for kind, parameter in (("weights", "backbone"), ("images", "dataset")):
            told = old.get(kind), new[kind]
            known += None not in told
            if None not in told and told[0] != told[1]:
                name = new["parameters"][parameter]
                lines[f"{name}: its {kind} differ from the record's ({told[0][:12]} then, {told[1][:12]} now)"] = None
    same = "weights and images are those of the record" if known else "the record names no weights or images to compare"
    return list(lines) or [same]
