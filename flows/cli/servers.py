"""The commands of servers and workers: up, worker, deploy, doctor."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from flows.choices import CollisionStrategy, PoolType
from flows.cli.options import FAILED, AsJson, Overrides, RecipeName, SafeConsole, echo, remark

app = typer.Typer()


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
    from flows.server.up import UpOptions, run_until_interrupted

    run_until_interrupted(UpOptions(host=host, port=port, ui=ui, database_url=database_url), SafeConsole())


@app.command()
def worker(
    pool: Annotated[str, typer.Argument(help="cpu or cuda.")],
    name: Annotated[str | None, typer.Option(help="Of the worker, as the server shows it.")] = None,
    healthcheck: Annotated[bool, typer.Option("--with-healthcheck", help="Answer on port 8080 at /health.")] = False,
) -> None:
    """Serve a work pool here until SIGTERM or Ctrl-C, which let a training write a checkpoint first.

    For k GPUs start k: a training takes free ones, as many as it is to have.
    """
    from flows.server.deploy import server_url
    from flows.server.up import serve_pool

    server_url()
    raise typer.Exit(serve_pool(pool, name, healthcheck=healthcheck))


@app.command()
def deploy(
    pools: Annotated[PoolType, typer.Option(help="Where runs live.")] = PoolType.PROCESS,
    gpus: Annotated[int, typer.Option(min=1, help="How many trainings pool cuda runs at a time.")] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite-templates", help="Put our job templates in the place of edited ones.")
    ] = False,
    concurrency_limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N", help="How many runs of a deployment go on at a time, as demo=1; demo=none for any number."
        ),
    ] = None,
    collision_strategy: Annotated[
        CollisionStrategy | None, typer.Option(help="Whether runs beyond --concurrency-limit wait (ENQUEUE) or are cancelled.")
    ] = None,
    queue: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=QUEUE", help="The work queue of a deployment's runs and of their trainings, as demo=urgent."),
    ] = None,
    notify: Annotated[
        list[str] | None, typer.Option(metavar="TYPE/NAME", help="A notification block that hears of models and failed runs.")
    ] = None,
) -> None:
    """Register work pools, deployments and the crash automation with the server at PREFECT_API_URL."""
    from flows.server import notify as notifications
    from flows.server import registration
    from flows.server.deploy import server_url, set_up_pools

    url = server_url()
    choices = registration.read_choices(concurrency_limit or (), collision_strategy, queue or ())
    blocks = [notifications.find_block(name) for name in notify or ()]
    set_up_pools(pools, gpus, overwrite=overwrite, say=remark)
    registration.register(choices, say=remark)
    for block in blocks:
        notifications.notify(block, remark)
    remark(f"registered at {url}: work pools cpu and cuda, every deployment of deployments/prefect.yaml")


@app.command()
def doctor(recipe: RecipeName = "default", overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a run of the recipe would miss here; exit code 1 if anything."""
    from flows.cli import tables
    from flows.recipes import load_recipe
    from flows.running.doctor import examine

    found = examine(load_recipe(recipe, overrides or ()))
    if as_json:
        echo(json.dumps({"findings": [vars(finding) for finding in found]}, ensure_ascii=False))
    else:
        tables.print_findings(found, SafeConsole())
    raise typer.Exit(FAILED if any(finding.state == "missing" for finding in found) else 0)
