"""What notebooks can be told and what they are told: `parameters` cells, profiles, checks before anything runs."""

from __future__ import annotations

import ast
import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from itae_utils.data.datasets import DATASETS, image_count
from itae_utils.data.folders import check_header, image_folder, read_folder
from itae_utils.errors import ItaeError, unknown_name
from itae_utils.method.anatomy import patches_along
from itae_utils.method.setting import ATTENUATIONS, ITAE, SOURCES
from itae_utils.models.backbones import stock_model
from itae_utils.models.registry import BACKBONES, POS_EMBEDS, PRECISIONS, PREPROCESSING

FREE_DEFAULTS = (None, "auto")  # defaults that stand for "chosen for you" and so tell no type
AXES = ("backbone", "dataset")  # what a profile's grid may run over


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everyone who types it means it; YAML 1.1 wants 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def parse_value(text: str) -> object:
    """A parameter's value from the command line, read as YAML: 3, 1e-3, true, null, a word, [1, 2].

    Raises:
        ItaeError: not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2024-13-01 is a ValueError, [[[[… a RecursionError
        raise ItaeError(f"{text!r} can't be read as a value: quote it as YAML text") from error


@dataclass(frozen=True)
class Notebook:
    """A notebook as it lies in its folder; nothing of it is run.

    Attributes:
        path: where it is.
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
        """File name without its ending."""
        return self.path.stem

    @property
    def key(self) -> str:
        """The number it starts with, such as "01"."""
        return self.name.partition("_")[0]

    @property
    def collects(self) -> bool:
        """Whether it measures nothing of its own, but collects what others left in `results_dir`."""
        return "results_dir" in self.defaults


def find_notebooks(folder: Path) -> list[Notebook]:
    """All numbered notebooks of a folder in reading order.

    Raises:
        ItaeError: there is none, or a `parameters` cell is not plain.
    """
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise ItaeError(f"no notebooks in {folder}: they are named like 01_name.ipynb")
    return [_read_notebook(path) for path in paths]


def _read_notebook(path: Path) -> Notebook:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    opening = next(("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"), "")
    heading, _, rest = opening.strip().partition("\n")
    return Notebook(
        path=path,
        defaults=_read_defaults(path.name, cells),
        title=heading.lstrip("# ").strip() or path.stem,
        lead=rest.strip().partition("\n\n")[0],
    )


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
    """The notebooks whose numbers are in `only`; all of them for None."""
    keys = [notebook.key for notebook in notebooks]
    for key in only or []:
        if key not in keys:
            raise ItaeError(f"there is no notebook {key!r}: choose from {', '.join(keys)}")
    return [notebook for notebook in notebooks if only is None or notebook.key in only]


@dataclass(frozen=True)
class Profile:
    """A named set of parameters: those for every notebook, and those for one by its number.

    Where there is a `grid`, of backbones or data sets, the notebooks run once for each of its cells.
    """

    name: str
    description: str
    common: dict[str, object]
    of_notebook: dict[str, dict[str, object]]
    grid: dict[str, list[object]] = field(default_factory=dict)


