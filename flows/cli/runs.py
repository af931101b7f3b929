"""The commands of a recipe: run, plan."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from flows.choices import StageName
from flows.cli.options import AsJson, Debug, Overrides, RecipeName, SafeConsole, echo, err
from flows.running.quiet import hide_bars

if TYPE_CHECKING:
    from tasks.config import Recipe
    from tasks.refs import SavedModel

app = typer.Typer()


@app.command()
def run(
    recipe: RecipeName = "default",
    overrides: Overrides = None,
    until: Annotated[StageName | None, typer.Option(help="End after this stage.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a recipe here, in this process: only what failed or changed is run again."""
    from flows.cli import tables
    from flows.cli.terminal import Bar, LastRun
    from flows.recipes import check_until, load_recipe
    from tasks.caching.context import observing
    from tasks.caching.events import Detached

    chosen = load_recipe(recipe, overrides or ())
    check_until(until, chosen)
    last = LastRun()
    try:
        with observing(last, *([Detached(Bar(err), "the bar", close_seconds=5)] if sys.stderr.isatty() else [])):
            saved = _run_here(chosen, until, debug)
    finally:
        if last.run is not None:
            tables.print_stages(last.run.stages, err)
    assert last.run is not None, "a flow that ends has opened a run"
    tables.print_outcome(last.run, chosen, saved, err)
    if as_json:
        echo(json.dumps(tables.summarize_run(last.run, chosen, saved), ensure_ascii=False))


def _run_here(recipe: Recipe, until: StageName | None, debug: bool) -> SavedModel | None:
    """Run the flow, under a server of its own unless PREFECT_API_URL names one; without any where nothing is to be made."""
    from flows.pipeline import plan_run, tune
    from flows.whole_run import run_recipe
    from tasks.caching.stage import OnlyServed
    from tasks.reporting.visible import log_visibly

    log_visibly()
    _log_to_terminal()
    if not os.environ.get("PREFECT_API_URL") and plan_run(recipe, until).is_cached:
        return run_recipe(recipe, until, OnlyServed(), tune)
    return _run_flow(recipe, until, debug)


def _run_flow(recipe: Recipe, until: StageName | None, debug: bool) -> SavedModel | None:
    from flows.server.ephemeral import prefect_server

    quiet = {} if debug else {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}
    os.environ |= {"PREFECT_LOGGING_EXTRA_LOGGERS": "tasks,flows", "DO_NOT_TRACK": "1", **quiet}
    if not sys.stderr.isatty():  # bars are for those who watch
        hide_bars()
    with prefect_server():
        from flows.amazon_ft import amazon_ft

        _log_to_terminal()
        return amazon_ft(recipe, until=until)


def _log_to_terminal() -> None:
    """One plain line a message; called again once Prefect has configured logging, lest it took the handler away."""
    from rich.logging import RichHandler

    handler = RichHandler(console=err, show_path=False, show_level=False, log_time_format="%H:%M:%S", markup=False)
    for name in ("tasks", "flows"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not any(isinstance(present, RichHandler) for present in logger.handlers):
            logger.addHandler(handler)


@app.command()
def plan(recipe: RecipeName = "default", overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say which stages a run would run, and why; nothing is run."""
    from flows.cli import tables
    from flows.pipeline import describe_sources, plan_run
    from flows.recipes import load_recipe

    chosen = load_recipe(recipe, overrides or ())
    found, sources = plan_run(chosen), describe_sources(chosen)
    if as_json:
        told = {"stages": [tables.step_as_json(step) for step in found.steps], "sources": sources}
        echo(json.dumps(told, ensure_ascii=False))
    else:
        for source in sources:
            echo(source)
        tables.print_plan(found, SafeConsole())
