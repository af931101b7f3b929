"""What the command line prints: tables for people, one JSON object for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tasks.refs import SavedModel, home

if TYPE_CHECKING:
    from flows.cache import Entry
    from tasks.config import Recipe
    from tasks.stage import Plan, Step

STATE_STYLES = {"cached": "bright_blue", "completed": "green", "failed": "red", "run": "yellow", "unknown": "dim"}


def stages(entries: list[dict[str, Any]], console: Console) -> None:
    """One line a stage: state, rows, seconds, and why it ran."""
    table = Table(box=None, padding=(0, 1))
    for name in ("stage", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("rows in", "rows out", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    before = ""
    for entry in entries:
        rows = f"{entry['rows']:,}" if "rows" in entry else ""
        seconds = f"{entry['seconds']:.1f}" if "seconds" in entry else ""
        table.add_row(entry["name"], _styled(entry["state"]), before, rows, seconds, entry["reason"])
        before = rows
    console.print(table)


def outcome(entries: list[dict[str, Any]], recipe: Recipe, saved: SavedModel | None, console: Console) -> None:
    """Base against tuned, and where the results lie."""
    metrics = _metrics(entries)
    if metrics:
        table = Table(box=None, padding=(0, 1))
        table.add_column("held-out answers")
        for column in ("base", "tuned"):
            table.add_column(column, justify="right")
        for name, values in comparison(metrics).items():
            table.add_row(name, *values)
        console.print(table)
    if saved is not None:
        console.print(f"model: {link(recipe, saved)}", soft_wrap=True, highlight=False)


def comparison(metrics: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """{what: (base, tuned)} as text."""
    return {
        "nats per token": (f"{metrics['base_nll']:.4f}", f"{metrics['tuned_nll']:.4f}"),
        "perplexity": (f"{metrics['base_perplexity']:.2f}", f"{metrics['tuned_perplexity']:.2f}"),
    }


def link(recipe: Recipe, saved: SavedModel) -> str:
    """Where the user finds the model."""
    return str(home() / "models" / recipe.name / saved.name)


def summary(entries: list[dict[str, Any]], recipe: Recipe, saved: SavedModel | None) -> dict[str, Any]:
    """The run as one JSON object."""
    names = ("name", "state", "seconds", "rows", "path", "digest", "reason")
    return {
        "stages": [{name: entry.get(name) for name in names} for entry in entries],
        "metrics": _metrics(entries),
        "artifact": link(recipe, saved) if saved else None,
    }


def _metrics(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    evaluated = next((entry for entry in entries if entry["name"] == "evaluate" and "path" in entry), None)
    if evaluated is None:
        return None
    metrics = json.loads((home() / evaluated["path"] / "metrics.json").read_text())
    return metrics if "base_nll" in metrics else None


def plan(found: Plan, console: Console) -> None:
    """One line a stage: cached, run or unknown, and why."""
    table = Table(box=None, padding=(0, 1))
    for name in ("stage", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for item in found.steps:
        table.add_row(item.name, _styled(item.state), f"{item.rows:,}" if item.rows else "", item.reason)
    console.print(table)


def step(item: Step) -> dict[str, Any]:
    """A planned stage as JSON."""
    return {"name": item.name, "state": item.state, "reason": item.reason, "rows": item.rows, "key": item.key}


def inventory(entries: list[Entry], console: Console) -> None:
    """Sizes by kind, then each directory with the runs that refer to it."""
    sizes: dict[str, int] = {}
    for entry in entries:
        sizes[entry.kind] = sizes.get(entry.kind, 0) + entry.size_bytes
    table = Table(box=None, padding=(0, 1))
    table.add_column("kind")
    table.add_column("size", justify="right")
    table.add_column("path", overflow="fold")
    table.add_column("runs", justify="right")
    for entry in entries:
        table.add_row(entry.kind, _bytes(entry.size_bytes), entry.path, str(len(entry.runs)))
    console.print(table)
    for kind, size in sorted(sizes.items(), key=lambda item: -item[1]):
        console.print(f"{kind}: {_bytes(size)}", highlight=False)
    console.print(f"total: {_bytes(sum(sizes.values()))} under {home()}", highlight=False, soft_wrap=True)


def removed(entries: list[Entry], console: Console, *, dry_run: bool) -> None:
    """What gc removed, or would."""
    verb = "would remove" if dry_run else "removed"
    for entry in entries:
        console.print(f"{verb} {entry.path} ({_bytes(entry.size_bytes)})", highlight=False, soft_wrap=True)
    total = sum(entry.size_bytes for entry in entries)
    console.print(f"{verb} {len(entries)} in all, {_bytes(total)}", highlight=False)


def _styled(state: str) -> str:
    style = STATE_STYLES.get(state)
    return f"[{style}]{state}[/]" if style else state


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
