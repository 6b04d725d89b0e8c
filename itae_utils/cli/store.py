"""Commands for the feature store."""

from __future__ import annotations

import click

from itae_utils.cli.lists import echo_table
from itae_utils.cli.options import store_option
from itae_utils.errors import ItaeError


@click.group()
def store() -> None:
    """List stored features, and remove some."""


@store.command("list")
@store_option
def list_store(store: str | None) -> None:
    """List the contents of the feature store and their size, the longest unused first."""
    from itae_utils.store.housekeeping import format_size, list_entries, table
    from itae_utils.store.store import store_in_use

    place = store_in_use(store or "auto")
    found = list_entries(place)
    if found:
        echo_table(*table(found))
    click.echo(f"{place.place}: {format_size(sum(entry.size for entry in found))}")


@store.command()
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
        echo_table(*table(gone))
    verb = "would be removed from" if dry_run else "removed from"
    removed, rest = (format_size(sum(entry.size for entry in entries)) for entries in (gone, list_entries(place)))
    click.echo(f"{removed} {verb} {place.place}, {rest} {'are there' if dry_run else 'remain'}")
