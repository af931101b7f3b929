"""The training as a flow run of its own, on whatever machine serves work pool `cuda`.

The parent creates it, waits, and passes on how it ended. It never reads Prefect's result of it: the references are in the
records under AMAZON_FT_HOME, which both machines share.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any

import httpx

from flows.running.pools import DEFAULT_QUEUE, TRAINING, online_workers
from tasks.caching.context import context, tell
from tasks.caching.events import Noticed, TrainingLeft
from tasks.config import Recipe
from tasks.refs import ConfigError, PipelineError, Prepared, home

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.schemas.objects import FlowRun, State

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
LOOK_SECONDS = 10.0
"""Between two looks for a worker."""
RESTARTS = "AMAZON_FT_RESTARTS"
"""How often a training whose process, container or machine was lost is started again by its parent; never unless set."""


class ChildError(PipelineError):
    """The training's flow run did not complete; `state` is how it ended."""

    def __init__(self, name: str, state: State[Any]) -> None:
        super().__init__(f"amazon-ft-train '{name}' {(state.name or state.type).lower()}: {state.message or 'without a message'}")
        self.state = state


def run_child(recipe: Recipe, prepared: Prepared) -> None:
    """Run amazon-ft-train as a deployment, nested below the present flow run, and wait for it.

    One that began and was lost (its machine was taken away, its container killed) is started again as often as RESTARTS says, and
    goes on from its checkpoint. Whatever ends the waiting, also cancels it.

    Raises:
        ChildError: with its message.
        ConfigError: for a RESTARTS that is no number.
    """
    parent = context().run
    assert parent is not None, "a training is left to another machine by a run"
    plain = {
        "recipe": recipe.model_dump(mode="json"),
        "prepared": prepared.model_dump(mode="json"),
        "until": parent.until,
        "run": parent.id,
    }
    for left in range(restarts(), -1, -1):
        run = _start(plain, parent.title, parent.tags)
        state = _wait_or_cancel(run.id)
        if state.is_completed():
            return
        if not (left and state.is_crashed() and _has_begun(run.id)):
            raise ChildError(run.name, state)
        _tell_restart(ChildError(run.name, state), left)


def restarts() -> int:
    """How often a lost training is started again.

    Raises:
        ConfigError: for anything but a number.
    """
    text = os.environ.get(RESTARTS) or "0"
    if not text.isdecimal():
        raise ConfigError(f"{RESTARTS}: no number: got {text}; expected how often a lost training is started again, such as 3.")
    return int(text)


def _start(parameters: dict[str, Any], title: str, tags: list[str]) -> FlowRun:
    from prefect.deployments import run_deployment

    run: FlowRun = run_deployment(  # pyright: ignore[reportAssignmentType]  # synchronous here
        TRAINING, parameters=parameters, timeout=0, flow_run_name=title, tags=tags, work_queue_name=_queue_of_parent()
    )
    logger.info("finetune, baseline and evaluate run as amazon-ft-train '%s'.", run.name)
    tell(TrainingLeft(run.name))
    return run


def _queue_of_parent() -> str | None:
    """The work queue that the parent came from: that of the same name lets its training pass others too."""
    from prefect.context import FlowRunContext

    parent = FlowRunContext.get()
    name = parent.flow_run.work_queue_name if parent and parent.flow_run else None
    return None if name == DEFAULT_QUEUE else name


def _wait_or_cancel(run: UUID) -> State[Any]:
    try:
        return _wait(run)
    except BaseException:
        _cancel(run)
        raise


def _has_begun(run: UUID) -> bool:
    """Whether it ever ran: what could not be started once, can't be a second time."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_flow_run(run).run_count > 0


def _tell_restart(lost: ChildError, left: int) -> None:
    logger.warning("%s\nIt is started again and goes on from its checkpoint; %d more times if need be.", lost, left - 1)
    text = f"# The training was lost and is started again\n\n{lost}\n\nIt goes on from its last checkpoint.\n"
    tell(Noticed("worker", "the training was lost and is started again", text))


def _wait(run: UUID) -> State[Any]:
    """The final state of a flow run; the server may be away for a while."""
    absent = AbsentWorker()
    while True:
        state = _read_state(run)
        if state is not None and state.is_final():
            return state
        if state is not None and state.is_scheduled():
            absent.look()
        elif state is not None:
            absent.found()
        time.sleep(POLL_SECONDS)


def _read_state(run: UUID) -> State[Any] | None:
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(run).state
    except httpx.HTTPError as error:
        logger.warning("The Prefect server does not answer (%s); the training goes on, asking again.", type(error).__name__)
        return None


class AbsentWorker:
    """Says, once, that no worker serves the pool, and which command starts one; and when one is there."""

    def __init__(self) -> None:
        self._told = False
        self._next = 0.0

    def look(self) -> None:
        """The run has not been taken yet."""
        if self._told or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_SECONDS
        try:
            pool = _training_pool()
            online = online_workers(pool)
        except httpx.HTTPError:
            return
        if not online:
            self._told = True
            logger.warning("No worker of work pool %s is online; the training waits for one:\n%s", pool, shell_commands(pool))
            text = f"No worker of work pool `{pool}` is online. Where the GPU is:\n\n```bash\n{shell_commands(pool)}\n```\n"
            tell(Noticed("worker", "no worker is online", f"# The training waits\n\n{text}"))

    def found(self) -> None:
        """A worker has taken the run."""
        if self._told:
            self._told = False
            text = "# The training has begun\n\nA worker is online now.\n"
            tell(Noticed("worker", "a worker has taken the training", text))


def shell_commands(pool: str) -> str:
    """The shell commands that start a worker of a pool for this server and this root."""
    from prefect.settings import get_current_settings

    return f"export PREFECT_API_URL={get_current_settings().api.url} AMAZON_FT_HOME={home()}\namazon-ft worker {pool}"


def _training_pool() -> str:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_deployment_by_name(TRAINING).work_pool_name or ""


def _cancel(run: UUID) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelled, Cancelling

    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(run).state
            if state is None or not state.is_final():  # it may have ended by the same signal
                begun = state is not None and state.is_running()  # only what runs can answer Cancelling
                client.set_flow_run_state(run, (Cancelling if begun else Cancelled)(message="The parent flow run ended first."))
    except httpx.HTTPError:
        logger.warning("amazon-ft-train could not be cancelled: the server does not answer.", exc_info=True)
