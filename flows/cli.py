"""The command line; the commands for what runs left are in flows/after.py."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from flows import show
from flows.after import app as after_app
from flows.after import hide_bars
from flows.bench import app as bench_app
from flows.deploy import PoolType
from flows.recipes import StageName, check_until, load_recipe
from tasks import runs
from tasks.refs import ConfigError, InputError, PipelineError, SavedModel

if TYPE_CHECKING:
    from tasks.config import Recipe

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From a product file to a fine-tuned language model.",
)
cache_app = typer.Typer(no_args_is_help=True, help="What lies under AMAZON_FT_HOME, and what may go.")
app.add_typer(cache_app, name="cache")
app.add_typer(bench_app, name="bench")
app.add_typer(after_app)

err = Console(stderr=True)

RecipeName = Annotated[str, typer.Argument(metavar="[RECIPE|FILE]", help="A shipped recipe or a .yaml file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value; may be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show stack traces, and of a run Prefect's own log.")]


@app.callback()
def any_command(debug: Debug = False) -> None:
    """Options of every command."""
    del debug  # _fail looks for it, wherever it stands


@app.command()
def run(
    recipe: RecipeName = "default",
    overrides: Overrides = None,
    until: Annotated[StageName | None, typer.Option(help="End after this stage.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a recipe here, in this process: only what failed or changed is run again."""
    chosen = load_recipe(recipe, overrides or ())
    check_until(until, chosen)
    with runs.run_record(chosen.name, chosen.model_dump(mode="json"), until=until) as record:
        try:
            saved = _run_flow(chosen, until, debug)
        finally:
            show.stages(record.stages, err)
    show.outcome(record, chosen, saved, err)
    if as_json:
        typer.echo(json.dumps(show.summary(record, chosen, saved), ensure_ascii=False))


def _run_flow(recipe: Recipe, until: StageName | None, debug: bool) -> SavedModel | None:
    from flows.server import prefect_server

    quiet = {} if debug else {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}
    os.environ |= {"PREFECT_LOGGING_EXTRA_LOGGERS": "tasks,flows", "DO_NOT_TRACK": "1", **quiet}
    if not err.is_terminal:  # bars are for those who watch
        hide_bars()
    with prefect_server():
        from flows.amazon_ft import amazon_ft

        _log_to_terminal()
        return amazon_ft(recipe, until=until.value if until else None)


def _log_to_terminal() -> None:
    """One plain line a message; after Prefect has configured logging, which replaces the handlers."""
    handler = RichHandler(console=err, show_path=False, show_level=False, log_time_format="%H:%M:%S", markup=False)
    for name in ("tasks", "flows"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)


@app.command()
def plan(recipe: RecipeName = "default", overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say which stages a run would run, and why; nothing is run."""
    from flows.pipeline import plan as make_plan

    found = make_plan(load_recipe(recipe, overrides or ()))
    if as_json:
        typer.echo(json.dumps({"stages": [show.step(step) for step in found.steps]}, ensure_ascii=False))
    else:
        show.plan(found, Console())


@app.command()
def up(
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port of the server.")] = 4200,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in, without a password.")
    ] = "127.0.0.1",
    ui: Annotated[bool, typer.Option("--ui/--no-ui", help="Serve the web interface.")] = True,
    database_url: Annotated[
        str | None,
        typer.Option(envvar="PREFECT_SERVER_DATABASE_CONNECTION_URL", help="postgresql+asyncpg://...; SQLite unless given."),
    ] = None,
) -> None:
    """Start a server, work pools, workers and deployments on this machine; Ctrl-C ends them."""
    from flows.up import Options
    from flows.up import run as run_up

    run_up(Options(host=host, port=port, ui=ui, database_url=database_url), Console())


@app.command()
def worker(
    pool: Annotated[str, typer.Argument(help="cpu or cuda.")],
    name: Annotated[str | None, typer.Option(help="Of the worker, as the server shows it.")] = None,
    healthcheck: Annotated[bool, typer.Option("--with-healthcheck", help="Answer on port 8080 at /health.")] = False,
) -> None:
    """Serve a work pool here until SIGTERM or Ctrl-C, which let a training write a checkpoint first.

    For k GPUs start k, each with its own CUDA_VISIBLE_DEVICES.
    """
    from flows.deploy import server_url
    from flows.up import serve_pool

    server_url()
    raise typer.Exit(serve_pool(pool, name, healthcheck=healthcheck))


@app.command()
def deploy(
    pools: Annotated[PoolType, typer.Option(help="Where runs live.")] = PoolType.PROCESS,
    gpus: Annotated[int, typer.Option(min=1, help="How many trainings pool cuda runs at a time.")] = 1,
) -> None:
    """Register work pools, deployments and the crash automation with the server at PREFECT_API_URL."""
    from flows.deploy import server_url, set_up

    url = server_url()
    set_up(pools, gpus)
    err.print(f"registered at {url}: work pools cpu and cuda, every deployment of deployments/prefect.yaml", highlight=False)


@app.command()
def doctor(recipe: RecipeName = "default", overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a run of the recipe would miss here; exit code 1 if anything."""
    from flows.doctor import examine

    found = examine(load_recipe(recipe, overrides or ()))
    if as_json:
        typer.echo(json.dumps({"findings": [vars(finding) for finding in found]}, ensure_ascii=False))
    else:
        show.findings(found, Console())
    raise typer.Exit(FAILED if any(finding.state == "missing" for finding in found) else 0)


@cache_app.command("ls")
def cache_ls(as_json: AsJson = False) -> None:
    """Sizes by stage, and which runs refer to what."""
    from flows.cache import inventory

    entries = inventory()
    if as_json:
        typer.echo(json.dumps([vars(entry) for entry in entries], ensure_ascii=False))
    else:
        show.inventory(entries, Console())


@cache_app.command("gc")
def cache_gc(
    keep_last: Annotated[int, typer.Option(min=0, help="Keep what the last N runs of each recipe refer to.")] = 1,
    older_than: Annotated[str | None, typer.Option(help="Only drop runs older than this, such as 12h or 7d.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove what no kept run and no running one refers to."""
    from flows.cache import collect, parse_age

    removed = collect(keep_last, parse_age(older_than), dry_run=dry_run)
    show.removed(removed, Console(), dry_run=dry_run)


def main() -> None:
    """Run the command line; a user's mistake ends with one message and an exit code, never a stack trace."""
    _reach_this_machine_directly()
    try:
        app()
    except KeyboardInterrupt:
        err.print("interrupted; finished stages are kept")
        sys.exit(INTERRUPTED)
    except PipelineError as error:
        _fail(error, str(error), WRONG_INPUT if isinstance(error, (ConfigError, InputError)) else FAILED)
    except Exception as error:
        _fail(
            error,
            f"{type(error).__name__}: {error}\nThis is not your doing: run amazon-ft --debug ... for the stack trace.",
            FAILED,
        )


def _reach_this_machine_directly() -> None:
    """Keep a proxy for the network from being asked for the server on this machine."""
    for name in ("NO_PROXY", "no_proxy"):
        listed = os.environ.get(name, "").split(",")
        os.environ[name] = ",".join(filter(None, dict.fromkeys([*listed, "127.0.0.1", "localhost"])))


def _fail(error: Exception, message: str, code: int) -> None:
    if "--debug" in sys.argv:
        raise error
    err.print(message, style="red", markup=False, highlight=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
