"""The Prefect side of a stage: the task, its cache key, its record and its retries. Imported when a stage first runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import httpx
from prefect import Task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.serializers import Serializer
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BaseModel

from tasks.refs import PipelineError, home

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun

    from tasks.caching.stage import Stage

R = TypeVar("R", bound=BaseModel)

RETRY_DELAYS_SECONDS = [2.0, 10.0, 30.0]
TRANSIENT = (ConnectionError, TimeoutError, httpx.TransportError)
"""Errors of the network or the storage that may pass; a user's mistake and a full disk never do."""


class RecordSerializer(Serializer):  # pyright: ignore[reportMissingTypeArgument]  # parametrised, Prefect finds no dispatch key
    """A stage's reference as JSON; refuses to load one whose artifacts are not intact, which Prefect takes for a miss."""

    type: Literal["amazon-ft-record"] = "amazon-ft-record"  # pyright: ignore[reportIncompatibleVariableOverride]
    returns: str
    """module:class of the reference."""

    def dumps(self, obj: BaseModel) -> bytes:
        """The reference as JSON."""
        return obj.model_dump_json().encode()

    def loads(self, blob: bytes) -> BaseModel:
        """The reference, its artifacts verified."""
        from tasks import refs
        from tasks.caching.store import check

        value = cast("type[BaseModel]", getattr(refs, self.returns)).model_validate_json(blob)
        check(value)
        return value


def make_task(stage: Stage[..., R]) -> Task[..., R]:
    """A Prefect task that runs the stage's body and is cached by the stage's key."""

    @wraps(stage.fn)
    def body(*args: Any, **kwargs: Any) -> R:
        return stage.execute(signature(stage.fn).bind(*args, **kwargs).arguments)

    return Task(
        fn=cast("Callable[..., R]", body),
        name=stage.name,
        description=stage.__doc__,
        cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda _, inputs: stage.key(inputs)),
        persist_result=True,
        result_serializer=RecordSerializer(returns=stage.returns.__name__),
        cache_result_in_memory=False,
        retries=len(RETRY_DELAYS_SECONDS),
        retry_delay_seconds=RETRY_DELAYS_SECONDS,
        retry_condition_fn=_is_transient,
    )


def run_task(stage: Stage[..., R], inputs: dict[str, Any]) -> R:
    """Run the stage as a task of the present flow, its record under the present root."""
    return _named(stage)(**inputs)


def start_tasks(stage: Stage[..., R], many: list[dict[str, Any]]) -> list[Callable[[], R]]:
    """For each of the inputs, what waits for the task's result; on a cluster all tasks are started, else each when asked for.

    A task on a cluster leaves its record under the root that all machines share; it is read there, not passed on.
    """
    flow_run = FlowRunContext.get()
    if flow_run is None or isinstance(flow_run.task_runner, ThreadPoolTaskRunner):
        return [partial(run_task, stage, inputs) for inputs in many]
    futures = [_named(stage).submit(**inputs) for inputs in many]

    def wait(future: PrefectFuture[R], inputs: dict[str, Any]) -> R:
        future.wait()
        if not future.state.is_completed():
            future.state.result()  # raises what the task raised
        return stage.recorded(stage.key(inputs))

    return [partial(wait, future, inputs) for future, inputs in zip(futures, many, strict=True)]


def _named(stage: Stage[..., R]) -> Task[..., R]:
    return stage.task.with_options(result_storage=home() / "records", task_run_name=stage.name)


def _is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    try:
        state.result()
    except PipelineError:
        return False
    except Exception as error:
        return isinstance(error, TRANSIENT)
    return False


__all__ = ["RecordSerializer", "make_task", "run_task", "start_tasks"]
