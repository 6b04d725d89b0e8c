"""Commands that list what the package knows by name."""

from __future__ import annotations

import click


@click.command()
def backbones() -> None:
    """List backbones with size and origin."""
    from itae_utils.models.registry import BACKBONES

    echo_table(
        ["name", "parameters", "patch", "image", "download", "origin"],
        [[name, f"{entry.parameters:g} M", f"{entry.patch}", f"{entry.image_size}", _megabytes(entry.size_mb),
          entry.origin] for name, entry in BACKBONES.items()])
    click.echo("Any other timm ViT with a [CLS] token can be given by its timm name.")


@click.command()
def datasets() -> None:
    """List data sets with size and origin."""
    from itae_utils.data.published import DATASETS

    echo_table(
        ["name", "images", "classes", "split", "download", "origin"],
        [[name, _count(entry.images), _count(entry.classes), entry.split, _megabytes(entry.megabytes), entry.origin]
         for name, entry in DATASETS.items()])


def _megabytes(size: float) -> str:
    return f"{size:,.0f} MB" if size else "–"


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def echo_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
