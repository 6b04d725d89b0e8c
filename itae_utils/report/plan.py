"""What a report will run: which notebooks with which parameters, once or for each pairing of a grid."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

from itae_utils.data.datasets import dataset_name, read_contents, size
from itae_utils.data.folders import image_folder
from itae_utils.data.images import check_header
from itae_utils.errors import ItaeError
from itae_utils.method.anatomy import patches_along
from itae_utils.models.backbones import stock_model
from itae_utils.models.checkpoints import check_checkpoint
from itae_utils.models.registry import timm_name_of
from itae_utils.report.parameters import (
    AXES,
    GRID_AXES,
    Notebook,
    Profile,
    find_notebooks,
    located,
    read_profile,
    resolve,
    select,
)
from itae_utils.report.rules import DATASET_OPTIONS, check_values
from itae_utils.store.store import open_store

HEADERS = 1000  # files whose headers are read before anything runs; the notebooks read all
FEWEST_IMAGES = 4  # two clusters of two images


@dataclass(frozen=True)
class Step:
    """One run of a notebook.

    Attributes:
        notebook: the notebook.
        given: the parameters it gets, by name; the others keep their defaults.
        pairing: the backbone, data set and further values of the grid that it belongs to, as a folder's name; empty
            without a grid, and for a notebook that runs once over all pairings.
    """

    notebook: Notebook
    given: dict[str, object]
    pairing: str = ""

    @property
    def folder(self) -> str:
        """The folder it writes to, relative to the report's."""
        return f"{self.pairing}/{self.notebook.name}".removeprefix("/")

    @property
    def parameters(self) -> dict[str, object]:
        """The parameters it runs with, defaults included."""
        return self.notebook.defaults | self.given

    @property
    def settings(self) -> dict[str, object]:
        """Its parameters and options, in one mapping."""
        return {**self.notebook.options, **self.parameters.get("options", {}), **self.parameters}

    @property
    def chosen(self) -> dict[str, object]:
        """Which part and columns of its data set it takes, as keyword arguments."""
        return {name: self.setting(name) for name in DATASET_OPTIONS if name != "on_error"}

    @property
    def parts(self) -> list[dict[str, object]]:
        """What is `chosen` of its data set to be scored, and the split that k-means is fitted on instead, if any."""
        split = self.setting("fit_split")
        return [self.chosen, *([] if split is None else [self.chosen | {"split": split}])]

    def setting(self, name: str) -> object:
        """Return the value of a parameter or an option; None if the notebook has neither."""
        return self.settings.get(name)


@dataclass(frozen=True)
class Plan:
    """The steps of a report in order.

    Attributes:
        name: of its folder, if none is given.
        profile: its name.
        description: of the profile.
        grid: empty without one.
        steps: in order.
    """

    name: str
    profile: str
    description: str
    grid: dict[str, list[object]]
    steps: tuple[Step, ...]

    @property
    def datasets(self) -> set[str]:
        """The names of the data sets that its steps load."""
        return {str(step.setting("dataset")) for step in self.steps if step.setting("dataset") is not None}


