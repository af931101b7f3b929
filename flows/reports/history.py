"""Past runs: which there are, and what differs between two of them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flows.reports.results import Results, flat
from tasks.caching import runs
from tasks.caching.locks import is_locked
from tasks.refs import InputError, home
from tasks.reporting.model_card import FIGURES

if TYPE_CHECKING:
    from rich.console import Console

LAST = re.compile(r"last(?:~(\d+))?")


@dataclass(frozen=True)
class Comparison:
    """Differences between two runs; equal values are left out."""

    first: str
    second: str
    config: list[tuple[str, Any, Any]]
    """(dotted key, both values)."""
    data: tuple[str, list[str], list[str]] | None
    """The first stage whose output differs, with the digests of what it made in both."""
    metrics: list[tuple[str, float | None, float | None]]
    """(figure of the tuned model, both values), equal ones too."""
    same_rows: bool
    """Whether both were measured on the same held-out rows."""


def find_run(name: str, past: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """A run, newest first, by its id, the unique beginning of one, `last`, or `last~N`, the Nth before it.

    >>> find_run("last~1", [{"id": "b"}, {"id": "a"}])
    {'id': 'a'}

    Raises:
        InputError: when there is none or several.
    """
    if match := LAST.fullmatch(name):
        found = [run for run in past if run.get("parent") is None][int(match[1] or 0) :][:1]
    else:
        found = [run for run in past if run["id"] == name] or [run for run in past if run["id"].startswith(name)]
    if len(found) == 1:
        return found[0]
    got = f"{len(found)} runs" if found else f"none of {len(past)} runs"
    raise InputError(
        f"run {name}: got {got}; expected one, by its id, a unique beginning of it, last or last~N. See amazon-ft runs."
    )


def compare_runs(first: Mapping[str, Any], second: Mapping[str, Any]) -> Comparison:
    """Return the differences between two run records."""
    one, other = flat(first["config"]), flat(second["config"])
    metrics = [Results(run).metrics for run in (first, second)]
    tuned = [measured.get("tuned", {}) for measured in metrics]
    rows = [[row["uids"] for row in measured.get("per_row", [])] for measured in metrics]
    return Comparison(
        first=first["id"],
        second=second["id"],
        config=[(key, one.get(key), other.get(key)) for key in {**one, **other} if one.get(key) != other.get(key)],
        data=first_difference(first["stages"], second["stages"]),
        metrics=[
            (figure, *(model.get(figure) for model in tuned)) for figure in FIGURES if any(figure in model for model in tuned)
        ],
        same_rows=rows[0] == rows[1],
    )


def first_difference(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> tuple[str, list[str], list[str]] | None:
    """The first stage whose outputs differ, and those; a stage that only one run came to differs.

    >>> first_difference([{"name": "ingest", "digest": "a"}], [{"name": "ingest", "digest": "b"}])
    ('ingest', ['a'], ['b'])
    """
    one, other = _outputs(first), _outputs(second)
    differing = (name for name in {**one, **other} if one.get(name) != other.get(name))
    return next(((name, one.get(name, []), other.get(name, [])) for name in differing), None)


def _outputs(stages: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in stages:
        found.setdefault(entry["name"], []).append(entry.get("digest", "none"))
    return found


def state(run: Mapping[str, Any]) -> str:
    """How a run came out: completed, running, failed, or stopped from without."""
    if run["finished"]:
        return "completed"
    if is_locked(home() / "runs" / f"{run['id']}.lock"):
        return "running"
    return "failed" if run["error"] else "stopped"


def listing() -> list[dict[str, Any]]:
    """Every run, newest first; trainings on a worker are part of theirs."""
    return [
        {
            "id": run["id"],
            "recipe": run["recipe"],
            "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(run["started"])),
            "state": state(run),
            "nll": Results(run).metrics.get("tuned", {}).get("nll"),
            "promoted": (run.get("verdict") or {}).get("promoted"),
        }
        for run in runs.past_runs()
        if run["parent"] is None
    ]


def show_runs(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One line a run."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for name in ("run", "recipe", "started", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("nll", justify="right")
    table.add_column("promoted")
    for row in rows:
        nll = "" if row["nll"] is None else f"{row['nll']:.4f}"
        promoted = {True: "yes", False: "no"}.get(row["promoted"], "")
        table.add_row(row["id"], row["recipe"], row["started"], row["state"], nll, promoted)
    console.print(table)


def show_comparison(found: Comparison, console: Console) -> None:
    """Config, data and metrics of two runs, as far as they differ."""
    from rich.table import Table

    def table(title: str, rows: Sequence[tuple[str, Any, Any]]) -> None:
        drawn = Table(box=None, padding=(0, 1))
        for name in (title, found.first, found.second):
            drawn.add_column(name, overflow="fold")
        for key, *values in rows:
            drawn.add_row(key, *("" if value is None else _short(value) for value in values))
        console.print(drawn, markup=False)

    if found.config:
        table("config", found.config)
    else:
        console.print("config: the same")
    if found.data:
        stage, first, second = found.data
        table("first stage that made something else", [(stage, _digests(first), _digests(second))])
    else:
        console.print("data: every stage made the same")
    if found.metrics:
        table("tuned model", found.metrics)
    if found.metrics and not found.same_rows:
        console.print("The two were measured on different held-out rows: their figures can't be set against each other.")


def _digests(outputs: Sequence[str]) -> str:
    return ", ".join(digest[:16] for digest in outputs)


def _short(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
