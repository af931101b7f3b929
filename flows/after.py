"""The commands for what runs left: ask, export, serve, runs, compare."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flows.export import Format

app = typer.Typer()
err = Console(stderr=True)

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A saved model's directory, RECIPE/NAME, or a recipe that has run.")
]


@app.command()
def ask(
    model: ModelName,
    title: Annotated[str | None, typer.Option(help="Of the product; else titles are asked for, one after another.")] = None,
    question: Annotated[str | None, typer.Option(help="Else the recipe's own.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Let the base model answer too.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Else evaluate.max_new_tokens of the recipe.")] = None,
) -> None:
    """Ask a saved model about a product."""
    from flows.ask import Options
    from flows.ask import ask as answer
    from flows.saved import find_saved

    hide_bars()
    saved = find_saved(model)
    _tell(f"model: {saved.path}")
    options = Options(title, question, compare, max_new_tokens)
    answer(saved, options, read=input, say=lambda text: typer.echo(text, nl=False))


@app.command()
def export(
    model: ModelName,
    out: Annotated[Path, typer.Argument(help="The directory to make.")],
    how: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.MERGED,
    push: Annotated[str | None, typer.Option(metavar="HUB_ID", help="Upload it too; the token is HF_TOKEN.")] = None,
) -> None:
    """Write a saved model in another form, and load it again to see that it answers the same."""
    from flows.export import announce, read_token
    from flows.export import export as write
    from flows.export import push as upload
    from flows.saved import find_saved

    hide_bars()
    saved, token = find_saved(model), read_token() if push else ""
    announce(write(saved, how, out.absolute()), out, typer.echo)
    if push:
        typer.echo(f"pushed: {upload(out, push, token)}")


@app.command()
def serve(
    model: ModelName,
    port: Annotated[int, typer.Option(min=1, max=65_535, help="On 127.0.0.1.")] = 8000,
) -> None:
    """Serve a saved model at an OpenAI-compatible endpoint, until Ctrl-C."""
    from flows.saved import find_saved
    from flows.serve import serve as become_server

    hide_bars()
    become_server(find_saved(model), port, _tell)


@app.command()
def runs(as_json: Annotated[bool, typer.Option("--json", help="As one JSON list.")] = False) -> None:
    """List the runs of AMAZON_FT_HOME, newest first."""
    from flows.history import listing, show_runs

    found = listing()
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
    else:
        show_runs(found, Console())


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="RUN", help="An id, the beginning of one, last, or last~N.")],
    second: Annotated[str, typer.Argument(metavar="RUN", help="The other.")],
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Say what differs between two runs: settings, data, metrics."""
    from flows.history import compare as compare_runs
    from flows.history import find_run, show_comparison
    from tasks.runs import past_runs

    past = past_runs()
    found = compare_runs(find_run(first, past), find_run(second, past))
    if as_json:
        typer.echo(json.dumps(asdict(found), ensure_ascii=False))
    else:
        show_comparison(found, Console())


def hide_bars() -> None:
    """Keep the libraries' progress bars out of what is printed; before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _tell(text: str) -> None:
    err.print(text, soft_wrap=True, highlight=False, markup=False)


__all__ = ["app", "hide_bars"]
