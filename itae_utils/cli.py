"""The `itae` command."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import click
from click.core import ParameterSource

from itae_utils.errors import ItaeError


class Failure(click.ClickException):
    """One line on stderr, and an exit status."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turns bad input into one line and exit status 2, Ctrl-C into one and 130, a disk that fails into one and 1."""
    try:
        yield
    except getattr(click.exceptions, "NoArgsIsHelpError", ()):
        raise
    except click.UsageError as error:
        see = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        raise Failure(" ".join(error.format_message().split()) + see, 2) from error
    except ItaeError as error:
        raise Failure(" ".join(str(error).split()), 2) from error
    except OSError as error:
        if error.errno == errno.EPIPE:  # nobody reads on: click's to handle
            raise
        told = f"{error.filename}: {error.strerror}" if error.filename else str(error) or type(error).__name__
        raise Failure(" ".join(told.split()), 1) from error
    except KeyboardInterrupt as interrupt:
        raise Failure("interrupted", 130) from interrupt


class Group(click.Group):
    """Says whatever goes wrong in one line."""

    def make_context(self, *arguments: object, **options: object) -> click.Context:
        """Read the options before a command's name."""
        with in_one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context) -> object:
        """Run a command."""
        with in_one_line():
            return super().invoke(context)


FEATURE_FORMATS = (".npz", ".parquet")


def _threshold(_context: click.Context, _option: click.Parameter, value: str | None) -> float | str | None:
    if value in (None, "auto"):
        return value
    try:
        return float(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a number nor auto") from error


def _folder(_context: click.Context, _option: click.Parameter, value: str | None) -> Path | None:
    if value is not None and (not value or "\0" in value):
        raise click.BadParameter(f"{value!r} is no folder")
    return None if value is None else Path(value)


def _use_store(_context: click.Context, _option: click.Parameter, place: str | None) -> None:
    """Notebooks run in processes of their own: what is chosen reaches them by the environment."""
    if place is not None:
        from itae_utils.store.store import open_store

        store = open_store(place)
        if store is not None:
            _ = store.zarr  # a URL that nothing opens is told now
        os.environ["ITAE_STORE"] = "none" if store is None else store.place


store_option = click.option(
    "--store", metavar="PLACE", expose_value=False, callback=_use_store,
    help="Where features are kept: a folder, an fsspec URL such as s3://bucket/name, or none.  "
         "[default: ITAE_STORE, else a folder in the user's cache]")
dask_option = click.option(
    "--dask", metavar="WHERE",
    help="Extract on Dask workers: tcp://… is a cluster's address, local:N makes N processes here.")
backbone_option = click.option("--backbone", default="demo", show_default=True, help="`itae backbones` lists them.")
source_option = click.option(
    "--source", type=click.Choice(["query", "key", "value"]), default="key", show_default=True,
    help="Whose norms tell the artifacts.")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="itae-utils", prog_name="itae")
def main() -> None:
    """See, attenuate and measure attention artifacts of Vision Transformers."""


@main.command()
@click.option("--profile", default="demo", show_default=True, help="A profile's name, or a YAML file.")
@click.option("--backbone", help="Instead of the profile's; `itae backbones` lists them.")
@click.option("--dataset", help="Instead of the profile's; `itae datasets` lists them, imagefolder:PATH is your own.")
@click.option("--only", help="Numbers of the notebooks to run, such as 01,03.")
@click.option("-p", "--parameter", "parameters", type=(str, str), multiple=True, metavar="NAME VALUE",
              help="Set a parameter of the notebooks; may be repeated.")
@click.option("--output", callback=_folder, metavar="FOLDER",
              help="Where to write; default reports/<profile>-<backbone>-<dataset>.")
@click.option("--force", is_flag=True,
              help="Run all notebooks, those too that ran before in this folder and would not come out otherwise now.")
@store_option
@dask_option
@click.option("--from", "repeated", type=click.Path(path_type=Path), metavar="REPORT",
              help="Run again what this report ran, and compare weights and images; default output REPORT-repeated.")
