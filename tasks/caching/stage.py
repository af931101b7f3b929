"""`@stage`: a function as a cached, verified, explained Prefect task.

    @stage(version=1)
    def ingest(source: Source, config: IngestConfig) -> Products: ...

    ingest(source, config)          inside a run: Prefect task, or its cached result
    ingest.fn(source, config)       the plain function, without engine and cache
    with planning(name) as plan:    nothing runs: each call is answered from its record, or with `Unknown`

The record of a stage is the task's Prefect result, stored by key under AMAZON_FT_HOME/records. It is honoured only if its
artifacts are intact: the serializer refuses others, which Prefect takes for a miss.
"""

from __future__ import annotations

import inspect
import json
import logging
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast, get_type_hints

from pydantic import BaseModel

from tasks.caching.files import space_checked
from tasks.caching.identity import canonical, code_digests, stage_key
from tasks.caching.reasons import changes, code_changes, last_entry
from tasks.caching.runs import current_run
from tasks.caching.store import Missing, artifacts_of, check, verified_how
from tasks.refs import Artifact, Lineage, StageRecord, home

if TYPE_CHECKING:
    from prefect import Task

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R", bound=BaseModel)

_key: ContextVar[str] = ContextVar("key")
_until: ContextVar[str | None] = ContextVar("until", default=None)
Listener = Callable[[str, Mapping[str, Any], BaseModel], None]
"""Hears the name, the inputs and the result of a stage."""
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@dataclass(frozen=True)
class Unknown:
    """Stands for the output of a stage that will run; so does everything read from it."""

    until: str

    def __getattr__(self, name: str) -> Unknown:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


@dataclass(frozen=True)
class Step:
    """What is known of one stage call before it happens."""

    name: str
    state: str
    """`cached`, `run` or `unknown`."""
    reason: str
    rows: int = 0
    key: str | None = None
    artifact: Artifact | None = None


@dataclass
class Plan:
    """The steps of a run that has not happened."""

    recipe: str
    steps: list[Step] = field(default_factory=list[Step])


_plan: ContextVar[Plan | None] = ContextVar("plan", default=None)


@contextmanager
def planning(recipe: str) -> Generator[Plan]:
    """Answer stage calls from their records instead of running them; reasons compare with the recipe's last run."""
    plan = Plan(recipe)
    token = _plan.set(plan)
    try:
        yield plan
    finally:
        _plan.reset(token)


def is_planning() -> bool:
    """Whether stage calls are only being planned."""
    return _plan.get() is not None


class StageReached(Exception):  # noqa: N818  # the wish of the user, not an error
    """The stage that the run was to end with is done."""


@contextmanager
def ending_with(name: str | None) -> Generator[None]:
    """Raise StageReached once the named stage is done."""
    token = _until.set(name)
    try:
        yield
    finally:
        _until.reset(token)


def last_stage() -> str | None:
    """The stage that the run is to end with; None for all."""
    return _until.get()


