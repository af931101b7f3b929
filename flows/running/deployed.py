"""A flow run that a worker started: known by its deployment, logged to the server, ended with its worker."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

from flows.running import supervisor
from tasks.config import Recipe
from tasks.reporting.visible import log_visibly

if TYPE_CHECKING:
    from uuid import UUID


def flow_run_id() -> UUID | None:
    """The present flow run, if a worker runs it from a deployment."""
    if "prefect.context" not in sys.modules:  # no flow runs without it, and importing it is slow
        return None
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    run = context.flow_run if context is not None else None
    return run.id if run is not None and run.deployment_id is not None else None


def recipe_name() -> str:
    """Prefect's flow_run_name of the parent, until its run is open and has its title (flows/reports/ui.py)."""
    from prefect.runtime import flow_run

    settings: Any = flow_run.parameters["config"]
    return settings.name if isinstance(settings, Recipe) else str(settings.get("name", "amazon-ft"))


class Unbroken:
    """A stream to the worker that loses what a dead worker can't take."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream does."""
        with suppress(BrokenPipeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As the stream does."""
        with suppress(BrokenPipeError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_worker() -> None:
    """Let no line that is written after the worker died end the flow run before it has written its checkpoint.

    Prefect logs through Rich, which ends the program at a broken pipe unless it is told otherwise.
    Source: https://rich.readthedocs.io/en/stable/reference/console.html#rich.console.Console.on_broken_pipe
    """
    from rich.console import Console

    def stay(self: Console) -> None:
        self.quiet = True

    Console.on_broken_pipe = stay
    sys.stdout, sys.stderr = cast("TextIO", Unbroken(sys.stdout)), cast("TextIO", Unbroken(sys.stderr))


@contextmanager
def supervised() -> Generator[None]:
    """Surround the body of a deployed flow with what it needs; with nothing for one that runs in its caller's process.

    Raises:
        WorkerGone: when the worker was killed; the flow run becomes Crashed with these words.
    """
    if flow_run_id() is None:
        yield
        return
    from prefect.exceptions import TerminationSignal

    for name in ("tasks", "flows"):
        logging.getLogger(name).setLevel(logging.INFO)
    log_visibly()
    outlive_worker()
    supervisor.end_with_worker()
    try:
        yield
    except TerminationSignal:
        if supervisor.worker_is_gone():
            raise supervisor.WorkerGone(
                "The worker that ran this was killed or lost. Finished stages are kept; run again."
            ) from None
        raise
