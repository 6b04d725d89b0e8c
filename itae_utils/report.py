"""Run the notebooks and leave a report: a page for each, and an index that says what was run and what came out."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from itae_utils.errors import ItaeError, unknown_name
from itae_utils.parameters import Notebook, find_notebooks, read_profile, resolve, select
from itae_utils.results import add_seconds, make_folder, write_json


@dataclass(frozen=True)
class Run:
    """One notebook's run.

    Attributes:
        notebook: what was run.
        parameters: what it ran with, defaults included.
        seconds: how long it took.
        error: what stopped it, in one line; None where it ran through.
        results: what it measured; None where it didn't get there.
    """

    notebook: Notebook
    parameters: dict[str, object]
    seconds: float
    error: str | None
    results: dict | None


@dataclass(frozen=True)
class Report:
    """A written report: its folder, and the runs in it in reading order."""

    folder: Path
    profile: str
    description: str
    runs: tuple[Run, ...]

    @property
    def index(self) -> Path:
        """The page to open."""
        return self.folder / "index.html"

    @property
    def failed(self) -> tuple[Run, ...]:
        """Runs that did not go through."""
        return tuple(run for run in self.runs if run.error)


def run_report(
    *,
    profile: str = "demo",
    backbone: str | None = None,
    dataset: str | None = None,
    only: Sequence[str] | None = None,
    parameters: Mapping[str, object] | None = None,
    output: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Run the notebooks with papermill and write `output/index.html`, last of all and in one step.

    A notebook that fails leaves what it had done, the others still run, and the index says so.

    Args:
        profile: a name among `notebooks/profiles`, or a YAML file of that kind.
        backbone: instead of the profile's.
        dataset: instead of the profile's.
        only: numbers of the notebooks to run, such as ["01", "03"]; None for all.
        parameters: instead of the notebooks' and the profile's, by name.
        output: folder to write; default `reports/<profile>-<backbone>-<dataset>` below the working directory. A report
            that is there already is replaced.
        say: gets a line when a notebook starts and ends.

    Raises:
        ItaeError: unknown names or mistyped values, before anything is run or written; an output folder that can't be
            made.
    """
    folder = notebooks_folder()
    notebooks = find_notebooks(folder)
    selected = select(notebooks, only)
    settings = read_profile(profile, folder / "profiles")
    given = {name: value for name, value in (("backbone", backbone), ("dataset", dataset)) if value is not None}
    told = resolve(notebooks, selected, settings, given | dict(parameters or {}))
    complete = {notebook.key: notebook.defaults | told[notebook.key] for notebook in selected}
    _check_names(complete.values())
    output = make_folder(output or _default_output(settings.name, complete[selected[0].key])).resolve()
    _remove_old(output, selected)

    from itae_utils.pages import index_page, notebook_page

    runs = []
    with _kernel_of_this_python():
        for notebook in selected:
            say(f"{notebook.name} …")
            run = _run(notebook, told[notebook.key], output / notebook.name)
            notebook_page(run, selected, output)
            say(f"{notebook.name} {'failed after' if run.error else 'took'} {run.seconds:.1f} s")
            runs.append(run)
    report = Report(output, settings.name, settings.description, tuple(runs))
    write_json(output / "report.json", _manifest(report))
    index_page(report)
    return report


def notebooks_folder() -> Path:
    """The notebooks: inside the package where it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "_notebooks"
    return installed if installed.is_dir() else package.parent / "notebooks"


def _check_names(parameter_sets: Sequence[Mapping[str, object]]) -> None:
    """Refuse a backbone or data set that no notebook could load, before several of them fail on it."""
    from itae_utils.backbones import BACKBONES
    from itae_utils.datasets import DATASETS

    for dataset in {parameters["dataset"] for parameters in parameter_sets if "dataset" in parameters}:
        kind, _, path = dataset.partition(":")
        if kind == "imagefolder" and path:
            if not Path(path).is_dir():
                raise ItaeError(f"data set {dataset!r}: there is no such folder")
        elif dataset not in DATASETS:
            raise unknown_name("data set", dataset, DATASETS, "`itae datasets`")
    for backbone in {parameters["backbone"] for parameters in parameter_sets if "backbone" in parameters}:
        if backbone not in BACKBONES:
            import timm

            if not timm.is_model(backbone):
                raise unknown_name("backbone", backbone, [*BACKBONES, *timm.list_models("vit*")], "`itae backbones`")


def _default_output(profile: str, parameters: Mapping[str, object]) -> Path:
    dataset = str(parameters["dataset"])
    if dataset.startswith("imagefolder:"):
        dataset = f"imagefolder-{Path(dataset.partition(':')[2]).name}"
    return Path("reports") / re.sub(r"[^\w.-]+", "-", f"{profile}-{parameters['backbone']}-{dataset}")


def _remove_old(output: Path, selected: Sequence[Notebook]) -> None:
    """Nothing of an earlier report may be taken for a part of this one."""
    for name in ("index.html", "report.json"):
        (output / name).unlink(missing_ok=True)
    for notebook in selected:
        shutil.rmtree(output / notebook.name, ignore_errors=True)


def _run(notebook: Notebook, told: Mapping[str, object], folder: Path) -> Run:
    """Execute one notebook into `folder`.

    The kernel works in the notebooks' folder, so that what is relative in a notebook means here what it means in
    JupyterLab; all that the notebook writes goes to `output_dir`.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    make_folder(folder)
    told = {**told, "output_dir": str(folder)}
    start, error, results = time.perf_counter(), None, None
    try:
        papermill.execute_notebook(
            notebook.path, folder / notebook.path.name, told,
            kernel_name="python3", cwd=notebook.path.parent, progress_bar=False, log_output=False,
        )
    except papermill.PapermillExecutionError as failure:
        error = f"{_one_line(f'{failure.ename}: {failure.evalue}')} (cell [{failure.exec_count}])"
    except DeadKernelError as failure:
        error = f"the kernel died: {_one_line(str(failure))}"
    seconds = time.perf_counter() - start
    if (folder / "results.json").exists() or error is None:
        try:
            results = add_seconds(folder / "results.json", seconds)
        except ItaeError as failure:
            error = error or str(failure)
    return Run(notebook, notebook.defaults | told, seconds, error, results)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:299] + "…"


@contextmanager
def _kernel_of_this_python() -> Iterator[None]:
    """While open, the kernel `python3` is this interpreter, whatever kernels are installed for the user or the system.

    Its progress bars are off, and figures are drawn inline even where the environment asks for another backend.
    """
    from ipykernel.kernelspec import write_kernel_spec

    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of parameters it fails to see; ours are checked
    before = os.environ.get("JUPYTER_PATH")
    environment = {"ITAE_PROGRESS": "0", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    with tempfile.TemporaryDirectory() as folder:
        write_kernel_spec(
            Path(folder, "kernels", "python3"), {"env": environment}, extra_arguments=["--log-level=CRITICAL"])
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [folder, before]))
        try:
            yield
        finally:
            os.environ.pop("JUPYTER_PATH")
            if before is not None:
                os.environ["JUPYTER_PATH"] = before


def _manifest(report: Report) -> dict:
    return {
        "schema": 1,
        "profile": report.profile,
        "seconds": round(sum(run.seconds for run in report.runs), 1),
        "notebooks": [
            {
                "notebook": run.notebook.name,
                "page": f"{run.notebook.name}/{run.notebook.name}.html",
                "results": f"{run.notebook.name}/results.json" if run.results else None,
                "seconds": round(run.seconds, 1),
                "error": run.error,
                "parameters": run.parameters,
            }
            for run in report.runs
        ],
    }
