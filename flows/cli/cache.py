"""The commands of what lies under AMAZON_FT_HOME: cache ls, cache gc."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from flows.cli.options import AsJson, SafeConsole, echo

app = typer.Typer(no_args_is_help=True, help="What lies under AMAZON_FT_HOME, and what may go.")


@app.command("ls")
def cache_ls(as_json: AsJson = False) -> None:
    """Sizes by stage, and which runs refer to what."""
    from flows.cli.tables import print_inventory
    from flows.running.garbage import inventory

    entries = inventory()
    if as_json:
        echo(json.dumps([vars(entry) for entry in entries], ensure_ascii=False))
    else:
        print_inventory(entries, SafeConsole())


@app.command("gc")
def cache_gc(
    keep_last: Annotated[int, typer.Option(min=0, help="Keep what the last N runs of each recipe refer to.")] = 1,
    older_than: Annotated[str | None, typer.Option(help="Only drop runs older than this, such as 12h or 7d.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove what no kept run and no running one refers to."""
    from flows.cli.tables import print_removed
    from flows.running.garbage import collect, parse_age

    removed = collect(keep_last, parse_age(older_than), dry_run=dry_run)
    print_removed(removed, SafeConsole(), dry_run=dry_run)
