"""Shared by the groups of commands: consoles, exit codes, arguments."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

FAILED, WRONG_INPUT = 1, 2

err = Console(stderr=True)

RecipeName = Annotated[str, typer.Argument(metavar="[RECIPE|FILE]", help="A shipped recipe or a .yaml file.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value; may be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show stack traces, and of a run Prefect's own log.")]
