"""Measurements that a user can repeat: `amazon-ft bench ...`; whole processes of ours and of the document's, side by side."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, help="Measure, on this machine.")


class Against(StrEnum):
    """What to compare with."""

    DOCUMENT = "document"


@app.callback()
def bench() -> None:
    """Measure, on this machine."""


@app.command()
def data(
    rows: Annotated[int, typer.Option(min=1000, help="Product lines to generate and read.")] = 2_248_619,
    against: Annotated[Against | None, typer.Option(help="Run the document's own code in turn with ours; needs Unsloth.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer directory; else that of the recipe's model.")] = None,
    recipe: Annotated[str, typer.Option(help="Recipe whose data stages are run.")] = "default",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each side; the median counts.")] = 1,
) -> None:
    """From product lines to token ids of 100,000 conversations: seconds, rows/s, MB/s and memory."""
    from flows.bench.data import bench_data
    from flows.recipes import load_recipe
    from tasks.model import base_model

    directory = tokenizer or Path(base_model(load_recipe(recipe).model).tokenizer.path)
    found = bench_data(rows, directory, recipe, against_document=against is not None, repeats=repeats, console=Console())
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


__all__ = ["app"]
