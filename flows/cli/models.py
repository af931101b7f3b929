"""The commands of saved models: models, ask, export, serve."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated

import typer

from flows.choices import Bits, Format
from flows.cli.options import AsJson, echo, print_found, remark
from flows.running.quiet import hide_bars

app = typer.Typer()

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A saved model's directory, RECIPE/NAME, or a recipe that has run.")
]


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the saved models of AMAZON_FT_HOME, newest first."""
    from flows.models.saved import list_saved, show_models

    print_found(list_saved(), as_json, show_models)


@app.command()
def ask(
    model: ModelName,
    title: Annotated[str | None, typer.Option(help="Of the product; else titles are asked for, one after another.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The user's words as they are, of a model of conversations.")] = None,
    column: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Of the product; may be repeated.")] = None,
    question: Annotated[str | None, typer.Option(help="Else the recipe's own.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Let the base model answer too.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Else evaluate.max_new_tokens of the recipe.")] = None,
) -> None:
    """Ask a saved model about a product, or whatever it was trained on conversations of."""
    from flows.models.ask import AskOptions, answer_titles
    from flows.models.saved import find_saved

    hide_bars()
    saved = find_saved(model)
    remark(f"model: {saved.path}")
    columns = dict(_pair(text) for text in column or ())
    options = AskOptions(title, question, compare, max_new_tokens, prompt, columns)
    answer_titles(saved, options, read=input, say=_sayer())


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"got {text}; expected NAME=VALUE", param_hint="--column")
    return name.strip(), value


@app.command()
def export(
    model: ModelName,
    out: Annotated[Path, typer.Argument(help="The directory to make.")],
    how: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.MERGED,
    bits: Annotated[Bits | None, typer.Option(help="Of a GGUF file's matrices; else the model's own 16.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Ask a GGUF file the held-out questions in llama.cpp.")] = False,
    push: Annotated[str | None, typer.Option(metavar="HUB_ID", help="Upload it too; the token is HF_TOKEN.")] = None,
) -> None:
    """Write a saved model in another form, and load it again to see that it answers the same."""
    from flows.models.export import GgufOptions, announce, export_model, push_to_hub, read_token
    from flows.models.saved import find_saved

    hide_bars()
    saved, token = find_saved(model), read_token() if push else ""
    announce(export_model(saved, how, out.absolute(), GgufOptions(bits, check)), out, echo, check=check)
    if push:
        echo(f"pushed: {push_to_hub(out, push, token)}")


@app.command()
def serve(
    model: ModelName,
    port: Annotated[int, typer.Option(min=1, max=65_535, help="On 127.0.0.1.")] = 8000,
) -> None:
    """Serve a saved model at an OpenAI-compatible endpoint, until Ctrl-C.

    With AMAZON_FT_API_KEY set, only to those who send it as a bearer token. By vLLM, of this environment or
    at AMAZON_FT_VLLM, the adapter stays unmerged, and of a recipe the model promoted next is served without a restart.
    """
    from flows.models.saved import find_saved, promoted_link
    from flows.models.serve import become_server

    hide_bars()
    become_server(find_saved(model), port, remark, link=promoted_link(model))


def _sayer() -> Callable[[str], None]:
    """Where an answer goes: to a program as it is, to a terminal in lines of words."""
    from flows.cli.terminal import WrappedWords

    def say(text: str) -> None:
        echo(text, nl=False)

    return WrappedWords(get_terminal_size().columns, say) if sys.stdout.isatty() else say
