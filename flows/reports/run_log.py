"""The log of a run, runs/ID.log: what its stages said, on whatever machine; read by `amazon-ft logs`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.caching.events import Event, RunBegan, RunEnded
from tasks.caching.locks import is_locked
from tasks.refs import InputError, home
from tasks.reporting.visible import visible

LOOK_SECONDS = 0.5
LOGGERS = ("tasks", "flows")


class RunLog:
    """Writes what is logged in this process while a run lives."""

    def __init__(self, parent: str | None = None) -> None:
        """With `parent`, under that run, which this one only trains for."""
        self._parent = parent
        self._handler: logging.Handler | None = None

    def hear(self, event: Event) -> None:
        """Begin with the run, and end with what ended it."""
        if isinstance(event, RunBegan):
            self._handler = logging.FileHandler(log_path(self._parent or event.run.id), encoding="utf-8", errors="replace")
            self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            for name in LOGGERS:
                logging.getLogger(name).addHandler(self._handler)
        elif isinstance(event, RunEnded) and event.run.error and self._handler:
            self._handler.handle(logging.LogRecord("flows", logging.ERROR, "", 0, visible(event.run.error), (), None))

    def close(self) -> None:
        """Let go of the file."""
        if self._handler is not None:
            for name in LOGGERS:
                logging.getLogger(name).removeHandler(self._handler)
            self._handler.close()


def log_path(run: str) -> Path:
    """Where the log of a run lies."""
    return home() / "runs" / f"{run}.log"


def log_lines(run: Mapping[str, Any], *, follow: bool = False) -> Iterator[str]:
    """The lines of a run's log; with `follow` also those to come, until it ends.

    Raises:
        InputError: when it has none.
    """
    path = log_path(run["id"])
    if not path.is_file():
        raise InputError(f"run {run['id']}: has no log: expected {path}. Runs of 0.1.0 kept none; for others see amazon-ft runs.")
    lock = path.with_suffix(".lock")
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        while True:
            lives = follow and is_locked(lock)  # asked first: what is written before the end is read
            yield from lines
            if not lives:
                return
            time.sleep(LOOK_SECONDS)
