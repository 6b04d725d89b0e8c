"""What a report will run: which notebooks with which parameters, once or for every cell of a grid."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from itae_utils.errors import ItaeError
from itae_utils.report.parameters import (
    AXES,
    Notebook,
    Profile,
    check_backbone,
    check_clusters,
    check_dataset,
    check_values,
    find_notebooks,
    read_profile,
    resolve,
    select,
)


@dataclass(frozen=True)
class Step:
    """One run of a notebook.

    Attributes:
        notebook: what is run.
        told: the parameters it is told, by name; the others keep their defaults.
        cell: the part of the grid it belongs to; empty without a grid and for what runs once over all of it.
    """

    notebook: Notebook
    told: dict[str, object]
    cell: str = ""

    @property
    def folder(self) -> str:
        """Where it writes, seen from the report's folder."""
        return f"{self.cell}/{self.notebook.name}".removeprefix("/")

    @property
    def parameters(self) -> dict[str, object]:
        """What it runs with, defaults included."""
        return self.notebook.defaults | self.told


@dataclass(frozen=True)
class Plan:
    """The steps of a report in order; `name` is for its folder where none is given, `grid` is empty without one."""

    name: str
    profile: str
    description: str
    grid: dict[str, list[object]]
    steps: tuple[Step, ...]


def make_plan(folder: Path, profile: str, only: Sequence[str] | None, given: Mapping[str, object]) -> Plan:
    """The plan for the notebooks of a folder; see `run_report`.

    Args:
        folder: of the notebooks, with `profiles` in it.
        profile: a name, or a file.
        only: numbers of notebooks; None for all that can run.
        given: parameters by name, before the profile's. A list for an axis of its grid replaces that axis.

    Raises:
        ItaeError: unknown names, mistyped values, nothing to collect from.
    """
    notebooks = find_notebooks(folder)
    settings = read_profile(profile, folder / "profiles")
    selected = _selected(notebooks, only, settings, given)
    measures = any(not notebook.collects for notebook in selected)
    by_hand = {name: given[name] if isinstance(given[name], list) else [given[name]]
               for name in AXES if measures and name in settings.grid and name in given}
    grid = settings.grid | by_hand if measures else {}
    given = {name: value for name, value in given.items() if name not in grid}
    steps, cells = [], [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    told = [resolve(notebooks, selected, settings, given | cell) for cell in cells]
    for parameters in told:
        steps += [Step(notebook, parameters[notebook.key], _axes_name(notebook, parameters) if grid else "")
                  for notebook in selected if not notebook.collects]
    steps += [Step(notebook, told[0][notebook.key]) for notebook in selected if notebook.collects]
    check_steps(steps)
    if not measures:
        name = safe_name(steps[0].notebook.name, Path(str(steps[0].told["results_dir"])).name)
    elif grid:
        name = safe_name(settings.name, *(_short(value) for values in by_hand.values() for value in values))
    else:
        name = safe_name(settings.name, _axes_name(selected[0], told[0]))
    return Plan(name, settings.name, settings.description, grid, tuple(steps))


def _selected(
    notebooks: list[Notebook], only: Sequence[str] | None, settings: Profile, given: Mapping[str, object]
) -> list[Notebook]:
    """The notebooks to run; those that collect only where there is something to collect."""
    def told_where(notebook: Notebook) -> bool:
        return any("results_dir" in told for told in (
            given, settings.common, settings.of_notebook.get(notebook.key, {})))

    chosen = select(notebooks, only)
    grid = settings.grid and any(not notebook.collects for notebook in chosen)
    ready = [notebook for notebook in chosen if not notebook.collects or grid or told_where(notebook)]
    if only is not None and len(ready) < len(chosen):
        missing = next(notebook.name for notebook in chosen if notebook not in ready)
        raise ItaeError(f"{missing} collects the results of a report: name its folder with -p results_dir FOLDER, "
                        "or run it together with others over a profile's grid")
    return ready


def check_steps(steps: Iterable[Step]) -> None:
    """Refuse what no notebook could load, find or use, before several of them fail on it."""
    steps = list(steps)
    parameters = [step.parameters for step in steps]
    for told in parameters:
        check_values(told)
    for about in dict.fromkeys((told["dataset"], told.get("on_error", "raise"))
                               for told in parameters if "dataset" in told):
        check_dataset(*about)
    for told in parameters:
        check_clusters(told)
    for about in dict.fromkeys((told["backbone"], told.get("checkpoint"), told.get("image_size"))
                               for told in parameters if "backbone" in told):
        check_backbone(*about)
    for folder in (step.told["results_dir"] for step in steps if "results_dir" in step.told):
        if not os.path.isdir(folder):
            raise ItaeError(f"results_dir {folder!r}: there is no such folder")
    folder, times = Counter(step.folder for step in steps).most_common(1)[0]
    if times > 1:
        raise ItaeError(f"{times} runs would write to the same folder {folder}: give one of them another name")


def _axes_name(notebook: Notebook, told: Mapping[str, Mapping[str, object]]) -> str:
    """Backbone and data set of a notebook's run, as a name for a folder."""
    parameters = notebook.defaults | told[notebook.key]
    return safe_name(*(_short(parameters[axis]) for axis in AXES if axis in parameters))


def _short(value: object) -> str:
    text = str(value)
    return f"imagefolder-{Path(text.partition(':')[2]).name}" if text.startswith("imagefolder:") else text


def safe_name(*words: str) -> str:
    """A name for a folder from words."""
    return re.sub(r"[^\w.-]+", "-", "-".join(words))