def read_profile(profile: str, folder: Path) -> Profile:
    """Read `folder/PROFILE.yaml`, or the file `profile` where it ends in .yaml or .yml.

    Raises:
        ItaeError: no such profile, or not of the shape description, common, grid and one block a notebook.
    """
    known = {path.stem: path for path in folder.glob("*.yaml")}
    path = Path(profile) if profile.endswith((".yaml", ".yml")) else known.get(profile)
    if path is None:
        raise ItaeError(f"unknown profile {profile!r}: choose from {', '.join(sorted(known))}, or give a .yaml file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
        description = str(content.pop("description", ""))
        blocks = {str(key).zfill(2): dict(block or {}) for key, block in content.items()}  # 01 is the number 1 in YAML
    except OSError as error:
        raise ItaeError(f"profile {profile!r} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ItaeError(f"profile {profile!r} must be YAML: description, common, and a block a notebook") from error
    grid = blocks.pop("grid", {})
    if not all(name in AXES and isinstance(values, list) and values for name, values in grid.items()):
        raise ItaeError(f"profile {profile!r}: its grid must hold lists of {' or '.join(AXES)} names, not {grid}")
    return Profile(path.stem, description, blocks.pop("common", {}), blocks, grid)


def resolve(
    notebooks: list[Notebook], selected: list[Notebook], profile: Profile, given: Mapping[str, object]
) -> dict[str, dict[str, object]]:
    """The parameters each selected notebook is run with, by its number: the profile's, then those given by hand.

    A profile is checked against all notebooks, so that its mistakes show whichever are selected; what is given by
    hand must mean something to one that is. Relative paths are taken from the working directory.

    Raises:
        ItaeError: an unknown name, or a value of another type than the notebook's default.
    """
    _check(profile.common, notebooks, f"profile {profile.name}")
    for key, block in profile.of_notebook.items():
        _check(block, select(notebooks, [key]), f"profile {profile.name}")
    _check(given, selected, "-p")
    resolved = {}
    for notebook in selected:
        told = {**profile.common, **profile.of_notebook.get(notebook.key, {}), **given}
        resolved[notebook.key] = {
            name: _absolute(name, value) for name, value in told.items() if name in notebook.defaults
        }
    return resolved


def _check(values: Mapping[str, object], notebooks: list[Notebook], origin: str) -> None:
    known = {name for notebook in notebooks for name in notebook.defaults} - {"output_dir"}
    for name, value in values.items():
        if name == "output_dir":
            raise ItaeError(f"{origin}: output_dir is set by the report itself: use --output")
        if name not in known:
            where = ", ".join(notebook.key for notebook in notebooks)
            hint = " or ".join(difflib.get_close_matches(str(name), known, n=3)) or ", ".join(sorted(known))
            raise ItaeError(f"{origin}: no parameter {name!r} in notebook {where}: did you mean {hint}?")
        for notebook in notebooks:
            if name in notebook.defaults and not fits(value, notebook.defaults[name]):
                default = notebook.defaults[name]
                takes = "a single value" if default in FREE_DEFAULTS else f"a value of type {type(default).__name__}"
                raise ItaeError(f"{origin}: {name}={value!r} is of type {type(value).__name__}, but {notebook.name} "
                                f"takes {takes}, as its default {default!r}")


def fits(value: object, default: object) -> bool:
    """Whether a value has a default's type: an int is fine for a float, a bool is no int, "auto" takes any scalar."""
    if default in FREE_DEFAULTS:
        return value is None or isinstance(value, (bool, int, float, str))
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple))
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(default)


def _absolute(name: str, value: object) -> object:
    if not isinstance(value, str):
        return value
    if name == "checkpoint" or name.endswith(("_dir", "_path")):
        return _resolved(name, value)
    if value.startswith("imagefolder:"):
        return f"imagefolder:{_resolved(name, value.removeprefix('imagefolder:'))}"
    return value


