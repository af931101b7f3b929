"""The commands of own data: peek, init."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from flows.cli.options import AsJson, SafeConsole, echo
from flows.running.quiet import hide_bars

if TYPE_CHECKING:
    from flows.peek import Peeked

app = typer.Typer()

SourceNames = Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Paths, globs or URLs.")]
ModelId = Annotated[
    str | None, typer.Option("--model", help="A model directory or Hub id, whose tokenizer and chat template to look with.")
]


@app.command()
def peek(sources: SourceNames, model: ModelId = None, as_json: AsJson = False) -> None:
    """Say what a source is and what would be made of it; only its beginning is read."""
    from flows import peek as looking

    hide_bars()
    found = looking.peek_source(tuple(sources), model)
    if as_json:
        echo(looking.as_json(found))
    else:
        show(found, SafeConsole())


@app.command()
def init(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A path, glob or URL.")],
    recipe: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The recipe to write.")],
    model: ModelId = None,
) -> None:
    """Write the recipe that would train on a source."""
    from flows import peek as looking
    from flows.suggest import recipe_text
    from tasks.refs import InputError

    hide_bars()
    if recipe.exists():
        raise InputError(f"init {recipe}: is there already; expected a file to be made. Remove it or name another.")
    found = looking.peek_source((source,), model)
    recipe.write_text(recipe_text({**found.settings, "name": recipe.stem.lower()}), encoding="utf-8")
    show(found, SafeConsole())
    echo(f"written: {recipe}; next: amazon-ft plan {recipe}")


def show(found: Peeked, console: SafeConsole) -> None:
    """For people: facts, rows with what is learnt in ⟦brackets⟧, the recipe."""
    from flows.suggest import recipe_text

    dialect, counted = found.look.dialect, "counted" if found.is_counted else "estimated"
    delimited = f", {dialect.encoding} with {dialect.delimiter!r} between fields" if dialect else ""
    console.print(f"format: {found.look.format.value}{delimited}; {found.files} file{'s' * (found.files > 1)}", highlight=False)
    console.print(f"columns: {', '.join(found.look.columns)}", highlight=False, markup=False)
    console.print(f"rows: {found.rows:,}, {counted}, of the kind {found.kind}", highlight=False)
    left_out = [f"{count:,} {reason}" for reason, count in found.dropped.items()]
    left_out += [f"{len(found.rejected):,} rejected ({found.rejected[0]})"] if found.rejected else []
    console.print(f"of the first {found.looked_at:,}: {', '.join(left_out) or 'none'} left out", highlight=False, markup=False)
    for number, example in enumerate(found.seen.examples, start=1):
        console.rule(f"row {number}")
        console.print(Text.assemble(*((f"⟦{text}⟧", "green") if learnt else text for text, learnt in example.pieces)))
    if found.seen.quantiles:
        lengths = ", ".join(f"{share} up to {length:,}" for share, length in found.seen.quantiles.items())
        console.print(f"{found.seen.unit} a row: {lengths}", highlight=False)
    console.rule("recipe")
    console.print(recipe_text(found.settings), highlight=False, markup=False, soft_wrap=True)
