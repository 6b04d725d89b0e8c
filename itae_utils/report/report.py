"""Run the notebooks and leave a report: a page for each, and an index that says what was run and what came out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from itae_utils.errors import ItaeError
from itae_utils.files import PACKAGE, make_folder, write_json
from itae_utils.report.freshness import MARK, find_kept, leave_mark, look
from itae_utils.report.kernel import execute, kernel_of_this_python
from itae_utils.report.pages import index_page, notebook_page
from itae_utils.report.parameters import check_text
from itae_utils.report.plan import Plan, Step, make_plan
from itae_utils.report.runs import Report, Run, differences, make_record, plan_again, read_record
from itae_utils.results import add_seconds, read_results


def run_report(
    *,
    profile: str = "demo",
    backbone: str | None = None,
    dataset: str | None = None,
    only: Sequence[str] | None = None,
    parameters: Mapping[str, object] | None = None,
    output: str | Path | None = None,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> Report:
    """Run the notebooks with papermill and write `output/index.html`, last of all and in one step.

    A notebook that ran through in `output` before is not run again where its parameters, its inputs and the code are
    what they were. One that fails leaves what it had done, the others still run, and the index says so. Where the
    profile has a grid, the notebooks run for each of its cells into `output/<backbone>-<dataset>`, and those that
    collect results once over everything in `output`, what earlier runs left in other cells included.

    Args:
        profile: a name among `notebooks/profiles`, or a YAML file of that kind.
        backbone: instead of the profile's; instead of all backbones of its grid.
        dataset: instead of the profile's; instead of all data sets of its grid.
        only: numbers of the notebooks to run, such as ["01", "03"]; None for all, but for those that collect where
            there is neither a grid nor a `results_dir`.
        parameters: instead of the notebooks' and the profile's, by name.
        output: folder to write; default `reports/<profile>-<backbone>-<dataset>` below the working directory, of a grid
            `reports/<profile>` and what was given instead of its lists. A report that is there already is replaced.
        force: run what is unchanged too.
        say: gets a line when a notebook starts and ends, or is kept.

    Raises:
        ItaeError: unknown names or illegal values, before anything is run or written; an output folder that can't be
            made.
    """
    plan = plan_report(profile=profile, backbone=backbone, dataset=dataset, only=only, parameters=parameters)
    return _write_report(plan, _folder_of(plan, output), force, say)


def plan_report(
    *,
    profile: str = "demo",
    backbone: str | None = None,
    dataset: str | None = None,
    only: Sequence[str] | None = None,
    parameters: Mapping[str, object] | None = None,
) -> Plan:
    """What `run_report` would run; nothing is run or written."""
    given = {name: value for name, value in (("backbone", backbone), ("dataset", dataset)) if value is not None}
    return make_plan(notebooks_folder(), profile, only, given | dict(parameters or {}))


def kept_runs(plan: Plan, output: str | Path | None = None) -> set[str]:
    """Folders of the steps that `run_report` would not run again, for an earlier run of theirs is in `output`."""
    output = _folder_of(plan, output)
    return set(find_kept([_placed(step, output) for step in plan.steps]))


def repeat_report(
    folder: str | Path, *, output: str | Path | None = None, say: Callable[[str], None] = print
) -> Report:
    """Run again what the report in `folder` says it ran, and say where weights or images are no longer the same.

    Args:
        folder: a report.
        output: folder to write; default `<folder>-repeated`.
        say: gets a line when a notebook starts and ends, and a line for each difference.

    Raises:
        ItaeError: there is no record in `folder`, or one of another schema; a notebook or parameter that is no more.
    """
    folder = Path(folder).resolve()
    record = read_record(folder)
    report = _write_report(
        plan_again(record, notebooks_folder()), Path(output or f"{folder}-repeated").resolve(), True, say)
    for line in differences(record, make_record(report)):
        say(line)
    return report


def notebooks_folder() -> Path:
    """The notebooks: inside the package where it was installed from a wheel, beside it in a checkout."""
    installed = PACKAGE / "_notebooks"
    return installed if installed.is_dir() else PACKAGE.parent / "notebooks"


def _folder_of(plan: Plan, output: str | Path | None) -> Path:
    return Path(output or Path("reports") / plan.name).resolve()


def _write_report(plan: Plan, output: Path, force: bool, say: Callable[[str], None]) -> Report:
    check_text("output", str(output))
    if any(step.told.get("results_dir") == str(output) for step in plan.steps):
        raise ItaeError(f"the report in {output} would be replaced by the one that collects it: name another --output")
    make_folder(output)
    steps = [_placed(step, output) for step in plan.steps]
    kept = {} if force else find_kept(steps)
    _remove_old(output, [step for step in steps if step.folder not in kept])

    runs = []
    with kernel_of_this_python() if len(kept) < len(steps) else nullcontext():
        for step in steps:
            run = _keep(step, kept[step.folder]["seconds"], say) if step.folder in kept else _run(step, say)
            notebook_page(run, [other.notebook for other in steps if other.cell == step.cell], output)
            runs.append(run)
    report = Report(output, plan.profile, plan.description, tuple(runs), plan.grid)
    write_json(output / "report.json", make_record(report))
    index_page(report)
    return report


def _placed(step: Step, output: Path) -> Step:
    """The step, told which folder to write to, and to collect from where nothing else was told."""
    source = {"results_dir": str(output)} if step.notebook.collects else {}
    return replace(step, told=source | step.told | {"output_dir": str(output / step.folder)})


def _remove_old(output: Path, steps: Sequence[Step]) -> None:
    """Nothing of an earlier report may be taken for a part of this one, but for the runs that are kept."""
    marks = [f"{step.folder}/{MARK}" for step in steps]
    try:
        for name in ("index.html", "report.json", *marks):
            (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise ItaeError(f"{output / name} can't be removed ({error.strerror}): name another --output") from error
    for step in steps:
        shutil.rmtree(output / step.folder, ignore_errors=True)


def _keep(step: Step, seconds: float, say: Callable[[str], None]) -> Run:
    say(f"{step.folder} unchanged, kept (took {seconds:.1f} s)")
    results = read_results(Path(step.told["output_dir"]) / "results.json")
    return Run(step.notebook, step.parameters, seconds, None, results, step.cell, kept=True)


def _run(step: Step, say: Callable[[str], None]) -> Run:
    """Execute one notebook; all that it writes goes to its folder."""
    say(f"{step.folder} …")
    notebook, folder = step.notebook, make_folder(step.told["output_dir"])
    (before,) = look([step])
    start, results = time.perf_counter(), None
    error = execute(notebook.path, folder / notebook.path.name, step.told)
    seconds = time.perf_counter() - start
    if (folder / "results.json").exists() or error is None:
        try:
            results = add_seconds(folder / "results.json", seconds)
        except ItaeError as failure:
            error = error or str(failure)
    say(f"{step.folder} {'failed after' if error else 'took'} {seconds:.1f} s")
    if error is None:
        leave_mark(step, before, seconds)
    return Run(notebook, step.parameters, seconds, error, results, step.cell)
