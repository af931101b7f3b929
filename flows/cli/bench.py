"""Measurements that a user can repeat: `amazon-ft bench ...`; whole processes of ours and of the document's, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flows.choices import Against, Held, Shape, Written

if TYPE_CHECKING:
    from tasks.refs import Model, Tokenizer

app = typer.Typer(no_args_is_help=True, help="Measure, on this machine.")


@app.callback()
def bench() -> None:
    """Measure, on this machine."""


@app.command()
def data(
    rows: Annotated[int, typer.Option(min=5000, help="Product lines to generate and read.")] = 2_248_619,
    against: Annotated[Against | None, typer.Option(help="Run the document's own code in turn with ours; needs Unsloth.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer directory; else that of the recipe's model.")] = None,
    recipe: Annotated[str, typer.Option(help="Recipe whose data stages are run.")] = "default",
    turns: Annotated[list[int] | None, typer.Option(help="Turns a conversation; may be repeated; else 1 and 3.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each side; the median counts.")] = 1,
    written: Annotated[Written, typer.Option("--format", help="Of the file that is read.")] = Written.JSON_LINES,
) -> None:
    """From product lines to token ids of 100,000 conversations: seconds, rows/s, MB/s and memory."""
    from flows.bench.data import bench_data
    from flows.recipes import load_recipe
    from tasks.model import base_model

    directory = tokenizer or Path(base_model(load_recipe(recipe).model).tokenizer.path)
    sides = ("ours", "document") if against else ("ours",)
    asked = tuple(turns or (1, 3))
    found = bench_data(rows, directory, recipe, sides=sides, turns=asked, repeats=repeats, console=Console(), written=written)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@app.command()
def train(
    against: Annotated[Against | None, typer.Option(help="Run the document's own code after ours; needs Unsloth.")] = None,
    model: Annotated[Path | None, typer.Option(help="A model directory; else fast's, on a CPU a tiny one.")] = None,
    shape: Annotated[list[Shape] | None, typer.Option(help="Random weights of this shape; may be repeated.")] = None,
    data: Annotated[Path | None, typer.Option(help="Holds packs.arrow and texts.json; else generated.")] = None,
    held: Annotated[list[Held] | None, typer.Option(help="How the base matrices lie in memory; may be repeated.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="Train on so many GPUs too, after one, in steps of as many packs.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there.")] = None,
) -> None:
    """Text tokens a second of the fast backend: share of the matmul limit, memory, seconds to the first step.

    With --shape, --model gives the tokenizer alone; token ids beyond a shape's vocabulary are taken modulo its size.
    """
    from flows.bench.train import bench_train, device_here
    from flows.bench.train_shapes import bench_shapes

    if shape and against:
        raise typer.BadParameter("has no other side for random weights", param_hint="--against")
    device, ways = device_here(), [way.value for way in held or [Held.AUTO]]
    with TemporaryDirectory() as scratch:
        if shape:
            tokenizer = bench_tokenizer(model, device)
            source, names = bench_source(data, tokenizer, Path(scratch), device), [name.value for name in shape]
            found = bench_shapes(names, tokenizer, source, held=ways, devices=devices, console=Console())
        else:
            reference = bench_model(model, Path(scratch), device)
            source, compared = bench_source(data, reference.tokenizer, Path(scratch), device), against is not None
            found = bench_train(reference, source, held=ways, against_document=compared, devices=devices, console=Console())
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def bench_model(model: Path | None, scratch: Path, device: str) -> Model:
    """The model that was named, or what stands in for it."""
    from flows.bench.train_data import tiny_model
    from flows.recipes import load_recipe
    from tasks.model import base_model, with_weights
    from tasks.reading.model_files import directory_model

    if model is not None:
        return directory_model(model.resolve(), name=model.resolve().name)
    if device == "cuda":
        return with_weights(base_model(load_recipe("fast", ["ingest.sources=trn.json"]).model))
    return tiny_model(Path(base_model(load_recipe("demo").model).tokenizer.path), scratch / "tiny")


def bench_tokenizer(model: Path | None, device: str) -> Tokenizer:
    """The tokenizer of the model that was named, which needs no weights then, or of what stands in for it."""
    from flows.recipes import load_recipe
    from tasks.model import base_model
    from tasks.reading.model_files import directory_tokenizer

    if model is not None:
        return directory_tokenizer(model.resolve())
    recipe = load_recipe("fast", ["ingest.sources=trn.json"]) if device == "cuda" else load_recipe("demo")
    return base_model(recipe.model).tokenizer


def bench_source(data: Path | None, tokenizer: Tokenizer, scratch: Path, device: str) -> Path:
    """The data that was named, or generated."""
    from flows.bench.train_data import bench_recipe, make_data

    return data.resolve() if data is not None else make_data(bench_recipe(device), tokenizer, scratch / "data")
