"""The record of each run, runs/ID.json: what it was asked, what its stages did, which artifacts it relies on."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from tasks.caching.files import write_atomic
from tasks.refs import home


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
        write_atomic(self.file, json.dumps(asdict(self)).encode())


def past_runs() -> list[dict[str, Any]]:
    """All run records, newest first; a torn one is left out. 0.1.0 noted of a training on a worker only that it is one."""
    runs: list[dict[str, Any]] = []
    for file in (home() / "runs").glob("*.json"):
        with suppress(ValueError, OSError):
            found = json.loads(file.read_text(encoding="utf-8"))
            runs.append({"until": None, "parent": "unknown" if found.get("child") else None, "error": None, **found})
    return sorted(runs, key=lambda run: float(run["started"]), reverse=True)