def make_plan(folder: Path, profile: str, only: Sequence[str] | None, given: Mapping[str, object]) -> Plan:
    """Plan a run of the notebooks of a folder; see `run_report`.

    Args:
        folder: of the notebooks, with `profiles` in it.
        profile: a name, or a file.
        only: numbers of notebooks; None for the profile's, or all that can run.
        given: parameters by name; they take precedence over the profile's. A list for an axis of its grid replaces that
            axis.

    Raises:
        ItaeError: unknown names, invalid values, no results to collect.
    """
    notebooks = find_notebooks(folder)
    settings = read_profile(profile, folder / "profiles")
    selected = _selected(notebooks, settings.only if only is None else only, settings, given)
    measures = any(not notebook.collects for notebook in selected)
    by_hand = {name: given[name] if isinstance(given[name], list) else [given[name]]
               for name in GRID_AXES if measures and name in settings.grid and name in given}
    grid = {name: [located(name, value) for value in values]
            for name, values in (settings.grid | by_hand if measures else {}).items()}
    given = {name: value for name, value in given.items() if name not in grid}
    pairings = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    resolved = [resolve(notebooks, selected, settings, given | pairing) for pairing in pairings]
    twins = _twins(str(value) for values in grid.values() for value in values)
    steps = []
    for pairing, parameters in zip(pairings, resolved, strict=True):
        more = [str(value) for name, value in pairing.items() if name not in AXES]
        steps += [Step(notebook, parameters[notebook.key],
                       safe_name(_axes_name(notebook, parameters, twins), *more) if grid else "")
                  for notebook in selected if not notebook.collects]
    steps += [Step(notebook, resolved[0][notebook.key]) for notebook in selected if notebook.collects]
    check_steps(steps)
    by_hand = [value for name in by_hand for value in grid[name]]
    if not measures:
        name = safe_name(steps[0].notebook.name, Path(str(steps[0].given["results_dir"])).name)
    elif grid:
        name = safe_name(settings.name, *map(short_name, by_hand))
    else:
        name = safe_name(settings.name, _axes_name(selected[0], resolved[0]))
    return Plan(name, settings.name, settings.description, grid, tuple(steps))


def _selected(
    notebooks: list[Notebook], only: Sequence[str] | None, settings: Profile, given: Mapping[str, object]
) -> list[Notebook]:
    """Return the notebooks to run; those that collect results only if there are results to collect."""
    def has_source(notebook: Notebook) -> bool:
        return any("results_dir" in values for values in (
            given, settings.common, settings.of_notebook.get(notebook.key, {})))

    chosen = select(notebooks, only)
    grid = settings.grid and any(not notebook.collects for notebook in chosen)
    ready = [notebook for notebook in chosen if not notebook.collects or grid or has_source(notebook)]
    if len(ready) < len(chosen) and (only is not None or not ready):
        missing = next(notebook.name for notebook in chosen if notebook not in ready)
        raise ItaeError(f"{missing} collects the results of a report: name its folder with -p results_dir FOLDER, "
                        "or run it together with others over a profile's grid")
    return ready


def check_steps(steps: Iterable[Step]) -> None:
    """Validate what the steps will load and write, before any notebook runs.

    Values were validated when the parameters were resolved. Problems that only the images or the weights themselves can
    show appear when a notebook runs.

    Raises:
        ItaeError: names the value and the remedy.
    """
    steps = list(steps)
    measuring = [step for step in steps if not step.notebook.collects]
    for step in steps:
        check_values(step.parameters)
    count = cache(check_dataset)  # lists each folder once
    for step in measuring:
        check_clusters(step, _counts(step, count))
    check_one_backbone(measuring)
    for names in dict.fromkeys(tuple(map(step.setting, ("backbone", "checkpoint", "image_size")))
                               for step in measuring):
        check_backbone(*names)
    for place in dict.fromkeys(step.setting("store") for step in measuring):
        check_store(place)
    for folder in (step.given["results_dir"] for step in steps if "results_dir" in step.given):
        if not os.path.isdir(folder):
            raise ItaeError(f"results_dir={folder!r} does not exist: give the folder of a report")
    folder, times = Counter(step.folder for step in steps).most_common(1)[0]
    if times > 1:
        raise ItaeError(f"{times} runs would write to the same folder {folder}: give one of them another name")


def check_dataset(name: str, on_error: str | None = "raise", **chosen: str | None) -> int | None:
    """Return the number of images of a data set; None if only the hub knows.

    Refuse an unknown data set or split, and a folder without images, with images on two levels, or damaged ones.
    Headers are read for the first thousand files; with on_error="skip" damaged files are no error.
    """
    name = dataset_name(name)
    if not image_folder(name):
        return size(name, **chosen)[0]
    images = read_contents(name, **chosen).images
    for path in images[:HEADERS] if on_error != "skip" else ():
        check_header(path)
    return len(images)


