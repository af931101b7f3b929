"""Shared by the groups of commands: consoles that are safe, exit codes, arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from tasks.reporting.visible import visible

FAILED, WRONG_INPUT = 1, 2


class SafeConsole(Console):
    """A console on which text of products, models and file names commands nothing, whatever it holds."""

    def render_str(self, text: str, **options: Any) -> Text:
        """As Rich does; before it measures how wide the text is."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As Rich does; what is Rich's own control of the terminal stays."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


def echo(text: str, *, nl: bool = True) -> None:
    """Print text to standard output as it is, but for what would command a terminal."""
    typer.echo(visible(text), nl=nl)


def print_found(found: Any, as_json: bool, draw: Callable[[Any, Console], None]) -> None:
    """Print what a command found: one line of JSON for programs, else drawn for people."""
    if as_json:
        echo(json.dumps(found, ensure_ascii=False))
    else:
        draw(found, SafeConsole())


err = SafeConsole(stderr=True)


def remark(text: str) -> None:
    """Say how a command gets on, a line that no width breaks, to standard error."""
    err.print(text, soft_wrap=True, highlight=False, markup=False)


RecipeName = Annotated[str, typer.Argument(metavar="[RECIPE|FILE]", help="A shipped recipe or a .yaml file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value; may be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show stack traces, and of a run Prefect's own log.")]
