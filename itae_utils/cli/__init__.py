"""The `itae` command."""

from __future__ import annotations

import click

from itae_utils.cli.images import explore, extract, inspect
from itae_utils.cli.lists import backbones, datasets
from itae_utils.cli.one_line import Group
from itae_utils.cli.reports import compare, report, reports
from itae_utils.cli.store import store

COMMANDS = (report, compare, reports, extract, explore, inspect, backbones, datasets, store)


@click.group(cls=Group, commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="itae-utils", prog_name="itae")
def main() -> None:
    """See, attenuate and measure attention artifacts of Vision Transformers."""