@click.option("--dry-run", is_flag=True, help="Say what would be run, kept and downloaded, with its disk and time.")
@click.pass_context
def report(
    context: click.Context, profile: str, backbone: str | None, dataset: str | None, only: str | None,
    parameters: tuple[tuple[str, str], ...], output: Path | None, force: bool, dask: str | None, repeated: Path | None,
    dry_run: bool,
) -> None:
    """Run the notebooks and write a report.

    Notebooks whose parameters, inputs and code are what they were when they last ran through are kept as they are.
    Exit status 1 when a notebook failed; the report is written all the same and says so.
    """
    from itae_utils.report.parameters import parse_value
    from itae_utils.report.report import kept_runs, plan_report, repeat_report, run_report

    by_option = {"backbone": backbone, "dataset": dataset}
    _refuse_twice([*(name for name in by_option if by_option[name] is not None), *(name for name, _ in parameters)])
    if repeated:
        given = [name for name in ("profile", "backbone", "dataset", "only", "parameters", "force", "dry_run")
                 if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given:
            raise ItaeError("--from runs a report again as it was: give nothing beside it but --output")
        with _cluster(dask):
            written = repeat_report(repeated, output=output, say=click.echo)
    else:
        asked = {
            "profile": profile,
            "backbone": backbone,
            "dataset": dataset,
            "only": [number.strip().zfill(2) for number in only.split(",")] if only is not None else None,
            "parameters": {name: parse_value(text) for name, text in parameters},
        }
        if dry_run:
            from itae_utils.report.estimate import dry_run as describe

            plan = plan_report(**asked)
            click.echo("\n".join(describe(plan, () if force else kept_runs(plan, output))))
            return
        with _cluster(dask):
            written = run_report(**asked, output=output, force=force, say=click.echo)
    for error, (first, *others) in written.failures.items():
        more = f" and {len(others)} more" if others else ""
        click.echo(f"{first.folder}{more}: {error}", err=True)
    click.echo(written.index)
    sys.exit(1 if written.failed else 0)


def _refuse_twice(names: Iterable[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise ItaeError(f"{name} is given {times} times: give it once")


def _cluster(dask: str | None) -> AbstractContextManager:
    """While open, notebooks find the Dask cluster that was asked for, if any."""
    if dask is None:
        return nullcontext()
    from itae_utils.extraction.workers import in_environment

    return in_environment(dask)


@main.command()
@store_option
@dask_option
@backbone_option
@click.option("--dataset", default="digits", show_default=True, help="`itae datasets` lists them; or imagefolder:PATH.")
@click.option("--limit", type=click.IntRange(min=1), help="A stratified sample of so many images.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Images at a time; default: chosen by the device.")
@click.option("--threshold", default="auto", show_default=True, callback=_threshold, help="A number, or auto.")
@source_option
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A .npz or .parquet file.")
def extract(
    dask: str | None, backbone: str, dataset: str, limit: int | None, batch_size: int | None, threshold: float | str,
    source: str, output: Path,
) -> None:
    """Write a data set's features to a file.

    Both as the model gives them (baseline) and with ITAE (itae), and the labels (targets) where there are any.
    """
    import itae_utils as itae
    from itae_utils.files import make_folder

    if output.suffix not in FEATURE_FORMATS:
        raise ItaeError(f"--output {str(output)!r} must end in {' or '.join(FEATURE_FORMATS)}")
    if output.is_dir():
        raise ItaeError(f"--output {str(output)!r} is a folder: name a file")
    variants = {"baseline": None, "itae": itae.ITAE(source=source, threshold=threshold)}
    images, model = itae.load_dataset(dataset, limit=limit), itae.load_backbone(backbone)
    with _cluster(dask):
        make_folder(output.parent)
        features = itae.extract_features(model, images, variants, batch_size=batch_size or "auto")
    about = {
        **features.settings, "weights_sha256": model.weights_sha256, "dataset": images.name, "split": images.split,
        "classes": images.classes and list(images.classes), "source": source, "thresholds": {**features.thresholds},
    }
    _save_features(output, {**features}, features.targets, about)
    click.echo(f"{output}: {len(images)} images, {' and '.join(features)}")


def _save_features(path: Path, arrays: dict, targets: object, about: dict) -> None:
    """Features by variant, labels as `targets` where there are any, and what they were made with as JSON, `about`."""
    import numpy as np

    from itae_utils.files import replacing

    labels = {} if targets is None else {"targets": np.asarray(targets)}
    with replacing(path) as part, part.open("wb") as file:
        if path.suffix == ".npz":
            np.savez(file, about=json.dumps(about), **arrays, **labels)
        else:
            import pyarrow
            from pyarrow import parquet

            columns = {
                name: pyarrow.FixedSizeListArray.from_arrays(array.ravel(), array.shape[1])
                for name, array in arrays.items()
            }
            table = pyarrow.table({**columns, **labels}, metadata={"about": json.dumps(about)})
            parquet.write_table(table, file)


@main.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@backbone_option
@click.option("--threshold", callback=_threshold, help="A number; default: found from all the given images together.")
@source_option
@click.option("--output", type=click.Path(path_type=Path), default="inspection.png", show_default=True,
              help="The figure; its ending says the format.")
def inspect(images: tuple[Path, ...], backbone: str, threshold: float | str | None, source: str, output: Path) -> None:
    """Draw norms, attention and artifacts of images."""
    from itae_utils import figures
    from itae_utils.analysis.inspection import inspect_images

    figures.check_figure_path(output)
    found = inspect_images(images, backbone=backbone, source=source, threshold=threshold)
    figures.save_as(figures.inspection(found.looks, found.source, found.block, found.threshold), output)
    click.echo("\n".join([*found.lines, f"{output} written"]))


@main.group()
def store() -> None:
    """See what features are kept, and make room."""


@store.command("list")
@store_option
def list_store() -> None:
    """List what the feature store holds and its size, the longest unused first."""
    from itae_utils.store.housekeeping import format_size, holdings, table
    from itae_utils.store.store import store_in_use

    place = store_in_use()
    found = holdings(place)
    if found:
        _echo_table(*table(found))
    click.echo(f"{place.place}: {format_size(sum(holding.size for holding in found))}")


@store.command()
@store_option
@click.option("--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Remove what wasn't used for so long.")
@click.option("--max-size", metavar="SIZE", help="Remove the longest unused until the rest fits, such as 20GB.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def prune(older_than: float | None, max_size: str | None, dry_run: bool) -> None:
    """Remove kept features by age or size; they are computed again when needed. Not while a run uses the store."""
    from itae_utils.store.housekeeping import format_size, holdings, parse_size, prune, table
    from itae_utils.store.store import store_in_use

    if older_than is None and max_size is None:
        raise ItaeError("say what to remove: --older-than DAYS, --max-size SIZE, or both")
    most, place = None if max_size is None else parse_size(max_size), store_in_use()
    gone = prune(place, older_than=None if older_than is None else 86400 * older_than, max_size=most, dry_run=dry_run)
    if gone:
        _echo_table(*table(gone))
    verb = "would be removed from" if dry_run else "removed from"
    click.echo(f"{format_size(sum(holding.size for holding in gone))} {verb} {place.place}, "
               f"{format_size(sum(holding.size for holding in holdings(place)))} {'are there' if dry_run else 'stay'}")


@main.command()
def backbones() -> None:
    """List backbones with size and origin."""
    from itae_utils.models.registry import BACKBONES

    _echo_table(
        ["name", "parameters", "patch", "image", "download", "origin"],
        [[name, f"{entry.parameters:g} M", f"{entry.patch}", f"{entry.image_size}", _megabytes(entry.size_mb),
          entry.origin] for name, entry in BACKBONES.items()])
    click.echo("Any other timm ViT with a [CLS] token can be given by its timm name.")


@main.command()
def datasets() -> None:
    """List data sets with size and origin."""
    from itae_utils.data.datasets import DATASETS

    _echo_table(
        ["name", "images", "classes", "split", "download", "origin"],
        [[name, _count(entry.images), _count(entry.classes), entry.split, _megabytes(entry.megabytes), entry.origin]
         for name, entry in DATASETS.items()])


def _megabytes(size: float) -> str:
    return f"{size:,.0f} MB" if size else "–"


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _echo_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
