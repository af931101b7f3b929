"""The record of each run, runs/ID.json: what it was asked, what its stages did, which artifacts it relies on."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from tasks.caching.files import write_atomic
from tasks.refs import home

SEAL = "sha256"
"""Where a record holds the digest of the rest."""


@dataclass
class Run:
    """The record of one run, in runs/ID.json; locked for as long as the run lives."""

    recipe: str
    config: dict[str, Any]
    id: str = field(default_factory=lambda: f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid4().hex[:8]}")
    tags: list[str] = field(default_factory=list[str])
    """To filter runs by in the UI; all but the first make the title."""
    started: float = field(default_factory=time.time)
    stages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """One entry a stage call: name, key, code, inputs, sizes, state, reason, rows, seconds, digest, path."""
    artifacts: list[str] = field(default_factory=list[str])
    """KIND/DIGEST of every artifact that the run was handed or published."""
    verdict: dict[str, Any] | None = None
    """promoted, reasons, against; None before a model is saved."""
    until: str | None = None
    """The stage that the run was to end with; None for the recipe's end."""
    parent: str | None = None
    """The id of the run that it only trains for, on a worker."""
    finished: bool = False
    """Whether the run came to its end without an error."""
    error: str | None = None
    """Why the run ended before; None for a signal, too."""

    @property
    def title(self) -> str:
        """The name of the run in the UI and in trackers."""
        return " ".join(self.tags[1:]) or self.recipe

    @property
    def file(self) -> Path:
        """Where the record lies."""
        return home() / "runs" / f"{self.id}.json"

    def write(self) -> None:
        """Store what is known so far."""
        told = asdict(self)
        write_atomic(self.file, json.dumps({**told, SEAL: _digest(told)}).encode())


def read_run(text: str | bytes) -> dict[str, Any]:
    """A run's record, intact. 0.1.0 sealed none, and noted of a training on a worker only that it is one.

    Raises:
        ValueError: when it is torn or damaged.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("no record of a run")
    if "error" not in found and SEAL not in found:
        return {"until": None, "parent": "unknown" if found.get("child") else None, "error": None, **found}
    if found.pop(SEAL, None) != _digest(found):
        raise ValueError("the record of the run is damaged")
    return found


def _digest(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def past_runs() -> list[dict[str, Any]]:
    """All intact run records, newest first."""
    runs: list[dict[str, Any]] = []
    for file in _records():
        with suppress(ValueError, OSError):
            runs.append(read_run(file.read_bytes()))
    return sorted(runs, key=lambda run: float(run["started"]), reverse=True)


def damaged_runs() -> list[Path]:
    """The records that can't be relied on."""
    found: list[Path] = []
    for file in _records():
        try:
            read_run(file.read_bytes())
        except ValueError:
            found.append(file)
    return found


def _records() -> list[Path]:
    return [file for file in (home() / "runs").glob("*.json") if not file.name.startswith(".")]
