"""The commands of what was run, and of what goes on: status, runs, logs, report, compare."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from flows.cli.options import AsJson, SafeConsole, echo, print_found

app = typer.Typer()

RUN = "An id, the beginning of one, last, or last~N."


@app.command()
def status(as_json: AsJson = False) -> None:
    """Say what goes on here: server, workers, living runs, the last one, promoted models."""
    from flows.server.status import examine_now, show_status

    print_found(examine_now(), as_json, show_status)


@app.command()
def runs(as_json: AsJson = False) -> None:
    """List the runs of AMAZON_FT_HOME, newest first."""
    from flows.reports.history import listing, show_runs

    print_found(listing(), as_json, show_runs)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="RUN", help=RUN)],
    second: Annotated[str, typer.Argument(metavar="RUN", help="The other.")],
    as_json: AsJson = False,
) -> None:
    """Say what differs between two runs: settings, data, metrics."""
    from flows.reports.history import compare_runs, find_run, show_comparison
    from tasks.caching.runs import past_runs

    past = past_runs()
    found = compare_runs(find_run(first, past), find_run(second, past))
    if as_json:
        echo(json.dumps(asdict(found), ensure_ascii=False))
    else:
        show_comparison(found, SafeConsole())


@app.command()
def logs(
    run: Annotated[str, typer.Argument(metavar="[RUN]", help=RUN)] = "last",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
) -> None:
    """Print what a run said, wherever its stages ran."""
    from flows.reports.history import find_run
    from flows.reports.run_log import log_lines
    from tasks.caching.runs import past_runs

    for line in log_lines(find_run(run, past_runs()), follow=follow):
        echo(line, nl=False)


@app.command()
def report(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="The last that was saved, unless given.")] = None,
    opened: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser, too.")] = True,
) -> None:
    """Print where the report of a recipe's newest model lies, and open it."""
    from flows.reports.page import find_report

    page = find_report(recipe)
    echo(str(page))
    if opened:
        typer.launch(page.as_uri())
