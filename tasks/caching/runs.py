"""The record of each run, runs/ID.json: what it was asked, what its stages did, which artifacts it relies on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from tasks.caching.files import write_atomic
from tasks.caching.locks import flock, mutex
from tasks.refs import Artifact, InputError, home


@dataclass
class Run:
    """What one run used, in runs/ID.json; locked for as long as the run lives."""

    recipe: str
    config: dict[str, Any]
    id: str = field(default_factory=lambda: f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid4().hex[:8]}")
    started: float = field(default_factory=time.time)
    stages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """One entry a stage call: name, key, code, inputs, state, reason, rows, seconds, digest, path."""
    artifacts: list[str] = field(default_factory=list[str])
    """KIND/DIGEST of every artifact that the run was handed or published."""
    verdict: dict[str, Any] | None = None
    """promoted, reasons, against; None before a model is saved."""
    until: str | None = None
    """The stage that the run was to end with; None for the recipe's end."""
    child: bool = False
    """Whether it only trains for another run, on a worker."""
    finished: bool = False
    """Whether the run came to its end without an error."""

    @property
    def file(self) -> Path:
        """Where the record lies."""
        return home() / "runs" / f"{self.id}.json"

    def write(self) -> None:
        """Store what is known so far."""
        write_atomic(self.file, json.dumps(asdict(self)).encode())


_open_runs: list[Run] = []


@contextmanager
def run_record(recipe: str, config: dict[str, Any], *, until: str | None = None, child: bool = False) -> Generator[Run]:
    """Keep the record of a run while the block lives; a run inside a run adds to the outer one.

    Raises:
        InputError: when nothing can be written under AMAZON_FT_HOME.
    """
    if _open_runs:
        yield _open_runs[-1]
        return
    run = Run(recipe, config, until=until, child=child)
    _check_root()
    with flock(run.file.with_suffix(".lock"), remove=True):
        _open_runs.append(run)
        try:
            run.write()
            yield run
            run.finished = True
        finally:
            _open_runs.pop()
            run.write()


def _check_root() -> None:
    """Refuse a root that can't be written, before anything is computed.

    Raises:
        InputError: naming it.
    """
    reason = "it may only be read"
    try:
        home().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
    else:
        if os.access(home(), os.W_OK | os.X_OK):
            return
    raise InputError(f"AMAZON_FT_HOME: {home()}: {reason}; expected a directory to write to. Name another one.")


def current_run() -> Run | None:
    """The run that this process is in."""
    return _open_runs[-1] if _open_runs else None


def use(*artifacts: Artifact) -> None:
    """Note that the present run relies on these artifacts, before it looks at them, so that gc keeps them."""
    run = current_run()
    if run is None:
        return
    names = [f"{artifact.kind}/{artifact.digest[:32]}" for artifact in artifacts]
    new = [name for name in names if name not in run.artifacts]
    if new:
        with mutex():
            run.artifacts.extend(new)
            run.write()


def past_runs() -> list[dict[str, Any]]:
    """All run records, newest first; a torn one is left out."""
    runs: list[dict[str, Any]] = []
    for file in (home() / "runs").glob("*.json"):
        with suppress(ValueError, OSError):
            runs.append({"until": None, "child": False, **json.loads(file.read_text(encoding="utf-8"))})
    return sorted(runs, key=lambda run: float(run["started"]), reverse=True)


__all__ = ["Run", "current_run", "past_runs", "run_record", "use"]
