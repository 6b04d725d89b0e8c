"""Options that several commands share; their values follow the rules of the notebooks' parameters of the same name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click

from itae_utils.method.setting import ATTENUATIONS, SOURCES, TAILS

NUMBERS = ("limit", "sample", "batch_size", "image_size", "threshold", "rank")
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


class PathType(click.ParamType):
    """The path of a file or folder; ~ is the user's home."""

    name = "path"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        if not str(value) or "\0" in str(value):
            self.fail(f"{value!r} is not a path", param, ctx)
        return Path(os.path.expanduser(value))


def given(**values: object) -> dict[str, object]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def validated(_context: click.Context, option: click.Parameter, text: str | None) -> object:
    """Read an option's value and validate it by the rules of the notebooks' parameter of that name."""
    if text is None:
        return None
    from itae_utils.report.parameters import parse_value
    from itae_utils.report.rules import check_values

    value = parse_value(text) if option.name in NUMBERS else os.path.expanduser(text)
    check_values({option.name: value})
    return value


def loading_options(*names: str) -> Callable:
    """Return a decorator that gives a command these options for loading, None if they are not given."""
    def decorate(command: Callable) -> Callable:
        for name in reversed(names):
            (metavar, words), option = LOADING[name], f"--{name.replace('_', '-')}"
            command = click.option(option, metavar=metavar, callback=validated, help=words)(command)
        return command

    return decorate


store_option = click.option(
    "--store", metavar="PLACE", callback=validated,
    help="Where features are stored: a folder, an fsspec URL such as s3://bucket/name, or none.  "
         "[default: ITAE_STORE, else a folder in the user's cache]")
dask_option = click.option(
    "--dask", metavar="WHERE", callback=validated,
    help="Extract on Dask workers: tcp://… is a cluster's address, local:N starts N processes.  [default: ITAE_DASK]")
backbone_option = click.option("--backbone", default="demo", show_default=True, help="`itae backbones` lists them.")
SETTING = {  # options of `ITAE`
    "source": click.option("--source", type=click.Choice(SOURCES), default="key", show_default=True,
                           help="The statistic of a patch that identifies artifacts."),
    "threshold": click.option("--threshold", metavar="VALUE", default="auto", show_default=True, callback=validated,
                              help="A number, or a rule for the patches: auto, share:2% or sd:3."),
    "tail": click.option("--tail", type=click.Choice(TAILS),
                         help="The side of θ of the artifacts.  [default: low for query, key and value, else high]"),
    "rank": click.option("--rank", metavar="N", default="1", show_default=True, callback=validated,
                         help="Number of singular directions, for the source direction."),
    "attenuation": click.option("--attenuation", type=click.Choice(ATTENUATIONS), default="min", show_default=True,
                                help="The edit of the artifacts."),
}


def setting_options(command: Callable) -> Callable:
    """Give a command the options in `SETTING`."""
    for option in reversed(SETTING.values()):
        command = option(command)
    return command


def extraction_options(command: Callable) -> Callable:
    """Give a command the options of the backbone, the images, the setting, and how images are read."""
    limit = click.option("--limit", metavar="N", callback=validated, help="Take a stratified sample of so many images.")
    batch = click.option("--batch-size", metavar="N", callback=validated, help="Images per batch.  [default: auto]")
    return store_option(backbone_option(limit(batch(loading_options(*LOADING)(setting_options(command))))))
