"""The `itae` command."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from click.core import ParameterSource

from itae_utils.errors import ItaeError
from itae_utils.files import make_folder, replacing
from itae_utils.method.setting import SOURCES


class Failure(click.ClickException):
    """One line on stderr, and an exit status."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Report bad input in one line with exit status 2, Ctrl-C with 130, and a failing disk with 1."""
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
        if error.errno == errno.EPIPE:  # the reader has gone; click handles it
            raise
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error) or type(error).__name__
        raise Failure(" ".join(message.split()), 2 if error.errno == errno.ENAMETOOLONG else 1) from error
    except KeyboardInterrupt as interrupt:
        raise Failure("interrupted", 130) from interrupt


class Group(click.Group):
    """A group of commands whose errors are one line."""

    def make_context(self, *arguments: object, **options: object) -> click.Context:
        """Parse the options before a command's name; characters that the terminal lacks will be replaced."""
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")
        with errors_in_one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, context: click.Context) -> object:
        """Run a command."""
        with errors_in_one_line():
            return super().invoke(context)


FEATURE_FORMATS = (".npz", ".parquet")


class PathType(click.ParamType):
    """The path of a file or folder; ~ is the user's home."""

    name = "path"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        if not str(value) or "\0" in str(value):
            self.fail(f"{value!r} is not a path", param, ctx)
        return Path(os.path.expanduser(value))


PATH = PathType()


def _validated(_context: click.Context, option: click.Parameter, text: str | None) -> object:
    """Read an option's value and validate it by the rules of the notebooks' parameter of that name."""
    if text is None:
        return None
    from itae_utils.report.parameters import parse_value
    from itae_utils.report.rules import check_values

    value = parse_value(text) if option.name in NUMBERS else os.path.expanduser(text)
    check_values({option.name: value})
    return value


NUMBERS = ("limit", "batch_size", "image_size", "threshold")
LOADING = {
    "checkpoint": ("PATH", "A file or folder with weights, instead of a download."),
    "image_size": ("PIXELS", "Side of the images that the model sees; default: the backbone's."),
    "device": ("NAME", "auto, cpu, cuda, cuda:1 or mps.  [default: auto]"),
    "on_error": ("WORD", "skip leaves out images that can't be read, raise stops at the first.  [default: raise]"),
    "preprocess": ("WORD", "How images become squares: resize, meta-eval or pad.  [default: resize]"),
    "split": ("NAME", "Part of the data set, such as train; default: its test part, if it has parts."),
    "image_column": ("NAME", "Of a Hugging Face data set; default: found by its type."),
    "label_column": ("NAME", "Of a Hugging Face data set; default: found by its type."),
}


def loading_options(*names: str) -> Callable:
    """Return a decorator that gives a command these options for loading, None if they are not given."""
    def decorate(command: Callable) -> Callable:
        for name in reversed(names):
            (metavar, words), option = LOADING[name], f"--{name.replace('_', '-')}"
            command = click.option(option, metavar=metavar, callback=_validated, help=words)(command)
        return command

    return decorate


store_option = click.option(
    "--store", metavar="PLACE", callback=_validated,
    help="Where features are stored: a folder, an fsspec URL such as s3://bucket/name, or none.  "
         "[default: ITAE_STORE, else a folder in the user's cache]")
dask_option = click.option(
    "--dask", metavar="WHERE", callback=_validated,
    help="Extract on Dask workers: tcp://… is a cluster's address, local:N starts N processes.  [default: ITAE_DASK]")
backbone_option = click.option("--backbone", default="demo", show_default=True, help="`itae backbones` lists them.")
source_option = click.option(
    "--source", type=click.Choice(SOURCES), default="key", show_default=True,
    help="The vector whose norm identifies artifacts.")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="itae-utils", prog_name="itae")
def main() -> None:
    """See, attenuate and measure attention artifacts of Vision Transformers."""


@main.command()
@click.option("--profile", default="demo", show_default=True, help="A profile's name, or a YAML file.")
@click.option("--backbone", help="Replaces the profile's; `itae backbones` lists them.")
@click.option("--dataset", help="Replaces the profile's; `itae datasets` lists them, imagefolder:PATH is your own.")
@click.option("--only", help="Numbers of the notebooks to run, such as 01,03.")
@click.option("-p", "--parameter", "parameters", type=(str, str), multiple=True, metavar="NAME VALUE",
              help="Set a parameter or an option of the notebooks; may be repeated.")
@click.option("--output", type=PATH, metavar="FOLDER",
              help="Folder to write; default reports/<profile>-<backbone>-<dataset>.")
