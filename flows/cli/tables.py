"""Output of the command line: tables for people, one JSON object for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from flows.reports.page import report_path
from flows.reports.results import read_lines
from tasks.caching.runs import Run
from tasks.catalogue import count_right
from tasks.refs import SavedModel, home

if TYPE_CHECKING:
    from flows.running.doctor import Finding
    from flows.running.garbage import Entry
    from tasks.caching.stage import Plan, Step
    from tasks.config import Recipe

MODELS = ("base", "tuned")
STATE_STYLES = {
    "cached": "bright_blue",
    "completed": "green",
    "failed": "red",
    "run": "yellow",
    "unknown": "dim",
    "ok": "green",
    "missing": "red",
}


def print_stages(entries: list[dict[str, Any]], console: Console) -> None:
    """One line a stage: state, rows, seconds, and why it ran."""
    table = Table(box=None, padding=(0, 1))
    for name in ("stage", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("rows in", "rows out", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    before = ""
    for entry in entries:
        rows = f"{entry['rows']:,}" if entry.get("rows") else ""
        seconds = f"{entry['seconds']:.1f}" if "seconds" in entry else ""
        table.add_row(entry["name"], _styled(entry["state"]), before, rows, seconds, escape(entry["reason"]))
        before = rows
    console.print(table)


def print_outcome(record: Run, recipe: Recipe, saved: SavedModel | None, console: Console) -> None:
    """Base against tuned, the verdict, and where the results lie."""
    if numbers := run_figures(record.stages, recipe):
        table = Table(box=None, padding=(0, 1))
        table.add_column("held-out answers")
        for column in MODELS:
            table.add_column(column, justify="right", no_wrap=True)
        for name, values in comparison_rows(numbers).items():
            table.add_row(name, *values)
        console.print(table)
    if record.verdict is not None:
        print_verdict(record.verdict, console)
    if saved is not None:
        console.print(f"model: {link_of(recipe, saved)}", soft_wrap=True, highlight=False)
    if saved is not None and (page := report_path(recipe.name)).is_file():
        console.print(f"report: {page}", soft_wrap=True, highlight=False)


def comparison_rows(numbers: Mapping[str, Any]) -> dict[str, list[str]]:
    """{what: [base, tuned]} as text.

    >>> base = {"nll": 2.5, "perplexity": 12.18, "perplexity_low": 11.5, "perplexity_high": 13, "rougeL": 0.25, "chrf": 20}
    >>> comparison_rows({"base": base, "tuned": base})["perplexity (95 %)"]
    ['12.18 (11.50 to 13.00)', '12.18 (11.50 to 13.00)']
    """
    both = [numbers[model] for model in MODELS]
    rows = {
        "nats per token": [f"{model['nll']:.4f}" for model in both],
        "perplexity (95 %)": [
            f"{model['perplexity']:.2f} ({model['perplexity_low']:.2f} to {model['perplexity_high']:.2f})" for model in both
        ],
    }
    if all("rougeL" in model for model in both):
        rows["ROUGE-L"] = [f"{model['rougeL']:.3f}" for model in both]
        rows["chrF"] = [f"{model['chrf']:.1f}" for model in both]
    if "generations" in numbers:
        rows["brand and material right"] = [f"{model['right']} of {numbers['generations']}" for model in both]
    return rows


def print_verdict(told: Mapping[str, Any], console: Console) -> None:
    """One line, and a line a reason."""
    word, style = ("promoted", "green") if told["promoted"] else ("not promoted", "yellow")
    console.print(f"verdict: [{style}]{word}[/]", highlight=False)
    for reason in told["reasons"]:
        console.print(Padding(escape(f"- {reason}"), (0, 0, 0, 2)), highlight=False)


def run_figures(entries: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any] | None:
    """The numbers of the evaluation; for the generated catalogue also how many answers state the facts of their title."""
    evaluated = next((entry for entry in entries if entry["name"] == "evaluate" and "path" in entry), None)
    if evaluated is None:
        return None
    path = home() / evaluated["path"]
    measured = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
    if not measured["rows"]:
        return None
    numbers: dict[str, Any] = {name: measured[name] for name in ("rows", "tokens", *MODELS, "difference")}
    if recipe.catalogue is None:
        return numbers
    said = read_lines(path / "generations.jsonl")
    right = {model: numbers[model] | {"right": count_right(said, model)} for model in MODELS}
    return numbers | right | {"generations": len(said)}


def link_of(recipe: Recipe, saved: SavedModel) -> str:
    """Where the user finds the model."""
    return str(home() / "models" / recipe.name / saved.name)


def summarize_run(record: Run, recipe: Recipe, saved: SavedModel | None) -> dict[str, Any]:
    """The run as one JSON object; a number that is none is null."""
    names = ("name", "state", "seconds", "rows", "path", "digest", "reason")
    return {
        "stages": [{name: entry.get(name) for name in names} for entry in record.stages],
        "metrics": _finite(run_figures(record.stages, recipe)),
        "verdict": record.verdict,
        "artifact": link_of(recipe, saved) if saved else None,
        "report": str(page) if saved and (page := report_path(recipe.name)).is_file() else None,
    }


def print_plan(found: Plan, console: Console) -> None:
    """One line a stage: cached, run or unknown, and why."""
    table = Table(box=None, padding=(0, 1))
    for name in ("stage", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for item in found.steps:
        table.add_row(item.name, _styled(item.state), f"{item.rows:,}" if item.rows else "", escape(item.reason))
    console.print(table)


def step_as_json(item: Step) -> dict[str, Any]:
    """A planned stage as JSON."""
    return {"name": item.name, "state": item.state, "reason": item.reason, "rows": item.rows, "key": item.key}


def print_findings(found: Iterable[Finding], console: Console) -> None:
    """One line a check, and below it what to do."""
    table = Table(box=None, padding=(0, 1))
    for name in ("check", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in found:
        advice = f"\n[dim]{escape(finding.advice)}[/]" if finding.advice else ""
        table.add_row(finding.check, _styled(finding.state), escape(finding.found) + advice)
    console.print(table)


def print_inventory(entries: list[Entry], console: Console) -> None:
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


def print_removed(entries: list[Entry], console: Console, *, dry_run: bool) -> None:
    """List what gc removed, or would."""
    verb = "would remove" if dry_run else "removed"
    for entry in entries:
        console.print(f"{verb} {entry.path} ({_bytes(entry.size_bytes)})", highlight=False, soft_wrap=True)
    total = sum(entry.size_bytes for entry in entries)
    console.print(f"{verb} {len(entries)} in all, {_bytes(total)}", highlight=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity.

    >>> _finite({"nll": float("nan"), "rows": 3})
    {'nll': None, 'rows': 3}
    """
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in cast("dict[str, Any]", value).items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _styled(state: str) -> str:
    style = STATE_STYLES.get(state)
    return f"[{style}]{state}[/]" if style else state


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
