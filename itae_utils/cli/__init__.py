"""The `itae` command."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import click
from click.core import ParameterSource

from itae_utils.cli.one_line import Group
from itae_utils.cli.options import (
    LOADING,
    SETTING,
    PathType,
    backbone_option,
    dask_option,
    extraction_options,
    loading_options,
    setting_options,
    store_option,
    validated,
)
from itae_utils.errors import ItaeError
from itae_utils.files import make_folder
from itae_utils.method.setting import WHERE


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
    from itae_utils.report.compare import read_report
    from itae_utils.report.estimate import dry_run as describe
    from itae_utils.report.parameters import parse_value
    from itae_utils.report.report import output_folder, plan_report, repeat_report, run_report, unchanged_runs
    from itae_utils.report.single import single_file as write_single

    places = _given(store=store, dask=dask, format=format)
    loading = _given(**loading)
    _refuse_twice([*_given(backbone=backbone, dataset=dataset), *places, *loading, *(name for name, _ in parameters)])
    if against:
        read_report(against)  # an error now, not after hours
    if repeated:
        fixed = ("profile", "backbone", "dataset", "only", "parameters", "force", "dry_run", *LOADING)
        given = [name for name in fixed if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given:
            raise ItaeError("--from repeats a report as it was: use it only with --output, --store and --dask")
        written = repeat_report(repeated, output=output, parameters=places, say=click.echo)
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
        if against and output_folder(plan_report(**asked), output).resolve() == against.resolve():
            raise ItaeError(f"--against {str(against)!r} is the folder that would be written: give another --output")
        written = run_report(**asked, output=output, force=force, say=click.echo)
    for error, (first, *others) in written.failures.items():
        more = f" and {len(others)} more" if others else ""
        click.echo(f"{first.folder}{more}: {error}", err=True)
    click.echo(written.index)
    if single_file:
        whole = write_single(written)
        click.echo(f"{whole}: {whole.stat().st_size / 1e6:.1f} MB")
    lines, fell = _compare(against, written.folder, written.folder / "comparison.html") if against else ([], [])
    for line in lines + [f"{run}: ACC with ITAE fell by more than its interval" for run in fell]:
        click.echo(line)
    sys.exit(1 if written.failed else 3 if fell else 0)


def _given(**values: object) -> dict[str, object]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _refuse_twice(names: Iterable[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise ItaeError(f"{name} is given {times} times: give it once")


def _inputs(output: Path, endings: Iterable[str], dataset: object, options: dict[str, object]) -> tuple:
    """Return setting, images, backbone and reading from `extraction_options`, after a check of the output."""
    import itae_utils as itae
    from itae_utils.method.attention import check_setting
    from itae_utils.report.rules import DATASET_OPTIONS

    if output.suffix not in endings:
        raise ItaeError(f"--output {str(output)!r} must end in {' or '.join(endings)}")
    if output.is_dir():
        raise ItaeError(f"--output {str(output)!r} is a folder: name a file")
    reading = {name: options.pop(name) or "auto" for name in ("batch_size", "store")}
    setting = itae.ITAE(**{name: options.pop(name) for name in SETTING})
    images = itae.load_dataset(dataset, **_given(**{name: options.pop(name) for name in ("limit", *DATASET_OPTIONS)}))
    model = itae.load_backbone(options.pop("backbone"), **_given(**options))
    check_setting(model.model, setting, model.truth)
    make_folder(output.parent)
    return setting, images, model, reading


@main.command()
@dask_option
@click.option("--dataset", default="digits", show_default=True, help="`itae datasets` lists them; or imagefolder:PATH.")
@extraction_options
@click.option("--map", "mapped", is_flag=True, help="Add the t-SNE of all images, and the paths of their files.")
@click.option("--output", type=PathType(), metavar="FILE", required=True, help="A .npz or .parquet file.")
def extract(dask: str | None, dataset: str, mapped: bool, output: Path, **options: object) -> None:
    """Write a data set's features to a file.

    The file holds the model's own features (baseline), those with ITAE (itae), and the labels (targets) and the names
    of the image files (names) if any. With --map it also holds the points of baseline (x, y) and of itae (itae_x,
    itae_y), and the absolute paths of the image files (path) if any.
    """
    import itae_utils as itae
    from itae_utils.analysis.feature_map import FEWEST, MOST_IN_TSNE, map_points
    from itae_utils.analysis.words import statistic_name
    from itae_utils.extraction.export import FORMATS, save_features
    from itae_utils.report.rules import check_encoding

    setting, images, vit, reading = _inputs(output, FORMATS, dataset, options)
    if mapped and not FEWEST <= len(images) <= MOST_IN_TSNE:
        raise ItaeError(f"--map of {len(images):,} images: use {FEWEST} to {MOST_IN_TSNE:,}, see --limit")
    for path in images.images if mapped and images.names else ():
        check_encoding("path", str(path))
    features = itae.extract_features(vit, images, {"baseline": None, "itae": setting}, client=dask or "auto", **reading)
    points = map_points(features["baseline"], features["itae"], seed=0, store=reading["store"]) if mapped else ()
    if points is None:
        raise ItaeError("all images have the same features, so there is nothing to map: leave out --map")
    save_features(output, features, images, points, weights_sha256=vit.weights_sha256, source=setting.source,
                  tail=setting.side, rank=setting.rank, attenuation=setting.attenuation)
    click.echo("\n".join([f"{output}: {len(images):,} images, {' and '.join(features)}", *images.notes]))
    name, (theta,) = statistic_name(setting.source), features.thresholds["itae"]
    if theta is None:
        (fit,) = itae.fit_thresholds(vit, images, rank=setting.rank, **reading).of(setting)
        click.echo(f"no θ on the {name}: {fit.reason}. So itae is equal to baseline: use more images, another "
                   "--source, or a number or share:2% as --threshold")
        return
    found, patches = features.artifact_counts["itae"].sum(), len(images) * features.num_patches
    click.echo(f"θ = {theta:.4g} on the {name}: {found:,} of {patches:,} patches lie {WHERE[setting.side]} it"
               + ("" if found else ", so itae is equal to baseline"))


@main.command()
@click.argument("files", metavar="[IMAGE]...", nargs=-1, type=PathType())
@click.option("--dataset", help="Images, instead of files; `itae datasets` lists them.  [default: digits]")
@extraction_options
@click.option("--sample", metavar="N", callback=validated, help="Images on the map, at most 2,000.  [default: 800]")
@click.option("--output", type=PathType(), metavar="FILE", default="explorer.html", show_default=True, help="The page.")
def explore(files: tuple[Path, ...], dataset: str | None, sample: int | None, output: Path, **options: object) -> None:
    """Write a page on which θ can be moved, for image files or a data set; fewer than 4 images have no map."""
    from itae_utils.analysis import words
    from itae_utils.figures.explorer.data import as_json, describe_size
    from itae_utils.figures.explorer.page import explorer_html
    from itae_utils.figures.explorer.prepare import prepare
    from itae_utils.report.pages import explorer_page

    if files and dataset:
        raise ItaeError("image files and --dataset are both given: give one of them")
    setting, images, model, reading = _inputs(output, [".html"], files or dataset or "digits", options)
    done = prepare(model, images, setting, **reading, **_given(sample=sample))
    source, fit, (theta,) = setting.source, done.fits[setting.source], done.setting.thresholds
    about = [words.describe_run(model, images), words.describe_threshold(source, fit, theta, setting.threshold),
             *([describe_size(done.data)] if done.found.points else [])]
    explorer_page(output, explorer_html(as_json(done.data)), "\n\n".join(about), backbone=model.name,
                  dataset=images.name)
    click.echo("\n".join([f"{output}: {output.stat().st_size / 1e6:.1f} MB, {len(done.data['panel']['numbers']):,} of "
                          f"{len(images):,} images with their attention", *images.notes]))
    name = words.statistic_name(source)
    click.echo(f"no θ on the {name}: {fit.reason}. Drag the page's handle, or give --threshold" if theta is None else
               f"θ = {theta:.4g} on the {name}: {words.percent(fit.beyond(theta).mean())} of the sample's patches lie "
               f"{WHERE[fit.side]} it")


@main.command()
@click.argument("images", nargs=-1, required=True, type=PathType())
@backbone_option
@loading_options("checkpoint", "image_size", "device", "on_error")
@setting_options
@click.option("--output", type=PathType(), metavar="FILE", default="inspection.png", show_default=True,
              help="The figure; its ending decides the format.")
def inspect(images: tuple[Path, ...], backbone: str, output: Path, **options: object) -> None:
    """Draw norms, attention and artifacts of images; a rule for θ is applied to all of them together."""
    from itae_utils import figures
    from itae_utils.analysis.inspection import inspect_images
    from itae_utils.data.images import shown

    figures.check_figure_path(output)
    found = inspect_images(images, backbone=backbone, **_given(**options))
    figures.save_as(figures.inspection(found.images, found.source, found.block, found.threshold), output)
    numbered = figures.describe_numbered([image.name for image in found.images], shown)
    click.echo("\n".join([*found.lines, *filter(None, [numbered]), f"{output} written"]))


@main.command()
@click.argument("before", type=PathType(), metavar="REPORT")
@click.argument("after", type=PathType(), metavar="REPORT")
@click.option("--output", type=PathType(), metavar="FILE", default="comparison.html", show_default=True,
              help="The page to write; it holds the figures of both.")
def compare(before: Path, after: Path, output: Path) -> None:
    """Write a page on all that differs between two reports: settings, scores with intervals, figures."""
    click.echo("\n".join(_compare(before, after, output)[0]))


@main.command()
@click.argument("folder", type=PathType(), default="reports")
def reports(folder: Path) -> None:
    """Write FOLDER/index.html, a list of the reports in FOLDER; each is compared with the one before of its kind."""
    from itae_utils.report.overview import list_reports, overview_page, previous_of

    entries, left_out = list_reports(folder)
    compared = {}
    for entry in entries:
        before = previous_of(entry, entries)
        if before and entry.report.name not in compared:
            _compare(before.report.folder, entry.report.folder, entry.report.folder / "comparison.html")
            compared[entry.report.name] = f"{entry.report.name}/comparison.html"
    click.echo(overview_page(folder, entries, left_out, compared))


def _compare(before: Path, after: Path, output: Path) -> tuple[list[str], list[str]]:
    """Write the page, and return lines about it, and the runs in which ACC fell."""
    from itae_utils.analysis.two_runs import compare_clusters, runs_that_fell
    from itae_utils.report.compare import compare_page, read_pair

    if output.suffix != ".html":
        raise ItaeError(f"--output {str(output)!r} must end in .html")
    pair = read_pair(before, after)
    scores, notes = compare_clusters(pair.clusters)
    compare_page(pair, scores, notes, output)
    lines = [f"{row['run']}, {row['variant']}: {row['score']} {row['before']:.3f} → {row['after']:.3f}, {row['words']}"
             for row in scores if row["score"] == "ACC"]
    return [*lines, *notes, f"{output} written"], runs_that_fell(scores)


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
    from itae_utils.data.published import DATASETS

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
