"""Run the notebooks and write a report: a page per notebook, and an index with the settings and the main results."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from itae_utils.data.datasets import download
from itae_utils.data.folders import image_folder
from itae_utils.errors import ItaeError
from itae_utils.extraction.workers import cluster_address
from itae_utils.files import make_folder, write_json
from itae_utils.models.device import resolve_device
from itae_utils.models.hub import published_weights
from itae_utils.models.registry import timm_name_of
from itae_utils.report.compare import page_beside, read_report
from itae_utils.report.freshness import MARK, current_state, find_unchanged, leave_mark
from itae_utils.report.kernel import Kernels, execute
from itae_utils.report.pages import index_page, notebook_page
from itae_utils.report.parameters import notebooks_folder
from itae_utils.report.plan import Plan, Step, make_plan, short_hash, short_name
from itae_utils.report.rules import check_encoding
from itae_utils.report.runs import Report, Run, differences, make_record, plan_again, read_record
from itae_utils.results import add_seconds, read_results

LOCK = ".itae-lock"


def run_report(
    *,
    profile: str = "demo",
    backbone: str | None = None,
    dataset: str | None = None,
    only: Sequence[str] | None = None,
    parameters: Mapping[str, object] | None = None,
    output: str | Path | None = None,
    force: bool = False,
    against: Path | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Run the notebooks with papermill and write `output/index.html`.

    An existing report in `output` is replaced; a notebook whose parameters, inputs and code have not changed since it
    last succeeded there is reused. If a notebook fails, its page shows how far it came, the others still run, and the
    index names it. The index is written last, in one step. If the profile has a grid, the notebooks run for each of its
    pairings into `output/<backbone>-<dataset>`; notebooks that collect results run once, over everything in `output`.

    Args:
        profile: a name among `notebooks/profiles`, or a YAML file of that kind.
        backbone: replaces the profile's, or all backbones of its grid.
        dataset: replaces the profile's, or all data sets of its grid.
        only: numbers of the notebooks to run, such as ["01", "03"]; None runs all, but those that collect results only
            if there is a grid or a `results_dir`.
        parameters: parameters and options by name; they take precedence over the profile's and the notebooks'.
        output: folder to write; default `reports/<profile>-<backbone>-<dataset>` below the working directory, for a
            grid `reports/<profile>` followed by the values that replace its lists. If there is a report of another
            folder with the same last name, a hash of the path follows.
        force: also run notebooks that have not changed.
        against: an earlier report that is to be compared with this one; it must be readable and is not overwritten.
        say: receives a line when a notebook starts and ends, or is reused.

    Raises:
        ItaeError: unknown names or invalid values, before anything is run or written; an output folder that can't be
            written or that another report is being written to.
    """
    plan = plan_report(profile=profile, backbone=backbone, dataset=dataset, only=only, parameters=parameters)
    return _write_report(plan, output_folder(plan, output), force, against, say)


def plan_report(
    *,
    profile: str = "demo",
    backbone: str | None = None,
    dataset: str | None = None,
    only: Sequence[str] | None = None,
    parameters: Mapping[str, object] | None = None,
) -> Plan:
    """Return what `run_report` would run; nothing is run or written."""
    given = {name: value for name, value in (("backbone", backbone), ("dataset", dataset)) if value is not None}
    return make_plan(notebooks_folder(), profile, only, given | dict(parameters or {}))


def unchanged_runs(plan: Plan, output: str | Path | None = None) -> set[str]:
    """Return the folders of the steps that `run_report` would reuse from an earlier report in `output`."""
    output = output_folder(plan, output)
    return set(find_unchanged([_placed(step, output) for step in plan.steps]))


