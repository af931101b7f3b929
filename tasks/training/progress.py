"""Who hears of a training while it runs: a bar on a terminal, and whoever else asked (the Prefect UI).

Every listener is called on a thread of its own, from a queue of one: it gets the newest report, may be slow, may fail, and
never holds up or ends the training. Not part of any stage's identity.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from tasks.training.backend import Progress, Report

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0
"""How long the end of a training waits for a listener to take the last report."""

_listeners: ContextVar[tuple[Progress, ...]] = ContextVar("listeners", default=())


@contextmanager
def listening(*listeners: Progress) -> Generator[None]:
    """Tell these of any training in the block."""
    token = _listeners.set((*_listeners.get(), *listeners))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextmanager
def announced() -> Generator[Progress]:
    """The progress that a training reports to: all listeners, and a bar if standard error is a terminal."""
    listeners = [*_listeners.get(), *([Bar()] if sys.stderr.isatty() else [])]
    progress = All([Detached(listener) for listener in listeners])
    try:
        yield progress
    finally:
        progress.close()


class All:
    """Passes everything on to several."""

    def __init__(self, listeners: Sequence[Progress]) -> None:
        self._listeners = listeners

    def report(self, report: Report) -> None:
        """To each of them."""
        for listener in self._listeners:
            listener.report(report)

    def close(self) -> None:
        """Close each of them."""
        for listener in self._listeners:
            listener.close()


class Detached:
    """Calls a listener on a thread of its own with the newest report; an error is logged once and ends the listening."""

    def __init__(self, listener: Progress) -> None:
        self._listener = listener
        self._newest: Report | None = None
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def report(self, report: Report) -> None:
        """Leave the report for the listener; one that it has not taken yet is replaced."""
        with self._change:
            self._newest = report
            self._change.notify()

    def close(self) -> None:
        """Let the listener take the last report, for a few seconds at most."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            while (report := self._next()) is not None:
                self._listener.report(report)
            self._listener.close()
        except Exception:
            logger.warning("A listener of the training's progress failed and is no longer told.", exc_info=True)

    def _next(self) -> Report | None:
        with self._change:
            self._change.wait_for(lambda: self._newest is not None or self._closed)
            report, self._newest = self._newest, None
            return report


class Bar:
    """A progress bar on the terminal with loss, tokens per second and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        self._rich = Rich(
            TextColumn("finetune"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._rich.add_task("starting", total=None)
        self._rich.start()

    def report(self, report: Report) -> None:
        """Move on."""
        speed = f"{report.tokens_per_second:,.0f} tok/s"
        line = f"loss {report.loss:.4f}  lr {report.learning_rate:.2e}  |g| {report.grad_norm:.2f}  {speed}"
        self._rich.update(self._task, total=report.steps, completed=report.step, description=line)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._rich.stop()
