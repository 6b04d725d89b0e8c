"""Commands that look at images: their features in a file, the explorer's page, a figure."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from itae_utils.cli.options import (
    SETTING,
    PathType,
    backbone_option,
    dask_option,
    extraction_options,
    given,
    loading_options,
    setting_options,
    validated,
)
from itae_utils.errors import ItaeError
from itae_utils.files import make_folder
from itae_utils.method.setting import WHERE


@click.command()
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
                   "--source or --tail, or a number or share:2% as --threshold")
        return
    found, patches = features.artifact_counts["itae"].sum(), len(images) * features.num_patches
    click.echo(f"θ = {theta:.4g} on the {name}: {found:,} of {patches:,} patches lie {WHERE[setting.side]} it"
               + ("" if found else ", so itae is equal to baseline"))


@click.command()
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
    done = prepare(model, images, setting, **reading, **given(sample=sample))
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


@click.command()
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
    found = inspect_images(images, backbone=backbone, **given(**options))
    figures.save_as(figures.inspection(found.images, found.source, found.block, found.threshold), output)
    numbered = figures.describe_numbered([image.name for image in found.images], shown)
    click.echo("\n".join([*found.lines, *filter(None, [numbered]), f"{output} written"]))


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
    images = itae.load_dataset(dataset, **given(**{name: options.pop(name) for name in ("limit", *DATASET_OPTIONS)}))
    model = itae.load_backbone(options.pop("backbone"), **given(**options))
    check_setting(model.model, setting, model.truth)
    make_folder(output.parent)
    return setting, images, model, reading