def _resolved(name: str, path: str) -> str:
    try:
        return str(Path(os.path.expanduser(path)).resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte, a loop of links
        raise ItaeError(f"{name}={path!r} is no path: {error}") from error


CHOICES = {"preprocess": PREPROCESSING, "precision": ("auto", *PRECISIONS), "pos_embed": POS_EMBEDS,
           "on_error": ("raise", "skip")}
LISTS = {"sources": SOURCES, "attenuations": ATTENUATIONS}
LOWEST = {"limit": 1, "sample": 1, "examples": 1, "clusters": 2, "seeds": 1, "n_init": 1,
          "batch_size": 1, "seed": 0}
HIGHEST = {"examples": 24}  # more pictures in a row can't be seen
OPTIONAL = {"limit": (None,), "clusters": (None,), "batch_size": ("auto",)}  # what else they may be
NULL = "null"  # how the command line writes None
HEADERS = 1000  # of files that are looked at; notebooks look at all
LARGEST = 2**31 - 1  # more is no seed, and no number of anything
METHOD = ("source", "threshold", "attenuation", "alpha")  # parameters that are ITAE's own


def check_values(parameters: Mapping[str, object]) -> None:
    """Refuse the parameters of a notebook that it could not run with, defaults included; unknown names are let pass.

    Raises:
        ItaeError: names the parameter and what it may be.
    """
    for name, value in parameters.items():
        check_text(name, value)
    for name, allowed in CHOICES.items():
        _require(name not in parameters or parameters[name] in allowed, name, parameters, _one_of(allowed))
    for name, allowed in LISTS.items():
        values = parameters.get(name, allowed)
        _require(values and all(value in allowed for value in values), name, parameters, f"a list: {_one_of(allowed)}")
    for name, lowest in LOWEST.items():
        value, highest = parameters.get(name, lowest), HIGHEST.get(name, LARGEST)
        others = OPTIONAL.get(name, ())
        _require(value in others or _is_whole(value, lowest, highest), name, parameters,
                 f"a whole number from {lowest} to {highest:,}{''.join(f', or {other or NULL}' for other in others)}")
    for value in parameters.get("percents", ()):
        _require(_is_number(value) and 0 < value < 100, "percents", parameters, "numbers between 0 and 100")
    for value in parameters.get("backbones", ()):
        _require(isinstance(value, str), "backbones", parameters, "a list of names")
    _require(parameters.get("threshold", "auto") is not None, "threshold", parameters, "a number or auto")
    ITAE(**{name: parameters[name] for name in METHOD if name in parameters})


def check_text(name: str, value: object) -> None:
    """Refuse text that no notebook can hold: the name of a file may have bytes that are none of UTF-8."""
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise ItaeError(f"{name}={value!r} is not UTF-8: give such a file or folder another name") from error


def check_dataset(name: str, on_error: str = "raise") -> None:
    """Refuse an unknown data set, and a folder without images, with images on two levels, or with damaged ones.

    Damage is seen where a header tells, among the first thousand files, and doesn't matter with on_error="skip".
    """
    if folder := image_folder(name):
        if not os.path.isdir(folder):  # unlike pathlib's, it takes any text
            raise ItaeError(f"data set {name!r}: there is no such folder")
        paths, _, _ = read_folder(folder)
        for path in paths[:HEADERS] if on_error == "raise" else ():
            check_header(path)
    elif name not in DATASETS:
        raise unknown_name("data set", name, DATASETS, "`itae datasets`")


def check_backbone(name: str, checkpoint: str | None, image_size: int | None) -> None:
    """Refuse an unknown backbone, one the method can't handle, and weights or a size that don't go with it."""
    entry = BACKBONES.get(name)
    patch = entry.patch if entry else stock_model(name).patch_embed.patch_size[0]
    if checkpoint is not None and entry and entry.timm_name is None:
        raise ItaeError(f"{name} carries its weights: checkpoint={checkpoint!r} goes with a timm name")
    if checkpoint is not None and not os.path.exists(str(checkpoint)):
        raise ItaeError(f"checkpoint {checkpoint!r}: there is no such file or folder")
    if image_size is not None:
        about = {"image_size": image_size}
        _require(_is_whole(image_size, 1), "image_size", about, f"a whole number of pixels, of at most {LARGEST:,}")
        patches_along(image_size, patch)


def check_clusters(parameters: Mapping[str, object]) -> None:
    """Refuse more clusters than there are images in a data set that can be read."""
    clusters = parameters.get("clusters")
    if clusters and clusters > (images := image_count(parameters)):
        raise ItaeError(f"clusters={clusters} is more than there are images, {images:,}: use fewer, or more images")


def _require(holds: object, name: str, parameters: Mapping[str, object], what: str) -> None:
    if not holds:
        raise ItaeError(f"{name}={parameters[name]!r} is not possible: it must be {what}")


def _one_of(allowed: tuple[str, ...]) -> str:
    return f"{', '.join(allowed[:-1])} or {allowed[-1]}"


def _is_whole(value: object, lowest: int, highest: int = LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
