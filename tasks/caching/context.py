"""The run that this code is in: one value that stages and what they call look up, instead of taking it through every function.

with open_run("demo", settings, engine=PREFECT, observers=[...]) as run:     a record, a lock, observers
...                                                                      stage calls run or are served
with planning("demo") as plan:                                               nothing runs, nothing is told
...
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tasks.caching.events import Event, Observer, RunBegan, RunEnded, StageBegan, StageEnded
from tasks.caching.locks import locked
from tasks.caching.plans import Plan
from tasks.caching.runs import Run
from tasks.config import Verify
from tasks.refs import InputError, home


class Engine(Protocol):
    """Runs the bodies of stages: engine.py, by Prefect."""

    def start(self, stage: Any, calls: Sequence[Any]) -> Sequence[Callable[[], Any]]:
        """For each call (stage.py, Call) of a stage, what waits for its outcome (stage.py, Made)."""
        ...


@dataclass(frozen=True)
class Context:
    """The surroundings of a stage's call."""

    run: Run | None = None
    plan: Plan | None = None
    """Stage calls are only being planned."""
    until: str | None = None
    """The stage that the run is to end with."""
    verify: Verify = "full"
    """How cached artifacts are checked."""
    key: str | None = None
    """Of the stage that is running."""
    engine: Engine | None = None
    observers: tuple[Observer, ...] = ()
    elsewhere: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """{key: entry} of the stage calls that a run on a worker made for this one."""


_context: ContextVar[Context] = ContextVar("context")


def context() -> Context:
    """Return the present one."""
    return _context.get(Context())


@contextmanager
def within(**changes: Any) -> Generator[Context]:
    """Change the present context for the block."""
    token = _context.set(replace(context(), **changes))
    try:
        yield context()
    finally:
        _context.reset(token)


def tell(event: Event) -> None:
    """Let all observers of the present context hear of an event."""
    for observer in context().observers:
        observer.hear(event)


@contextmanager
def observing(*observers: Observer) -> Generator[None]:
    """Let these hear of what happens in the block, too."""
    with within(observers=(*context().observers, *observers)):
        try:
            yield
        finally:
            for observer in observers:
                observer.close()


@contextmanager
def planning(recipe: str) -> Generator[Plan]:
    """Answer stage calls from their records instead of running them; reasons compare with the recipe's last run."""
    plan = Plan(recipe)
    with within(plan=plan):
        yield plan


class RunRecord:
    """Keeps runs/ID.json up to date."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def hear(self, event: Event) -> None:
        """Note each stage call as it begins and as it ends."""
        if isinstance(event, StageBegan):
            self._run.stages.append(event.entry)
        if isinstance(event, (RunBegan, StageBegan, StageEnded, RunEnded)):
            self._run.write()

    def close(self) -> None:
        """Everything is written."""


@contextmanager
def open_run(
    recipe: str,
    config: Mapping[str, Any],
    *,
    tags: Sequence[str] = (),
    until: str | None = None,
    parent: str | None = None,
    engine: Engine | None = None,
    observers: Sequence[Observer] = (),
) -> Generator[Run]:
    """Keep a run's record and its lock, and tell its observers, while the block lives; a run inside a run is part of the outer.

    Raises:
        InputError: when nothing can be written under AMAZON_FT_HOME.
    """
    if (outer := context().run) is not None:
        yield outer
        return
    run = Run(recipe, dict(config), tags=list(tags), until=until or context().until, parent=parent)
    check_root()
    record = RunRecord(run)
    held, here = locked(run.file.with_suffix(".lock"), remove=True), within(run=run, until=run.until, engine=engine)
    with held, here, observing(record, *observers):
        try:
            tell(RunBegan(run))
            yield run
            run.finished = True
        except Exception as error:
            run.error = f"{error}" or type(error).__name__
            raise
        finally:
            tell(RunEnded(run))


def check_root() -> None:
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