@click.option("--force", is_flag=True, help="Also run notebooks that have not changed since they last ran.")
@loading_options(*LOADING)
@store_option
@dask_option
@click.option("--from", "repeated", type=PATH, metavar="REPORT",
              help="Run a report again, and compare weights and images; default output REPORT-repeated.")
@click.option("--dry-run", is_flag=True, help="Only print what would be run, reused and downloaded.")
@click.pass_context
def report(
    context: click.Context, profile: str, backbone: str | None, dataset: str | None, only: str | None,
    parameters: tuple[tuple[str, str], ...], output: Path | None, force: bool, store: str | None, dask: str | None,
    repeated: Path | None, dry_run: bool, **loading: object,
) -> None:
    """Run the notebooks and write a report.

    Notebooks whose parameters, inputs and code have not changed since they last succeeded are reused. The exit status
    is 1 if a notebook failed; the report is written all the same and names it.
    """
    from itae_utils.report.estimate import dry_run as describe
    from itae_utils.report.parameters import parse_value
    from itae_utils.report.report import plan_report, repeat_report, run_report, unchanged_runs

    places = _given(store=store, dask=dask)
    loading = _given(**loading)
    _refuse_twice([*_given(backbone=backbone, dataset=dataset), *places, *loading, *(name for name, _ in parameters)])
    if repeated:
        fixed = ("profile", "backbone", "dataset", "only", "parameters", "force", "dry_run", *LOADING)
        given = [name for name in fixed if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given:
            raise ItaeError("--from repeats a report as it was: use it only with --output, --store and --dask")
        written = repeat_report(repeated, output=output, parameters=places, say=click.echo)
    else:
        numbers = None if only is None else [number.strip() for number in only.split(",")]
        asked = {
            "profile": profile,
            "backbone": backbone,
            "dataset": dataset,
            "only": numbers and [number and number.zfill(2) for number in numbers],
            "parameters": {name: parse_value(text) for name, text in parameters} | loading | places,
        }
        if dry_run:
            plan = plan_report(**asked)
            click.echo("\n".join(describe(plan, () if force else unchanged_runs(plan, output))))
            return
        written = run_report(**asked, output=output, force=force, say=click.echo)
    for error, (first, *others) in written.failures.items():
        more = f" and {len(others)} more" if others else ""
        click.echo(f"{first.folder}{more}: {error}", err=True)
    click.echo(written.index)
    sys.exit(1 if written.failed else 0)


def _given(**values: object) -> dict[str, object]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _refuse_twice(names: Iterable[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise ItaeError(f"{name} is given {times} times: give it once")


@main.command()
@store_option
@dask_option
@backbone_option
@click.option("--dataset", default="digits", show_default=True, help="`itae datasets` lists them; or imagefolder:PATH.")
@click.option("--limit", metavar="N", callback=_validated, help="Take a stratified sample of so many images.")
@click.option("--batch-size", metavar="N", callback=_validated, help="Images per batch.  [default: auto]")
@loading_options(*LOADING)
@click.option("--threshold", default="auto", show_default=True, callback=_validated, help="A number, or auto.")
@source_option
@click.option("--output", type=PATH, metavar="FILE", required=True, help="A .npz or .parquet file.")
def extract(
    store: str | None, dask: str | None, backbone: str, dataset: str, limit: int | None, batch_size: int | None,
    threshold: float | str, source: str, output: Path, **loading: object,
) -> None:
    """Write a data set's features to a file.

    The file holds the model's own features (baseline), those with ITAE (itae), and the labels (targets) and the names
    of the image files (names) if any.
    """
    import numpy as np

    import itae_utils as itae
    from itae_utils.report.rules import DATASET_OPTIONS

    if output.suffix not in FEATURE_FORMATS:
        raise ItaeError(f"--output {str(output)!r} must end in {' or '.join(FEATURE_FORMATS)}")
    if output.is_dir():
        raise ItaeError(f"--output {str(output)!r} is a folder: name a file")
    variants = {"baseline": None, "itae": itae.ITAE(source=source, threshold=threshold)}
    of_images = {name: loading.pop(name) for name in DATASET_OPTIONS}
    images = itae.load_dataset(dataset, limit=limit, **_given(**of_images))
    model = itae.load_backbone(backbone, **_given(**loading))
    make_folder(output.parent)
    features = itae.extract_features(model, images, variants, batch_size=batch_size or "auto", store=store or "auto",
                                     client=dask or "auto")
    arrays, (theta,) = {**features}, features.thresholds["itae"]
    about = {
        **features.settings, "weights_sha256": model.weights_sha256, "dataset": images.name, "split": images.split,
        "classes": images.classes and list(images.classes), "source": source, "thresholds": {**features.thresholds},
        "notes": images.notes,
    }
    _save_features(output, arrays, _given(targets=features.targets, names=images.names), about)
    click.echo("\n".join([f"{output}: {len(images):,} images, {' and '.join(features)}", *images.notes]))
    if theta is None:
        click.echo(f"no θ was found for the norm of the {source}, so itae is equal to baseline: use more images, "
                   "another --source, or a number as --threshold")
    elif np.array_equal(*arrays.values()):
        click.echo(f"no patch has a {source} whose norm is at most θ = {theta:.4g}, so itae is equal to baseline")
    else:
        click.echo(f"θ = {theta:.4g} on the norm of the {source}")


def _save_features(path: Path, arrays: dict, columns: dict, about: dict) -> None:
    """Write features by variant, further columns such as labels, and their settings as JSON in `about`."""
    import numpy as np

    columns = {name: np.asarray(values) for name, values in columns.items()}
    with replacing(path) as part, part.open("wb") as file:
        if path.suffix == ".npz":
            np.savez(file, about=json.dumps(about), **arrays, **columns)
        else:
            import pyarrow
            from pyarrow import parquet

            vectors = {
                name: pyarrow.FixedSizeListArray.from_arrays(array.ravel(), array.shape[1])
                for name, array in arrays.items()
            }
            table = pyarrow.table({**vectors, **columns}, metadata={"about": json.dumps(about)})
            parquet.write_table(table, file)


@main.command()
@click.argument("images", nargs=-1, required=True, type=PATH)
@backbone_option
@loading_options("checkpoint", "image_size", "device", "on_error")
@click.option("--threshold", callback=_validated, help="A number; default: fitted to all the given images together.")
@source_option
@click.option("--output", type=PATH, metavar="FILE", default="inspection.png", show_default=True,
              help="The figure; its ending decides the format.")
def inspect(
    images: tuple[Path, ...], backbone: str, threshold: float | str | None, source: str, output: Path,
    **loading: object,
) -> None:
    """Draw norms, attention and artifacts of images."""
    from itae_utils import figures
    from itae_utils.analysis.inspection import inspect_images
    from itae_utils.data.images import shown

    figures.check_figure_path(output)
    found = inspect_images(images, backbone=backbone, source=source, threshold=threshold, **_given(**loading))
    figures.save_as(figures.inspection(found.images, found.source, found.block, found.threshold), output)
    numbered = figures.describe_numbered([image.name for image in found.images], shown)
    click.echo("\n".join([*found.lines, *filter(None, [numbered]), f"{output} written"]))


@main.group("store")
def store_group() -> None:
    """List stored features, and remove some."""


@store_group.command("list")
@store_option
def list_store(store: str | None) -> None:
    """List the contents of the feature store and their size, the longest unused first."""
    from itae_utils.store.housekeeping import format_size, list_entries, table
    from itae_utils.store.store import store_in_use

    place = store_in_use(store or "auto")
    found = list_entries(place)
    if found:
        _echo_table(*table(found))
    click.echo(f"{place.place}: {format_size(sum(entry.size for entry in found))}")


@store_group.command()
@store_option
@click.option("--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Remove entries unused for so long.")
@click.option("--max-size", metavar="SIZE", help="Remove the longest unused until the rest fits, such as 20GB.")
@click.option("--dry-run", is_flag=True, help="Only print what would be removed.")
def prune(store: str | None, older_than: float | None, max_size: str | None, dry_run: bool) -> None:
    """Remove stored features by age or size; they are recomputed when needed. Not while a run uses the store."""
    from itae_utils.store.housekeeping import format_size, list_entries, parse_size, prune, table
    from itae_utils.store.store import store_in_use

    if older_than is None and max_size is None:
        raise ItaeError("name the entries to remove: --older-than DAYS, --max-size SIZE, or both")
    most, place = None if max_size is None else parse_size(max_size), store_in_use(store or "auto")
    gone = prune(place, older_than=None if older_than is None else 86400 * older_than, max_size=most, dry_run=dry_run)
    if gone:
        _echo_table(*table(gone))
    verb = "would be removed from" if dry_run else "removed from"
    removed, rest = (format_size(sum(entry.size for entry in entries)) for entries in (gone, list_entries(place)))
    click.echo(f"{removed} {verb} {place.place}, {rest} {'are there' if dry_run else 'remain'}")


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
