"""Notebooks with their parameters and options, profiles, and the values that each notebook gets."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import yaml

from itae_utils.data.datasets import dataset_name
from itae_utils.data.huggingface import PREFIX, place_and_split
from itae_utils.errors import ItaeError
from itae_utils.files import PACKAGE
from itae_utils.report.rules import OPTIONS, RULES, check_options, check_values, closest

FREE_DEFAULTS = (None, "auto")  # defaults that mean "chosen for you" and have no type
AXES = ("backbone", "dataset")  # the parameters that name a run's folder
GRID_AXES = (*AXES, "pos_embed")  # what a profile's grid may list


class _Loader(yaml.SafeLoader):
    """YAML in which a value means what it looks like.

    YAML 1.1 reads 0100 as 64, 1:30 as 90, no as false and 2024-01-02 as a date; here they are text. It reads 1e3 as
    text; here it is the whole number 1000, and 1e-3 is 0.001.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_exponent(self, node: yaml.ScalarNode) -> float | int:
        number = float(node.value)
        return int(number) if number.is_integer() else number


for _tag, _pattern, _first in [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("tag:yaml.org,2002:int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)", "-+.0123456789"),
    ("!exponent", r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+", "-+.0123456789"),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
]:
    _Loader.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), list(_first))
_Loader.add_constructor("!exponent", _Loader.construct_exponent)


def parse_value(text: str) -> object:
    """Read a parameter's value from the command line as YAML: 3, 1e-3, true, null, a word, [1, 2], {a: 1}.

    Raises:
        ItaeError: not YAML.
    """
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # [[[[… is a RecursionError
        raise ItaeError(f"{text!r} can't be read as a value: quote it as YAML text") from error
    if value is None and text.strip().lower() not in ("null", "~"):  # such as "$N" of a shell, with N not set
        raise ItaeError(f"{text!r} is no value: write null if that is meant")
    return value


@dataclass(frozen=True)
class Notebook:
    """A notebook file, read but not run.

    Attributes:
        path: of the file.
        defaults: names and default values in its `parameters` cell.
        title: its first heading.
        lead: the paragraph after that, in Markdown.
    """

    path: Path
    defaults: dict[str, object]
    title: str
    lead: str

    @property
    def name(self) -> str:
        """Its file name without the ending."""
        return self.path.stem

    @property
    def key(self) -> str:
        """The number its name starts with, such as "01"."""
        return self.name.partition("_")[0]

    @property
    def options(self) -> dict[str, object]:
        """The options it takes, with their defaults: its own and those of every notebook that loads images."""
        return OPTIONS | self.defaults["options"] if "options" in self.defaults else {}

    def place(self, values: Mapping[str, object]) -> dict[str, object]:
        """Sort values by name into its parameters and its options; the others are left out."""
        placed = {name: value for name, value in values.items() if name in self.defaults}
        options = {**placed.get("options", {}), **{name: value for name, value in values.items()
                                                   if name in self.options and name not in self.defaults}}
        return {**placed, "options": options} if options else placed

    @property
    def collects(self) -> bool:
        """Whether it measures nothing itself but collects the results of other notebooks from `results_dir`."""
        return "results_dir" in self.defaults


def notebooks_folder() -> Path:
    """Return the folder of the notebooks: in the package if it was installed from a wheel, beside it in a checkout."""
    installed = PACKAGE / "_notebooks"
    return installed if installed.is_dir() else PACKAGE.parent / "notebooks"


def find_notebooks(folder: Path) -> list[Notebook]:
    """Read all numbered notebooks of a folder, in reading order.

    Raises:
        ItaeError: the folder has none, or a `parameters` cell holds more than `name = literal` lines.
    """
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise ItaeError(f"no notebooks in {folder}: they are named like 01_name.ipynb")
    return [read_notebook(path) for path in paths]


def read_notebook(path: Path) -> Notebook:
    """Read one notebook; raises as `find_notebooks`."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    opening = next(("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"), "")
    heading, _, rest = opening.strip().partition("\n")
    return Notebook(
        path=path,
        defaults=_read_defaults(path.name, cells),
        title=heading.lstrip("# ").strip() or path.stem,
        lead=rest.strip().partition("\n\n")[0],
    )


def read_code(path: Path) -> list[str]:
    """Return the code of a notebook's cells, except that of its parameters."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells
            if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])]