def _counts(step: Step, count: Callable[..., int | None]) -> list[int]:
    """Return the numbers of images that a step takes of the parts of its data set, as far as they are known."""
    name, on_error, limit, fit_split = map(step.setting, ("dataset", "on_error", "limit", "fit_split"))
    counts = [] if name is None else [count(name, on_error, **step.chosen)]
    if fit_split is not None:
        try:
            counts.append(count(name, on_error, **step.parts[-1]))
        except ItaeError as error:
            raise ItaeError(f"fit_split={fit_split!r}: {error}") from error
    return [min(images, limit or images) for images in counts if images is not None]


def check_clusters(step: Step, counts: Iterable[int]) -> None:
    """Refuse more clusters than images, and too few images to cluster at all; `counts` are those of the parts."""
    if "clusters" not in step.parameters:
        return
    clusters = step.parameters["clusters"]
    for images in counts:
        if images < FEWEST_IMAGES:
            raise ItaeError(f"images: {images:,} of {step.setting('dataset')} is too few to cluster: use at least "
                            f"{FEWEST_IMAGES}, or leave out notebook {step.notebook.key}")
        if clusters and clusters > images:
            raise ItaeError(f"clusters={clusters} is more than the number of images, {images:,}: use fewer clusters")


def check_one_backbone(steps: Iterable[Step]) -> None:
    """Refuse a checkpoint that is given for several backbones, unless they are one architecture."""
    backbones: dict[object, dict[str, str]] = {}
    for step in steps:
        if name := step.setting("checkpoint") and step.setting("backbone"):
            architecture = (timm_name_of(name) or name).partition(".")[0]
            backbones.setdefault(step.setting("checkpoint"), {})[architecture] = name
    for checkpoint, names in backbones.items():
        if len(names) > 1:
            raise ItaeError(f"checkpoint={checkpoint!r} can't be the weights of {' and '.join(names.values())}: choose "
                            "one of them with --backbone")


def check_backbone(name: str | None, checkpoint: str | None, image_size: int | None) -> None:
    """Refuse an unknown backbone, an unsupported one, and a checkpoint or image size that does not fit it."""
    if name is None:
        return
    patch = stock_model(name).patch_embed.patch_size[0]
    if image_size is not None:
        patches_along(image_size, patch)
    if checkpoint is not None:
        if timm_name_of(name) is None:
            raise ItaeError(f"{name} has its own weights: checkpoint={checkpoint!r} needs a timm name")
        check_checkpoint(name, checkpoint)


def check_store(place: str | None) -> None:
    """Refuse a feature store that can't be opened: an unknown kind of URL, or a file."""
    if store := open_store(place):
        _ = store.zarr


def _axes_name(notebook: Notebook, given: Mapping[str, Mapping[str, object]], twins: Collection[str] = ()) -> str:
    """Return backbone and data set of a notebook's run, as a name for a folder; a hash follows those in `twins`."""
    parameters = notebook.defaults | given[notebook.key]
    values = [str(parameters[axis]) for axis in AXES if axis in parameters]
    return safe_name(*(f"{short_name(each)}-{short_hash(each)}" if each in twins else short_name(each)
                       for each in values))


def _twins(values: Iterable[str]) -> set[str]:
    """Return the values that share their short name with another one."""
    values = set(values)
    times = Counter(map(short_name, values))
    return {value for value in values if times[short_name(value)] > 1}


def short_name(value: object) -> str:
    """Return the name of a backbone or data set as a name for a folder, of a path only its last part."""
    kind, _, place = str(value).partition(":")
    return safe_name(kind, Path(place).name) if os.path.isabs(place) else safe_name(str(value))


def short_hash(*values: str) -> str:
    """Return six hexadecimal digits that tell these values from others."""
    return hashlib.sha256("\0".join(values).encode("utf-8", "surrogateescape")).hexdigest()[:6]


def safe_name(*words: str) -> str:
    """Join words to a name for a folder."""
    return re.sub(r"[^\w.-]+", "-", "-".join(words))
