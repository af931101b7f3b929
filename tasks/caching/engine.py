"""Stages as Prefect tasks: shown in the UI, recorded by key under the present root, retried where that may help.

Whether a call is served or run was decided before (stage.py): a task of a call that is served finds its record, one of a call
that runs is told to look for none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
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

from tasks.caching.stage import Call, Made, Stage
from tasks.refs import PipelineError, home

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun

R = TypeVar("R", bound=BaseModel)

RETRY_DELAYS_SECONDS = [2.0, 10.0, 30.0]
TRANSIENT = (ConnectionError, TimeoutError, httpx.TransportError)
"""Errors of the network or the storage that may pass; a user's mistake and a full disk never do."""


class RecordSerializer(Serializer):  # pyright: ignore[reportMissingTypeArgument]  # parametrised, Prefect finds no dispatch key
    """A stage's outcome as its record."""

    type: Literal["amazon-ft-record"] = "amazon-ft-record"  # pyright: ignore[reportIncompatibleVariableOverride]
    returns: str
    """The class of the reference, in tasks/refs.py."""

    def dumps(self, obj: Made[Any]) -> bytes:
        """Write a record."""
        return obj.to_json().encode()

    def loads(self, blob: bytes) -> Made[Any]:
        """Read a record; Prefect takes an error here for a miss."""
        from tasks import refs

        return Made.from_json(blob, cast("type[BaseModel]", getattr(refs, self.returns)))


class PrefectEngine:
    """The engine of both flows."""

    def start(self, stage: Stage[..., R], calls: Sequence[Call[R]]) -> Sequence[Callable[[], Made[R]]]:
        """For each call, what waits for its task; on a cluster all are started, else each when it is asked for.

        A task on a cluster leaves its record under the root that all machines share; it is read there, not passed on.
        """
        flow_run = FlowRunContext.get()
        if flow_run is None or isinstance(flow_run.task_runner, ThreadPoolTaskRunner):
            return [lambda call=call: _task(stage, call)(**call.inputs) for call in calls]
        futures = [_task(stage, call).submit(**call.inputs) for call in calls]
        return [lambda future=future, call=call: _wait(stage, call, future) for future, call in zip(futures, calls, strict=True)]


def _task(stage: Stage[..., R], call: Call[R]) -> Task[..., Made[R]]:
    """A Prefect task for one call."""

    @wraps(stage.fn)
    def body(*args: Any, **kwargs: Any) -> Made[R]:
        return stage.make(signature(stage.fn).bind(*args, **kwargs).arguments, code)

    key, code = call.key, call.code
    return Task(
        fn=cast("Callable[..., Made[R]]", body),
        name=stage.name,
        task_run_name=stage.name,
        description=stage.__doc__,
        cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda *_: key),
        refresh_cache=call.made is None,
        persist_result=True,
        result_storage=home() / "records",
        result_serializer=RecordSerializer(returns=stage.returns.__name__),
        cache_result_in_memory=False,
        retries=len(RETRY_DELAYS_SECONDS),
        retry_delay_seconds=RETRY_DELAYS_SECONDS,
        retry_condition_fn=_is_transient,
    )


def _wait(stage: Stage[..., R], call: Call[R], future: PrefectFuture[Made[R]]) -> Made[R]:
    future.wait()
    if not future.state.is_completed():
        future.state.result()  # raises what the task raised
    return stage.recorded(call.key)


def _is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    try:
        state.result()
    except PipelineError:
        return False
    except Exception as error:
        return isinstance(error, TRANSIENT)
    return False
