"""Commands that write reports, compare two, and list all."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import click
from click.core import ParameterSource

from itae_utils.cli.options import LOADING, PathType, dask_option, given, loading_options, store_option, validated
from itae_utils.errors import ItaeError


@click.command()
@click.option("--profile", default="demo", show_default=True, help="A profile's name, or a YAML file.")
@click.option("--backbone", help="Replaces the profile's; `itae backbones` lists them.")
@click.option("--dataset", help="Replaces the profile's; `itae datasets` lists them, imagefolder:PATH is your own.")
@click.option("--only", help="Numbers of the notebooks to run, such as 01,03.")
@click.option("-p", "--parameter", "parameters", type=(str, str), multiple=True, metavar="NAME VALUE",
              help="Set a parameter or an option of the notebooks; may be repeated.")
@click.option("--output", type=PathType(), metavar="FOLDER",
              help="Folder to write; default reports/<profile>-<backbone>-<dataset>.")
@click.option("--force", is_flag=True, help="Also run notebooks that have not changed since they last ran.")
@loading_options(*LOADING)
@store_option
@dask_option
@click.option("--from", "repeated", type=PathType(), metavar="REPORT",
              help="Run a report again, and compare weights and images; default output REPORT-repeated.")
@click.option("--format", metavar="WORD", callback=validated, help="Of figures: screen, or paper.  [default: screen]")
@click.option("--single-file", is_flag=True, help="Also write report.html, all pages in one, to be mailed.")
@click.option("--against", type=PathType(), metavar="REPORT",
              help="Compare with an earlier report; exit status 3 if ACC with ITAE fell by more than its interval.")
@click.option("--dry-run", is_flag=True, help="Only print what would be run, reused and downloaded.")
@click.pass_context
def report(
    context: click.Context, profile: str, backbone: str | None, dataset: str | None, only: str | None,
    parameters: tuple[tuple[str, str], ...], output: Path | None, force: bool, store: str | None, dask: str | None,
    repeated: Path | None, format: str | None, single_file: bool, against: Path | None, dry_run: bool,
    **loading: object,
) -> None:
    """Run the notebooks and write a report.

    Notebooks whose parameters, inputs and code have not changed since they last succeeded are reused. The exit status
    is 1 if a notebook failed; the report is written all the same and names it.
    """
    from itae_utils.report.compare import page_beside
    from itae_utils.report.estimate import dry_run as describe
    from itae_utils.report.parameters import parse_value
    from itae_utils.report.report import plan_report, repeat_report, run_report, unchanged_runs
    from itae_utils.report.single import single_file as write_single

    places = given(store=store, dask=dask, format=format)
    loading = given(**loading)
    _refuse_twice([*given(backbone=backbone, dataset=dataset), *places, *loading, *(name for name, _ in parameters)])
    if repeated:
        fixed = ("profile", "backbone", "dataset", "only", "parameters", "force", "dry_run", *LOADING)
        if any(context.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in fixed):
            raise ItaeError("--from repeats a report as it was: use it only with --output, --store, --dask, --format, "
                            "--single-file and --against")
        written = repeat_report(repeated, output=output, parameters=places, against=against, say=click.echo)
    else:
        numbers = only if only is None else [number and number.zfill(2) for number in map(str.strip, only.split(","))]
        asked = {
            "profile": profile,
            "backbone": backbone,
            "dataset": dataset,
            "only": numbers,
            "parameters": {name: parse_value(text) for name, text in parameters} | loading | places,
        }
        if dry_run:
            plan = plan_report(**asked)
            click.echo("\n".join(describe(plan, () if force else unchanged_runs(plan, output))))
            return
        written = run_report(**asked, output=output, force=force, against=against, say=click.echo)
    for error, (first, *others) in written.failures.items():
        more = f" and {len(others)} more" if others else ""
        click.echo(f"{first.folder}{more}: {error}", err=True)
    click.echo(written.index)
    if single_file:
        whole = write_single(written)
        click.echo(f"{whole}: {whole.stat().st_size / 1e6:.1f} MB")
    if written.failed:
        sys.exit(1)
    if against and (fell := _compare(against, written.folder, page_beside(against, written.folder))):
        click.echo(f"ACC with ITAE fell by more than its interval: {', '.join(fell)}")
        sys.exit(3)


@click.command()
@click.argument("before", type=PathType(), metavar="REPORT")
@click.argument("after", type=PathType(), metavar="REPORT")
@click.option("--output", type=PathType(), metavar="FILE", default="comparison.html", show_default=True,
              help="The page to write; it holds the figures of both.")
def compare(before: Path, after: Path, output: Path) -> None:
    """Write a page on all that differs between two reports: settings, scores with intervals, figures."""
    _compare(before, after, output)


@click.command()
@click.argument("folder", type=PathType(), default="reports")
def reports(folder: Path) -> None:
    """Write FOLDER/index.html, a list of the reports in FOLDER; each is compared with the one before of its kind."""
    from itae_utils.report.compare import page_beside
    from itae_utils.report.overview import is_newer, list_reports, overview_page, previous_of

    entries, left_out = list_reports(folder)
    for entry in entries:
        if before := previous_of(entry, entries):
            pair = before.report.folder, entry.report.folder
            if not is_newer(page_beside(*pair), *pair):
                _compare(*pair, page_beside(*pair))
    click.echo(overview_page(folder, entries, left_out))


def _compare(before: Path, after: Path, output: Path) -> list[str]:
    """Write the page, print the scores, and return the runs in which ACC with ITAE fell by more than its interval."""
    from itae_utils.analysis.two_runs import compare_clusters, runs_that_fell
    from itae_utils.report.compare import compare_page, read_pair

    if output.suffix != ".html":
        raise ItaeError(f"--output {str(output)!r} must end in .html")
    pair = read_pair(before, after)
    scores, notes = compare_clusters(pair.clusters)
    compare_page(pair, scores, notes, output)
    lines = [f"{row['run']}, {row['variant']}: {row['score']} {row['before']:.3f} → {row['after']:.3f}, {row['words']}"
             for row in scores if row["score"] == "ACC"]
    click.echo("\n".join([*lines, *notes, f"{output} written"]))
    return runs_that_fell(scores)


def _refuse_twice(names: Iterable[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise ItaeError(f"{name} is given {times} times: give it once")