def repeat_report(
    folder: str | Path, *, output: str | Path | None = None, parameters: Mapping[str, object] | None = None,
    against: Path | None = None, say: Callable[[str], None] = print,
) -> Report:
    """Run a report again from its record, and report weights or images that have changed since.

    Args:
        folder: of a report.
        output: folder to write; default `<folder>-repeated`.
        parameters: parameters and options by name that replace the record's.
        against: as for `run_report`.
        say: receives a line when a notebook starts and ends, and a line for each difference.

    Raises:
        ItaeError: `folder` has no record, or one of another schema; a notebook or parameter does not exist any more.
    """
    folder = Path(folder).expanduser().resolve()
    record = read_record(folder)
    plan = plan_again(record, notebooks_folder(), parameters or {})
    report = _write_report(plan, output_folder(plan, output or f"{folder}-repeated"), True, against, say)
    for line in differences(record, make_record(report)):
        say(line)
    return report


def output_folder(plan: Plan, output: str | Path | None) -> Path:
    """Return the folder that a report is written to."""
    if output:
        return Path(output).expanduser().resolve()
    folder = (Path("reports") / plan.name).resolve()
    others = _datasets_of(folder) - plan.datasets
    if {short_name(name) for name in others} & {short_name(name) for name in plan.datasets}:
        return folder.with_name(f"{folder.name}-{short_hash(*sorted(plan.datasets))}")
    return folder


