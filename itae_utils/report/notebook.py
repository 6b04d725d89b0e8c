"""What every notebook does besides its own question: validate parameters, load, show figures, write results."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from IPython.display import Image, Markdown, display
from torch.utils.data import Dataset

from itae_utils.data.datasets import load_dataset
from itae_utils.errors import ItaeError
from itae_utils.figures.style import ReportFigure, save, use_format
from itae_utils.files import make_folder
from itae_utils.method.setting import ITAE
from itae_utils.models.backbones import Backbone, load_backbone
from itae_utils.report import rules
from itae_utils.report.parameters import notebooks_folder, read_code, read_notebook
from itae_utils.results import provenance, write_results

USED_BY_RUN = ("backbone", "dataset", "limit", "seed", "options", "output_dir")  # parameters that no cell has to read


def start(name: str, namespace: Mapping[str, object]) -> NotebookRun:
    """Begin a notebook's run: validate its parameters by the rules of `itae report`.

    Args:
        name: of the notebook, such as "03_clustering".
        namespace: `globals()` after the parameters cell.

    Raises:
        ItaeError: names the first parameter that is not valid, or a parameter or option that does not exist.
    """
    parameters = {name: namespace[name] for name in rules.RULES if name in namespace}
    rules.check_values(parameters)
    options = dict(parameters.get("options", {}))
    file = notebooks_folder() / f"{name}.ipynb"
    known = read_notebook(file).options if file.is_file() else rules.OPTIONS | options
    rules.check_options(options, known)
    if file.is_file():
        check_assigned(namespace.get("In", ())[:-1], file, known)
    run = NotebookRun(name, parameters, known | options)
    use_format(str(run.options.get("format", "screen")))
    make_folder(run.output_dir / "figures", mark=True)  # before the images are listed, which may be beside it
    return run


def check_assigned(cells: Sequence[str], file: Path, options: Iterable[str]) -> None:
    """Refuse a name that the parameters cell assigns and the notebook does not use, such as a misspelt parameter.

    Args:
        cells: the code that was run before, in order; parameters are assigned in the last cells that only assign.
        file: of the notebook.
        options: that it takes.

    Raises:
        ItaeError: names it, and the closest parameters, or the option of that name.
    """
    assigned: set[str] = set()
    for code in reversed(cells):
        if names := _only_assigned(code):
            assigned |= names
        elif assigned:
            break
    read, written = set(), set()
    for node in (node for code in read_code(file) for node in ast.walk(_parsed(code)) if isinstance(node, ast.Name)):
        (read if isinstance(node.ctx, ast.Load) else written).add(node.id)
    parameters = set(USED_BY_RUN) | (read - written)
    for name in sorted(assigned - parameters):
        if name in options:
            raise ItaeError(f"{name!r} is an option: write options = {{{name!r}: …}}")
        known = parameters & set(rules.RULES)
        close = rules.closest(name, {*known, *options}, otherwise=known)
        raise ItaeError(f"the notebook has no parameter {name!r}: did you mean {close}?")


def _only_assigned(code: str) -> set[str]:
    """Return the names that a cell assigns; none if it does anything else."""
    targets = [target for line in _parsed(code).body for target in (
        line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else [line])]
    return {target.id for target in targets} if all(isinstance(target, ast.Name) for target in targets) else set()


def _parsed(code: str) -> ast.Module:
    try:
        return ast.parse(code)
    except SyntaxError:  # such as a magic command
        return ast.Module([], [])


class NotebookRun:
    """One run of a notebook.

    Attributes:
        name: of the notebook.
        parameters: the values of its parameters cell.
        options: its options, with the defaults of those that were not given.
        backbone: after `load`.
        dataset: after `load`.
    """

    def __init__(self, name: str, parameters: Mapping[str, object], options: Mapping[str, object]) -> None:
        self.name, self.parameters, self.options = name, parameters, options
        self.output_dir = Path(str(parameters["output_dir"])).expanduser()
        self.backbone: Backbone | None = None
        self.dataset: Dataset | None = None
        self._figures: list[str] = []

    def load(self) -> tuple[Backbone, Dataset]:
        """Load the backbone and the data set that the parameters name."""
        parameters, options = self.parameters, self.options
        self.backbone = self.load_backbone(str(parameters["backbone"]), checkpoint=options["checkpoint"])
        self.dataset = self.load_images()
        return self.backbone, self.dataset

    def load_images(self, **other: object) -> Dataset:
        """Load the data set that the parameters name, or another part of it, such as its `split`."""
        chosen = {name: value for name in rules.DATASET_OPTIONS if (value := self.options[name]) is not None}
        return load_dataset(str(self.parameters["dataset"]), limit=self.parameters["limit"], seed=self.seed("subset"),
                            **chosen | other)

    def load_backbone(self, name: str, **options: object) -> Backbone:
        """Load another backbone with the same image size, preprocessing, precision and device."""
        return load_backbone(name, **{key: self.options[key] for key in rules.MODEL_OPTIONS}, **options)

    def seed(self, of: str) -> int:
        """Return the seed of "subset", "threshold", "control" or "kmeans": its option, else the parameter `seed`."""
        own = self.options[f"{of}_seed"]
        return int(self.parameters["seed"] if own is None else own)

    def setting(self, **changes: object) -> ITAE:
        """Return the setting of the method that the parameters and options name, with some changes."""
        values = self.options | self.parameters
        names = ("source", "threshold", "tail", "rank", "attenuation", "alpha")
        named = {name: values[name] for name in names if name in values}
        return ITAE(**named | {"seed": self.seed("control")} | changes)

    @property
    def reading(self) -> dict[str, object]:
        """Keyword arguments for functions that run images through the backbone."""
        return {name: self.options[name] for name in ("batch_size", "num_workers", "store")}

    @property
    def extraction(self) -> dict[str, object]:
        """Keyword arguments for `extract_features`."""
        return self.reading | {"client": self.options["dask"]}

    @property
    def store(self) -> object:
        """The feature store, for results that are computed from features."""
        return self.options["store"]

    def show(self, figure: ReportFigure, name: str) -> None:
        """Display a figure and save it as `figures/name` in three formats."""
        save(figure, self.output_dir, name)
        picture = (self.output_dir / "figures" / f"{name}.png").read_bytes()  # it need not be drawn again
        display(Image(picture, format="png", metadata=figure.page_texts))
        self._figures.append(name)

    def write(
        self,
        *,
        rows: Sequence[Mapping[str, object]],
        headline: Sequence[Mapping[str, object]],
        thresholds: Mapping[str, float | Sequence[float | None] | None] | None = None,
        cover: str | None = None,
        about: Mapping[str, object] | None = None,
        **more: object,
    ) -> Markdown:
        """Write `results.json`, and return a sentence with links.

        Args:
            rows: as for `write_results`.
            headline: as for `write_results`.
            thresholds: as for `write_results`.
            cover: name of the figure that represents the notebook; by default the first one shown.
            about: the provenance; by default that of the loaded backbone and data set.
            more: further entries of the provenance.
        """
        figures = sorted(self._figures, key=lambda name: name != cover)
        parameters = dict(self.parameters)
        if "options" in parameters:
            parameters["options"] = self.options
        write_results(
            self.output_dir, notebook=self.name, parameters=rules.recorded(parameters),
            provenance=about or provenance(self.backbone, self.dataset, **more), thresholds=thresholds or {}, rows=rows,
            figures=figures, headline=headline)
        return Markdown("The main numbers of this page are in [results.json](results.json), the figures as PNG, PDF "
                        "and SVG in `figures`.")