def _read_defaults(name: str, cells: list[dict]) -> dict[str, object]:
    tagged = [cell for cell in cells
              if cell["cell_type"] == "code" and "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ItaeError(f"{name} has {len(tagged)} cells tagged 'parameters': it needs exactly one")
    try:
        return dict(_assignment(line) for line in ast.parse("".join(tagged[0]["source"])).body)
    except (SyntaxError, ValueError) as error:
        raise ItaeError(f"the parameters cell of {name} must hold only `name = literal` lines: {error}") from error


def _assignment(line: ast.stmt) -> tuple[str, object]:
    match line:
        case ast.Assign(targets=[ast.Name(name)], value=value) | ast.AnnAssign(target=ast.Name(name), value=value):
            return name, ast.literal_eval(value)
    raise ValueError(f"line {line.lineno} is not one")


def select(notebooks: list[Notebook], only: list[str] | None) -> list[Notebook]:
    """Return the notebooks whose numbers are in `only`; all for None."""
    keys = [notebook.key for notebook in notebooks]
    for key in only or []:
        if key not in keys:
            raise ItaeError(f"there is no notebook {key!r}: choose from {', '.join(keys)}")
    return [notebook for notebook in notebooks if only is None or notebook.key in only]


@dataclass(frozen=True)
class Profile:
    """A named set of parameters: for all notebooks, and for single ones by their number.

    A `grid` lists backbones, data sets and rules of position embeddings; the notebooks run once for each combination.
    `only` are the numbers of the notebooks to run, or None for all.
    """

    name: str
    description: str
    common: dict[str, object]
    of_notebook: dict[str, dict[str, object]]
    grid: dict[str, list[object]] = field(default_factory=dict)
    only: list[str] | None = None


def read_profile(profile: str, folder: Path) -> Profile:
    """Read `folder/PROFILE.yaml`, or the file `profile` if it ends in .yaml or .yml.

    Raises:
        ItaeError: no such profile, or it is not made of description, only, common, grid and one block per notebook.
    """
    known = {path.stem: path for path in folder.glob("*.yaml")}
    path = Path(os.path.expanduser(profile)) if profile.endswith((".yaml", ".yml")) else known.get(profile)
    if path is None:
        raise ItaeError(f"unknown profile {profile!r}: choose from {', '.join(sorted(known))}, or give a .yaml file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
        description, only = str(content.pop("description", "")), content.pop("only", None)
        blocks = {str(key).zfill(2): dict(block or {}) for key, block in content.items()}  # 01 is the number 1 in YAML
    except OSError as error:
        raise ItaeError(f"profile {profile!r} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ItaeError(f"profile {profile!r} must be YAML: description, common, and one block per notebook") from error
    grid = blocks.pop("grid", {})
    if not all(name in GRID_AXES and isinstance(values, list) and values for name, values in grid.items()):
        raise ItaeError(f"profile {profile!r}: its grid must hold lists of {' or '.join(GRID_AXES)} names, not {grid}")
    if only is not None and not (isinstance(only, list) and only and all(isinstance(key, str) for key in only)):
        raise ItaeError(f"profile {profile!r}: only must be a list of notebooks, such as ['03', '04'], not {only!r}")
    return Profile(path.stem, description, blocks.pop("common", {}), blocks, grid, only)


def resolve(
    notebooks: list[Notebook], selected: list[Notebook], profile: Profile, given: Mapping[str, object]
) -> dict[str, dict[str, object]]:
    """Return the parameters that each selected notebook gets, by its number: the profile's, then those given by hand.

    A name that is not a parameter of a notebook but one of its options is put there. A profile is validated against all
    notebooks, so that its mistakes show whichever are selected. A name given by hand must exist in a selected notebook.
    Relative paths are resolved against the working directory.

    Raises:
        ItaeError: an unknown name, or a value that is not valid.
    """
    _check(profile.common, notebooks, f"profile {profile.name}")
    for key, block in profile.of_notebook.items():
        _check(block, select(notebooks, [key]), f"profile {profile.name}")
    _check(given, selected, "-p")
    resolved = {}
    for notebook in selected:
        layers = [notebook.place(layer)
                  for layer in (profile.common, profile.of_notebook.get(notebook.key, {}), given)]
        values = {name: value for layer in layers for name, value in layer.items()}
        if "options" in values:
            chosen = {name: value for layer in layers for name, value in layer.get("options", {}).items()}
            values["options"] = notebook.defaults["options"] | {
                name: located(name, value) for name, value in chosen.items()}
        resolved[notebook.key] = {name: located(name, value) for name, value in values.items()}
    return resolved


def _check(values: Mapping[str, object], notebooks: list[Notebook], origin: str) -> None:
    known = {name for notebook in notebooks for name in (*notebook.defaults, *notebook.options)} - {"output_dir"}
    for name in values:
        if name == "output_dir":
            raise ItaeError(f"{origin}: output_dir is set by the report itself: use --output")
        if name not in known:
            where, close = ", ".join(notebook.key for notebook in notebooks), closest(name, known)
            raise ItaeError(f"{origin}: no parameter {name!r} in notebook {where}: did you mean {close}?")
    check_values(values, origin)
    for notebook in notebooks:
        placed = notebook.place(values)
        check_options(placed.get("options", {}), notebook.options, origin)
        for name in set(placed) - set(RULES):
            _check_type(name, placed[name], notebook, origin)


def _check_type(name: str, value: object, notebook: Notebook, origin: str) -> None:
    """Refuse a value of another type than the default of a parameter that has no rule."""
    default = notebook.defaults[name]
    if not fits(value, default):
        takes = "a single value" if default in FREE_DEFAULTS else f"a value of type {type(default).__name__}"
        raise ItaeError(f"{origin}: {name}={value!r} is of type {type(value).__name__}, but {notebook.name} takes "
                        f"{takes}, as its default {default!r}")


def fits(value: object, default: object) -> bool:
    """Return whether a value has a default's type: an int passes for a float, a bool is no int."""
    if default in FREE_DEFAULTS:
        return value is None or isinstance(value, (bool, int, float, str))
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple))
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(default)


def located(name: str, value: object) -> object:
    """Return a parameter's value with its path made absolute, and a data set by the name that `load_dataset` gives it.

    Raises:
        ItaeError: a data set is unknown, or a path is none.
    """
    if not isinstance(value, str):
        return value
    if name == "dataset":
        value = dataset_name(value)
    if name == "checkpoint" or name.endswith(("_dir", "_path")):
        return _resolved(name, value)
    if name == "store" and value not in ("auto", "none") and "://" not in value:
        return _resolved(name, value)
    if value.startswith("imagefolder:"):
        return f"imagefolder:{_resolved(name, value.removeprefix('imagefolder:'))}"
    if value.startswith(PREFIX):
        place, split = place_and_split(value)
        if os.path.isdir(place):
            return PREFIX + ":".join(filter(None, [_resolved(name, place), split]))
    return value


def _resolved(name: str, path: str) -> str:
    try:
        return str(Path(os.path.expanduser(path)).resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte, a loop of links
        raise ItaeError(f"{name}={path!r} is no path: {error}") from error