def _datasets_of(folder: Path) -> set[str]:
    """Return the names of the data sets of the report in a folder, from its record or those of its complete runs."""
    names = set()
    for path in (folder / "report.json", *folder.glob("*/run.json"), *folder.glob("*/*/run.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            runs = content.get("notebooks", [content])
            names |= {run["parameters"]["dataset"] for run in runs if "dataset" in run["parameters"]}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # none, or damaged
    return names


def _write_report(plan: Plan, output: Path, force: bool, against: Path | None, say: Callable[[str], None]) -> Report:
    check_encoding("output", str(output))
    if against is not None:  # an error now, not after hours
        read_report(against)
        if against.resolve() == output:
            raise ItaeError(f"--against {str(against)!r} is the folder that would be written: give another --output")
    if any(step.given.get("results_dir") == str(output) for step in plan.steps):
        raise ItaeError(f"output={str(output)!r} is the report whose results are collected: name another --output")
    folders = [folder.resolve() for name in plan.datasets if (folder := image_folder(name))]
    if output in folders:
        raise ItaeError(f"output={str(output)!r} is the folder of the images: name a folder in it, or elsewhere")
    steps = [_placed(step, output) for step in plan.steps]
    for device in dict.fromkeys(step.setting("device") for step in steps):
        resolve_device(device or "auto")
    with ExitStack() as stack:
        clusters = {key: stack.enter_context(cluster_address(*key)) for key in dict.fromkeys(map(_cluster, steps))
                    if key is not None}
        make_folder(output, mark=not any(folder.is_relative_to(output) for folder in folders))
        stack.enter_context(_only_writer(output, steps))
        if (before := _datasets_of(output)) and not before & plan.datasets:
            say(f"{output}: replaces the report of {', '.join(sorted(before))}")
        unchanged = {} if force else find_unchanged(steps)
        to_run = [step for step in steps if step.folder not in unchanged]
        _remove_old(output, to_run)
        runs, missing = [], _missing_inputs()
        kernels = stack.enter_context(Kernels(notebooks_folder(), len(to_run)))
        for step in steps:
            if step.folder in unchanged:
                run = _reuse(step, unchanged[step.folder]["seconds"], say)
            elif error := missing(step):
                run = _skip(step, error, say)
            else:
                run = _run(step, kernels, clusters.get(_cluster(step)), say)
            notebook_page(run, [other.notebook for other in steps if other.pairing == step.pairing], output)
            runs.append(run)
        report = Report(output, plan.profile, plan.description, tuple(runs), plan.grid)
        write_json(output / "report.json", make_record(report))
        index_page(report, page_beside(against, output).name if against and not report.failed else None)
    return report


@contextmanager
def _only_writer(output: Path, steps: Sequence[Step]) -> Iterator[None]:
    """Lock a folder: two reports that write to it at once would delete each other's runs.

    Raises:
        ItaeError: another process holds the lock of this folder, of one above it, or of one that a step writes to; or
            the folder can't be written.
    """
    near = {*output.parents, *(output / name for step in steps for name in (step.pairing, step.folder))} - {output}
    try:
        with FileLock(output / LOCK, timeout=0):
            for folder in near:
                if os.access(folder / LOCK, os.W_OK):  # so it exists
                    with FileLock(folder / LOCK, timeout=0):
                        pass
            yield
    except Timeout as error:
        raise ItaeError(f"output={str(output)!r}: another report is being written there: wait for it, or name another "
                        "--output") from error
    except PermissionError as error:
        raise ItaeError(f"output={str(output)!r} can't be written ({error.strerror}): name another --output") from error


def _missing_inputs() -> Callable[[Step], str | None]:
    """Return a function that downloads what a step needs, and returns the error of what can't be had.

    This is done before any kernel starts, once for each backbone and data set.
    """
    @cache
    def error_of(fetch: Callable[..., object], name: str, **options: object) -> str | None:
        try:
            fetch(name, **options)
        except (ItaeError, OSError) as error:
            return str(error)
        return None

    def missing(step: Step) -> str | None:
        backbone, dataset = step.setting("backbone"), step.setting("dataset")
        weights = None if step.setting("checkpoint") or backbone is None else timm_name_of(backbone)
        return ((weights and error_of(published_weights, weights))
                or next(filter(None, (dataset and error_of(download, dataset, **part) for part in step.parts)), None))

    return missing


def _placed(step: Step, output: Path) -> Step:
    """Return the step with the folder it writes to, and the one it collects from unless that is given."""
    source = {"results_dir": str(output)} if step.notebook.collects else {}
    return replace(step, given=source | step.given | {"output_dir": str(output / step.folder)})


def _cluster(step: Step) -> tuple[str, str | None] | None:
    """Return the Dask cluster that a step names, with the store its workers need; None for no cluster."""
    where = step.setting("dask")
    return None if where in (None, "auto") else (where, step.setting("store"))


def _remove_old(output: Path, steps: Sequence[Step]) -> None:
    """Delete the earlier report's files, except for runs that are reused.

    Raises:
        ItaeError: one of them can't be deleted.
    """
    try:
        for name in ("index.html", "report.json", *(f"{step.folder}/{MARK}" for step in steps)):
            (output / name).unlink(missing_ok=True)
        for folder in (output / step.folder for step in steps):
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)
    except OSError as error:
        raise ItaeError(f"{error.filename} can't be removed ({error.strerror}): name another --output") from error


def _reuse(step: Step, seconds: float, say: Callable[[str], None]) -> Run:
    say(f"{step.folder} unchanged, reused (took {seconds:.1f} s)")
    results = read_results(Path(step.given["output_dir"]) / "results.json")
    return Run(step.notebook, step.parameters, seconds, None, results, step.pairing, reused=True)


def _skip(step: Step, error: str, say: Callable[[str], None]) -> Run:
    """Return a failed run of a notebook whose weights or images are missing; its page shows it as it is."""
    say(f"{step.folder} not run, its weights or images are missing")
    shutil.copyfile(step.notebook.path, make_folder(step.given["output_dir"], mark=True) / step.notebook.path.name)
    return Run(step.notebook, step.parameters, 0.0, error, None, step.pairing)


def _run(step: Step, kernels: Kernels, cluster: str | None, say: Callable[[str], None]) -> Run:
    """Execute one notebook; everything that it writes goes to its folder."""
    say(f"{step.folder} …")
    notebook, folder = step.notebook, make_folder(step.given["output_dir"], mark=True)
    before = current_state(step)
    given = step.given if cluster is None else step.given | {"options": step.given["options"] | {"dask": cluster}}
    start, results = time.perf_counter(), None
    error = execute(notebook.path, folder / notebook.path.name, given, kernels)
    seconds = time.perf_counter() - start
    if (folder / "results.json").exists() or error is None:
        try:
            results = add_seconds(folder / "results.json", seconds)
        except ItaeError as failure:
            error = error or str(failure)
    say(f"{step.folder} {'failed after' if error else 'took'} {seconds:.1f} s")
    if error is None:
        leave_mark(step, before, seconds)
    return Run(notebook, step.parameters, seconds, error, results, step.pairing)
