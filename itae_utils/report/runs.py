"""The runs of a report, and its own record, `report.json`: enough to run it again and to compare."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jsonschema import Draft202012Validator

from itae_utils.errors import ItaeError
from itae_utils.report.parameters import Notebook, Profile, find_notebooks, resolve
from itae_utils.report.plan import Plan, Step, check_steps, safe_name
from itae_utils.report.rules import recorded
from itae_utils.results import is_collection

RECORD_SCHEMA = 3
_ENTRY = {
    "type": "object", "required": ["notebook", "pairing", "parameters"],
    "properties": {"notebook": {"type": "string"}, "pairing": {"type": "string"}, "parameters": {"type": "object"}},
}
RECORD = Draft202012Validator({  # the parts that `plan_again` reads
    "type": "object", "required": ["profile", "description", "grid", "notebooks"],
    "properties": {
        "profile": {"type": "string"}, "description": {"type": "string"},
        "grid": {"type": "object", "additionalProperties": {"type": "array"}},
        "notebooks": {"type": "array", "minItems": 1, "items": _ENTRY},
    },
})


@dataclass(frozen=True)
class Run:
    """One notebook's run.

    Attributes:
        notebook: the notebook.
        parameters: the parameters it ran with, defaults included.
        seconds: its duration.
        error: the error that stopped it, in one line; None if it succeeded.
        results: its results; None if it stopped before it wrote them.
        pairing: the backbone and data set of the grid that it belongs to; empty without a grid, and for a notebook that
            runs once over all pairings.
        reused: whether it is an earlier run, reused because nothing has changed since.
    """

    notebook: Notebook
    parameters: dict[str, object]
    seconds: float
    error: str | None
    results: dict | None
    pairing: str = ""
    reused: bool = False

    @property
    def folder(self) -> str:
        """The folder of its page, results and figures, relative to the report's."""
        return f"{self.pairing}/{self.notebook.name}".removeprefix("/")

    @property
    def page(self) -> str:
        """Its page, relative to the report's folder."""
        return f"{self.folder}/{self.notebook.name}.html"

    @property
    def label(self) -> str:
        """Its name in tables: "03", and in a grid "demo-digits 03"."""
        return f"{self.pairing} {self.notebook.key}".strip()


@dataclass(frozen=True)
class Report:
    """A written report.

    Attributes:
        folder: that it is in.
        profile: name of its profile.
        description: of the profile.
        runs: in reading order.
        grid: of the profile; empty without one.
    """

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
        """The runs that failed."""
        return tuple(run for run in self.runs if run.error)

    @property
    def failures(self) -> dict[str, list[Run]]:
        """The runs that failed, by error."""
        return {error: [run for run in self.failed if run.error == error]
                for error in dict.fromkeys(run.error for run in self.failed)}


def make_record(report: Report) -> dict[str, object]:
    """Return the record of a report, without the parameters that only depend on its folder."""
    return {
        "schema": RECORD_SCHEMA,
        "profile": report.profile,
        "description": report.description,
        "grid": dict(report.grid),
        "seconds": round(sum(run.seconds for run in report.runs), 1),
        "notebooks": [
            {
                "notebook": run.notebook.name,
                "pairing": run.pairing,
                "page": run.page,
                "results": f"{run.folder}/results.json" if run.results else None,
                "seconds": round(run.seconds, 1),
                "reused": run.reused,
                "error": run.error,
                "parameters": {name: value for name, value in recorded(run.parameters).items()
                               if name != "output_dir" and (name, value) != ("results_dir", str(report.folder))},
                **_inputs(run),
            }
            for run in report.runs
        ],
    }


def _inputs(run: Run) -> dict[str, object]:
    """Return the hashes of the weights and images that a run used; None if they are unknown."""
    about = {} if run.results is None or is_collection(run.results) else run.results["provenance"]
    return {"weights": about.get("backbone", {}).get("weights_sha256"),
            "images": about.get("dataset", {}).get("fingerprint")}


def read_record(folder: Path) -> dict[str, object]:
    """Read the record of the report in `folder`.

    Raises:
        ItaeError: it does not exist, has another schema or is damaged.
    """
    path = folder / "report.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ItaeError(f"{path} can't be read ({error.strerror}): only a complete report can be repeated") from error
    except ValueError as error:
        raise ItaeError(f"{path} is not JSON: run the report again") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != RECORD_SCHEMA:
        raise ItaeError(f"{path} has schema {schema!r}, but {RECORD_SCHEMA} is needed: run the report again")
    # A pairing must be the name of one folder, so that a record can't write elsewhere.
    if not RECORD.is_valid(record) or any(entry["pairing"] != safe_name(entry["pairing"]).strip(".")
                                          for entry in record["notebooks"]):
        raise ItaeError(f"{path} is damaged: run the report again")
    return record


def plan_again(record: Mapping[str, object], folder: Path, given: Mapping[str, object]) -> Plan:
    """Plan the runs of a record with the notebooks that are in `folder` now.

    Args:
        record: from `read_record`.
        folder: of the notebooks.
        given: parameters by name that replace the record's.

    Raises:
        ItaeError: a notebook, parameter or name does not exist any more.
    """
    notebooks = {notebook.name: notebook for notebook in find_notebooks(folder)}
    nothing, steps = Profile(record["profile"], "", {}, {}), []
    for entry in record["notebooks"]:
        if entry["notebook"] not in notebooks:
            raise ItaeError(f"the record's notebook {entry['notebook']!r} does not exist: choose from "
                            f"{', '.join(notebooks)}")
        notebook = notebooks[entry["notebook"]]
        values = entry["parameters"] | notebook.place(given)
        if "options" in values:
            values["options"] = {**entry["parameters"].get("options", {}), **values["options"]}
        steps.append(Step(notebook, resolve([notebook], [notebook], nothing, values)[notebook.key], entry["pairing"]))
    check_steps(steps)
    return Plan("", record["profile"], record["description"], record["grid"], tuple(steps))


def differences(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Return a line for each backbone and data set whose bytes differ between two records, or one line if none do."""
    lines, known = {}, 0
    for old, new in zip(before["notebooks"], after["notebooks"], strict=True):
        for kind, parameter in (("weights", "backbone"), ("images", "dataset")):
            hashes = old.get(kind), new[kind]
            known += None not in hashes
            if None not in hashes and hashes[0] != hashes[1]:
                name = new["parameters"][parameter]
                lines[f"{name}: its {kind} have changed ({hashes[0][:12]} in the record, {hashes[1][:12]} now)"] = None
    same = "weights and images are those of the record" if known else "the record names no weights or images to compare"
    return list(lines) or [same]
