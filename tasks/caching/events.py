"""The events of a run, and how those hear of them that subscribe: its record, the terminal, the Prefect UI, trackers.

    RunBegan -> (StageBegan -> RowsPassed ... | StepsLogged ... -> StageEnded) ... -> ModelSaved -> RunEnded

An observer of its own thread (`Detached`) may be slow or fail: it never holds up or ends a run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from tasks.caching.runs import Run
from tasks.refs import SavedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunBegan:
    """A run has its record."""

    run: Run


@dataclass(frozen=True)
class StageBegan:
    """A stage is about to run or to be served."""

    entry: dict[str, Any]
    """Its entry in the run's record; kept up to date until it ends."""


@dataclass(frozen=True)
class RowsPassed:
    """So much of a stage is done."""

    stage: str
    speed: str
    """Such as `3,000 rows, 1,000 a second`."""
    share: float
    """Of all the stage's work, from 0 to 1."""


@dataclass(frozen=True)
class StepsLogged:
    """How a training stands after a logged step; the means are over the steps since the event before."""

    step: int
    steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    eta_seconds: float
    records: tuple[Mapping[str, Any], ...] = ()
    """Those steps, as train_log.jsonl has them."""


@dataclass(frozen=True)
class StageEnded:
    """A stage ran, was served or failed."""

    entry: Mapping[str, Any]
    inputs: Mapping[str, Any]
    value: BaseModel | None
    """The reference that it returned; None where it failed."""


@dataclass(frozen=True)
class ModelSaved:
    """The run's model is saved, judged and reported."""

    run: Run
    saved: SavedModel
    link: Path
    page: Path | None
    """report.html, where it could be written."""


@dataclass(frozen=True)
class RunEnded:
    """The run has come to its end, whichever."""

    run: Run


@dataclass(frozen=True)
class TrainingLeft:
    """The training runs as a flow run of its own, which tells of it."""

    name: str


@dataclass(frozen=True)
class Noticed:
    """Something that a person should look at."""

    topic: str
    summary: str
    text: str
    """Markdown."""


Event = RunBegan | StageBegan | RowsPassed | StepsLogged | StageEnded | TrainingLeft | Noticed | ModelSaved | RunEnded


class Observer(Protocol):
    """Hears of a run."""

    def hear(self, event: Event) -> None:
        """Take an event; they come in order."""
        ...

    def close(self) -> None:
        """Let go: nothing more will happen."""
        ...


class Detached:
    """Calls an observer on a thread of its own, with the settings of its maker; an error is logged once."""

    def __init__(
        self, observer: Observer, name: str, *, close_seconds: float, newest: tuple[type, ...] = (RowsPassed, StepsLogged)
    ) -> None:
        """Of events of the types `newest`, one that comes while another waits takes its place, so that they never pile up."""
        self._observer, self._name, self._close_seconds, self._newest = observer, name, close_seconds, newest
        self._waiting: list[Event] = []
        self._closed = self._failed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), name=name, daemon=True)

    def hear(self, event: Event) -> None:
        """Leave the event for the observer; the first starts the thread."""
        with self._change:
            if self._thread.ident is None:
                self._thread.start()
            if isinstance(event, self._newest):
                self._waiting = [waiting for waiting in self._waiting if type(waiting) is not type(event)]
            self._waiting.append(event)
            self._change.notify()

    def close(self) -> None:
        """Let the observer take what is left, for so many seconds at most."""
        with self._change:
            if self._thread.ident is None:
                return
            self._closed = True
            self._change.notify()
        self._thread.join(self._close_seconds)
        if self._thread.is_alive():
            logger.warning("%s did not take all that it was told within %.0f s; the run ends.", self._name, self._close_seconds)

    def _run(self) -> None:
        while (event := self._next()) is not None:
            self._try(self._observer.hear, event)
        self._try(self._observer.close)

    def _next(self) -> Event | None:
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._closed)
            return self._waiting.pop(0) if self._waiting else None

    def _try(self, call: Callable[..., None], *arguments: Event) -> None:
        try:
            call(*arguments)
        except Exception as error:
            if not self._failed:
                told = f"{self._name} could not be told of this run ({type(error).__name__}: {error}); the run goes on."
                logger.warning(told, exc_info=logger.isEnabledFor(logging.DEBUG))
            self._failed = True