@contextmanager
def telling(listener: Listener) -> Generator[None]:
    """Tell of every stage in the block that ran or was served; it must neither fail nor wait."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def lineage() -> Lineage:
    """The stage calls of the present run so far, and its recipe."""
    run = current_run()
    if run is None:
        return Lineage()
    done = [entry for entry in run.stages if "digest" in entry]
    fields = StageRecord.model_fields
    return Lineage(recipe=run.config, stages=tuple(StageRecord(**{name: entry[name] for name in fields}) for entry in done))


def current_key() -> str:
    """The key of the stage that is running; names its work directory."""
    return _key.get()


def stage(
    *,
    version: int,
    chosen: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda _: (),
    progress: Callable[[str], str | None] = lambda _: None,
) -> Callable[[Callable[P, R]], Stage[P, R]]:
    """Make a stage of a function whose parameters are references, config sections and plain values.

    Args:
        version: raise it when the stage's bytes change for a reason that its code does not show.
        chosen: names further modules whose code counts, from the inputs; for a backend.
        progress: says what an unfinished run with that key left behind, such as "resumable from step 50".
    """
    return lambda fn: Stage(fn, version, chosen, progress)


class Stage(Generic[P, R]):
    """A stage: call it inside a run; `fn` is the bare function."""

    def __init__(
        self,
        fn: Callable[P, R],
        version: int,
        chosen: Callable[[Mapping[str, Any]], tuple[str, ...]],
        progress: Callable[[str], str | None],
    ) -> None:
        self.name = fn.__name__
        self.fn = fn
        self.module = fn.__module__
        self.version = version
        self._chosen = chosen
        self._progress = progress
        self._signature = inspect.signature(fn)
        self.parameters = tuple(self._signature.parameters)
        self.__doc__ = fn.__doc__
        code_digests([self.module])  # read the source now, while it is what was imported

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Serve the stage from its record, or run it as a Prefect task.

        Raises:
            PipelineError: what the stage raises for the user's mistakes.
        """
        inputs = self._bind(*args, **kwargs)
        if (plan := _plan.get()) is not None:
            return cast("R", self._foresee(inputs, plan))
        value = self._perform(self._entry(inputs), lambda: self._run(inputs))
        if (listener := _listener.get()) is not None:
            listener(self.name, inputs, value)
        self.reached()
        return value

    def each(self, *calls: tuple[Any, ...]) -> list[R]:
        """The stage on each of several inputs: in turn, or all at once on the cluster of the present flow's task runner.

        A run that ends with this stage does not end here: call `reached` once the results are put together.
        """
        bound = [self._bind(*call) for call in calls]  # pyright: ignore[reportCallIssue]  # as many as the stage has parameters
        if (plan := _plan.get()) is not None:
            return [cast("R", self._foresee(inputs, plan)) for inputs in bound]
        from tasks.caching.engine import start_tasks

        entries = [self._entry(inputs) for inputs in bound]
        started = start_tasks(self, bound)
        return [self._perform(entry, outcome) for entry, outcome in zip(entries, started, strict=True)]

    def reached(self) -> None:
        """End the run if it was to end with this stage.

        Raises:
            StageReached: then.
        """
        if _until.get() == self.name:
            raise StageReached

    def code(self, inputs: Mapping[str, Any]) -> dict[str, str]:
        """{module: digest} of the code that counts for these inputs."""
        return code_digests([self.module, *self._chosen(inputs)])

    def key(self, inputs: Mapping[str, Any]) -> str:
        """The identity of this call."""
        return stage_key(self.name, self.version, self.code(inputs), canonical(inputs))

    def lookup(self, *args: P.args, **kwargs: P.kwargs) -> R | None:
        """The recorded result if this call would be served from the cache."""
        try:
            return self.recorded(self.key(self._bind(*args, **kwargs)))
        except Missing:
            return None

    def recorded(self, key: str) -> R:
        """The recorded result of a key, its artifacts verified.

        Raises:
            Missing: with the reason why there is nothing to serve.
        """
        try:
            blob = json.loads((home() / "records" / key).read_bytes())["result"]
            value = self.returns.model_validate_json(blob)
        except FileNotFoundError:
            raise Missing("not run yet") from None
        except (OSError, ValueError, KeyError, TypeError):
            raise Missing(f"record corrupt: records/{key}") from None
        check(value)
        return value

    @cached_property
    def returns(self) -> type[R]:
        """The reference type that the stage returns."""
        return get_type_hints(self.fn)["return"]

    @cached_property
    def task(self) -> Task[..., R]:
        """The Prefect task; made on first use, so that planning needs no Prefect."""
        from tasks.caching.engine import make_task

        return make_task(self)

    def execute(self, inputs: Mapping[str, Any]) -> R:
        """The body of the Prefect task: the function, knowing its key."""
        token = _key.set(self.key(inputs))
        try:
            with space_checked(home()):
                return cast("Callable[..., R]", self.fn)(**inputs)
        finally:
            _key.reset(token)

    def _bind(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def _foresee(self, inputs: Mapping[str, Any], plan: Plan) -> R | Unknown:
        waiting = next((value.until for value in inputs.values() if isinstance(value, Unknown)), None)
        if waiting:
            plan.steps.append(Step(self.name, "unknown", f"unknown until {waiting}"))
            return Unknown(waiting)
        key = self.key(inputs)
        try:
            value = self.recorded(key)
        except Missing as miss:
            plan.steps.append(Step(self.name, "run", self._explain(key, inputs, str(miss)), key=key))
            return Unknown(self.name)
        plan.steps.append(Step(self.name, "cached", "", rows=_main(value).rows, key=key, artifact=_main(value)))
        return value

    def _run(self, inputs: dict[str, Any]) -> R:
        from tasks.caching.engine import run_task

        return run_task(self, inputs)

    def _entry(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the run's record says of a call that is about to be made."""
        key = self.key(inputs)
        entry: dict[str, Any] = {"name": self.name, "key": key, "code": self.code(inputs), "inputs": canonical(inputs)}
        try:
            self.recorded(key)
            entry |= {"state": "cached", "reason": "" if verified_how() == "full" else "verified by size only"}
        except Missing as miss:
            entry |= {"state": "running", "reason": self._explain(key, inputs, str(miss))}
            logger.info("%s runs: %s", self.name, entry["reason"])
        return entry

    def _perform(self, entry: dict[str, Any], outcome: Callable[[], R]) -> R:
        """The outcome of a call, its entry kept up to date."""
        started = time.monotonic()
        with _entered(entry):
            value = outcome()
            seconds = time.monotonic() - started
            main = _main(value)
            entry |= {
                "rows": main.rows,
                "digest": main.digest,
                "path": str(main.path.relative_to(home())),
                "seconds": round(seconds, 3),
            }
            entry["state"] = "cached" if entry["state"] == "cached" else "completed"
        made = f": {main.rows:,} rows" if main.rows else ""
        logger.info("%s %s%s in %.1f s", self.name, entry["state"], made, seconds)
        return value

    def _explain(self, key: str, inputs: Mapping[str, Any], miss: str) -> str:
        """Why a key has nothing to serve: what changed since this stage last ran, or what became of its output."""
        left = self._progress(key)
        if miss != "not run yet":
            return miss
        before = last_entry(self.name, *_run_and_recipe())
        if before is None:
            return "first run" + (f"; {left}" if left else "")
        if before["key"] == key:
            return "did not finish last time" + (f"; {left}" if left else "")
        differences = [*code_changes(before["code"], self.code(inputs)), *changes("", before["inputs"], canonical(inputs))]
        return "; ".join(differences or ["stage version or modules changed"]) + (f"; {left}" if left else "")


@contextmanager
def _entered(entry: dict[str, Any]) -> Generator[None]:
    """Keep the entry in the present run's record, as failed if the block raises."""
    run = current_run()
    if run is not None:
        run.stages.append(entry)
        run.write()
    try:
        yield
    except BaseException:
        entry["state"] = "failed"
        raise
    finally:
        if run is not None:
            run.write()


def _main(value: BaseModel) -> Artifact:
    """The first artifact of a result: the one whose rows and digest stand for it."""
    return next(artifacts_of(value), Artifact(kind="none", digest=""))


def _run_and_recipe() -> tuple[str | None, str | None]:
    plan, run = _plan.get(), current_run()
    if plan is not None:
        return None, plan.recipe
    return (run.id, run.recipe) if run is not None else (None, None)


__all__ = [
    "Plan",
    "Stage",
    "StageReached",
    "Step",
    "Unknown",
    "current_key",
    "ending_with",
    "is_planning",
    "last_stage",
    "lineage",
    "planning",
    "stage",
    "telling",
]
