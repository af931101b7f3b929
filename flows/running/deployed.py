"""A flow run that a worker started: known by its deployment, logged to the server, ended with its worker and in a word."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

from flows.running import supervisor
from flows.running.child import ChildError
from flows.running.quiet import log_briefly
from tasks.config import Recipe
from tasks.refs import PipelineError
from tasks.reporting.visible import log_visibly, visible

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.schemas.objects import State

R = TypeVar("R")


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


def supervised(body: Callable[[], R]) -> R:
    """Return what the body of a flow does; of a deployed one that failed the state to end in, which Prefect takes for its own.

    Such a state says in words what a user did wrong or how the training ended; an error would be logged with a stack trace at
    each level of Prefect's engine.

    Raises:
        WorkerGone: when the worker was killed; the flow run becomes Crashed with these words.
    """
    if flow_run_id() is None:
        return body()
    from prefect.exceptions import TerminationSignal

    for name in ("tasks", "flows"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("prefect.engine").addFilter(has_no_state)
    logging.getLogger("prefect.flow_runs").addFilter(has_no_state)
    log_visibly()
    log_briefly()
    outlive_worker()
    supervisor.end_with_worker()
    try:
        return body()
    except PipelineError as error:
        return cast("R", state_after(error))
    except TerminationSignal:
        if supervisor.worker_is_gone():
            raise supervisor.WorkerGone(
                "The worker that ran this was killed or lost. Finished stages are kept; run again."
            ) from None
        if is_being_cancelled():
            return cast("R", final_state("CANCELLED", "Cancelled; finished stages are kept, and a training's last checkpoint."))
        raise


def is_being_cancelled() -> bool:
    """Whether a person's wish to cancel is why a signal came: Prefect would call the run Crashed until its worker knows."""
    import httpx
    from prefect.client.orchestration import get_client

    run = flow_run_id()
    with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        state = client.read_flow_run(run).state if run else None
        return state is not None and (state.is_cancelling() or state.is_cancelled())
    return False


def state_after(error: PipelineError) -> State[Any]:
    """The final state of a flow run that this error ended: the training's, else Failed."""
    kind = error.state.type.value if isinstance(error, ChildError) else "FAILED"
    return final_state(kind, visible(str(error)))


def final_state(kind: str, message: str) -> State[Any]:
    """A state of Prefect's by its type."""
    from prefect.client.schemas.objects import State, StateType

    return State(type=StateType(kind), message=message)


def has_no_state(record: logging.LogRecord) -> bool:
    """Whether a line tells of something else than a final state, which the line before it has told in words.

    Prefect's engine raises a state that is not Completed as an error, and logs that with a stack trace, twice.
    """
    from prefect.exceptions import CancelledRun, CrashedRun, FailedRun

    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (CancelledRun, CrashedRun, FailedRun))
