"""`@stage`: a function as a cached, verified, explained task of a run.

    @stage(version=1)
    def ingest(source: Source, config: IngestConfig) -> Products: ...

    ingest(source, config)          inside a run: run by its engine, or served from its record
    ingest.fn(source, config)       the plain function, without engine and cache
    with planning(name) as plan:    nothing runs: each call is answered from its record, or with `Unknown`

The record of a call is records/KEY, written by the engine. Whether it is served is decided in one place, `Stage.decide`: only
if it is whole and its artifacts are intact.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Generic, ParamSpec, TypeVar, cast, get_type_hints

from pydantic import BaseModel

from tasks.caching.context import context, tell, within
from tasks.caching.events import StageBegan, StageEnded
from tasks.caching.files import space_checked
from tasks.caching.identity import canonical, code_digests, remember_code, stage_key
from tasks.caching.plans import GivenInputs, Plan, Step, Unknown, changes, code_changes, last_entry, sizes
from tasks.caching.store import Missing, artifacts_of, check
from tasks.refs import Artifact, Lineage, PipelineError, StageRecord, home

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R", bound=BaseModel)

Inputs = Mapping[str, Any]


class StageReached(Exception):  # noqa: N818  # the wish of the user, not an error
    """The stage that the run was to end with is done."""


@dataclass(frozen=True)
class Made(Generic[R]):
    """The outcome of a stage's body."""

    value: R
    seconds: float
    """How long the making took, in whichever run it was made."""

    def to_json(self) -> str:
        """A record, sealed with the digest of its value."""
        value = self.value.model_dump_json()
        return json.dumps({"value": value, "seconds": self.seconds, "sha256": _seal(value, self.seconds)})

    @classmethod
    def from_json(cls, text: str | bytes, returns: type[R]) -> Made[R]:
        """The outcome that a record tells of.

        Raises:
            ValueError: when it is no whole record.
        """
        record = json.loads(text)
        if not isinstance(record, dict) or record.get("sha256") != _seal(record.get("value"), record.get("seconds")):
            raise ValueError("the record is damaged")
        return cls(returns.model_validate_json(record["value"]), record["seconds"])


def read_made(key: str, returns: type[R]) -> Made[R]:
    """Read the record of a key, as Prefect wraps it.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is damaged, or of another release.
    """
    wrapped = json.loads((home() / "records" / key).read_bytes())
    if not isinstance(wrapped, dict) or not isinstance(wrapped.get("result"), str):
        raise ValueError("no record of Prefect's")
    return Made.from_json(wrapped["result"], returns)


def _seal(value: Any, seconds: Any) -> str:
    return hashlib.sha256(json.dumps([value, seconds]).encode()).hexdigest()


@dataclass(frozen=True)
class Call(Generic[R]):
    """One call of a stage, decided: served where `made` is there, else run for the reason `miss`."""

    inputs: Inputs
    code: Mapping[str, str]
    """{module: digest} of the code that counts."""
    counted: Any
    """The inputs, as they count."""
    key: str
    made: Made[R] | None = None
    miss: str = ""


class OnlyServed:
    """The engine of a run that makes nothing: a plan has found the value of every call in its record."""

    def start(self, stage: Stage[..., R], calls: Sequence[Call[R]]) -> Sequence[Callable[[], Made[R]]]:
        """Each call's recorded outcome.

        Raises:
            PipelineError: when a record or an artifact went since the plan.
        """
        return [partial(self._serve, stage, call) for call in calls]

    def _serve(self, stage: Stage[..., R], call: Call[R]) -> Made[R]:
        if call.made is None:
            raise PipelineError(f"{stage.name}: {call.miss}, though it was there when this run began. Run again.")
        return call.made


def lineage() -> Lineage:
    """Return the stage calls of the present run so far, and its recipe; of a plan the recipe's name."""
    run = context().run
    if run is None or context().plan is not None:
        return Lineage(name=_recipe_name() or "")
    done = [entry for entry in run.stages if "digest" in entry]
    stages = tuple(StageRecord(**{name: entry[name] for name in StageRecord.model_fields}) for entry in done)
    return Lineage(name=run.recipe, recipe=run.config, stages=stages)


def _recipe_name() -> str | None:
    """The name of the recipe that is planned or run."""
    now = context()
    return now.plan.recipe if now.plan else now.run.recipe if now.run else None


def current_key() -> str:
    """Return the key of the stage that is running; it names the work directory."""
    key = context().key
    assert key is not None, "asked for within a stage's body"
    return key


def stage(
    *,
    version: int,
    alternatives: Collection[str] = (),
    chosen: Callable[[Inputs], tuple[str, ...]] = lambda _: (),
    unfinished: Callable[[str], str | None] = lambda _: None,
) -> Callable[[Callable[P, R]], Stage[P, R]]:
    """Make a stage of a function whose parameters are references, config sections and plain values.

    Args:
        version: raise it when the stage's bytes change for a reason that its code does not show.
        alternatives: modules of which only those count that `chosen` names; for backends.
        chosen: names further modules whose code counts, from the inputs.
        unfinished: says what an unfinished run with that key left behind, such as "resumable from step 50".
    """
    return lambda fn: Stage(fn, version, alternatives, chosen, unfinished)


class Stage(Generic[P, R]):
    """A stage: call it inside a run; `fn` is the bare function."""

    def __init__(
        self,
        fn: Callable[P, R],
        version: int,
        alternatives: Collection[str],
        chosen: Callable[[Inputs], tuple[str, ...]],
        unfinished: Callable[[str], str | None],
    ) -> None:
        self.name = fn.__name__
        self.fn = fn
        self.version = version
        self.__doc__ = fn.__doc__
        self._module = fn.__module__
        self._alternatives = alternatives
        self._chosen = chosen
        self._unfinished = unfinished
        self._signature = inspect.signature(fn)
        remember_code([self._module])  # while it is what was imported

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Serve the stage from its record, or run it.

        Raises:
            PipelineError: what the stage raises for the user's mistakes.
            StageReached: when the run was to end with it.
        """
        (value,) = self._answer([self._bind(*args, **kwargs)])
        self.reached()
        return value

    def each(self, *calls: tuple[Any, ...]) -> list[R]:
        """The stage on each of several inputs: in turn, or all at once where the engine can.

        A run that ends with this stage does not end here: call `reached` once the results are put together.
        """
        return self._answer([self._bind(*call) for call in calls])  # pyright: ignore[reportCallIssue]  # as many as the stage has

    def reached(self) -> None:
        """End the run if it was to end with this stage.

        Raises:
            StageReached: then.
        """
        if context().until == self.name:
            raise StageReached

    def code(self, inputs: Inputs) -> dict[str, str]:
        """{module: digest} of the code that counts for these inputs.

        Raises:
            PipelineError: when the code reaches what its digest can't see.
        """
        return code_digests([self._module, *self._chosen(inputs)], self._alternatives)

    def key(self, inputs: Inputs) -> str:
        """The identity of this call."""
        return stage_key(self.name, self.version, self.code(inputs), canonical(inputs))

    def decide(self, inputs: Inputs) -> Call[R]:
        """Whether this call is served from its record, or why not."""
        code, counted = self.code(inputs), canonical(inputs)
        call: Call[R] = Call(inputs, code, counted, stage_key(self.name, self.version, code, counted))
        try:
            return replace(call, made=self.recorded(call.key))
        except Missing as miss:
            return replace(call, miss=str(miss))

    def recorded(self, key: str) -> Made[R]:
        """The recorded outcome of a key, its artifacts verified.

        Raises:
            Missing: with the reason why there is nothing to serve.
        """
        try:
            made = read_made(key, self.returns)
        except FileNotFoundError:
            raise Missing("not run yet") from None
        except (OSError, ValueError):
            raise Missing(f"record corrupt: records/{key}") from None
        check(made.value)
        return made

    @cached_property
    def returns(self) -> type[R]:
        """The reference type that the stage returns."""
        return get_type_hints(self.fn)["return"]

    def execute(self, inputs: Inputs) -> R:
        """Run the body as the engine does: the function, knowing its key."""
        with within(key=self.key(inputs)), space_checked(home()):
            return cast("Callable[..., R]", self.fn)(**inputs)

    def make(self, inputs: Inputs, code: Mapping[str, str]) -> Made[R]:
        """Run the body and time it.

        Raises:
            PipelineError: when this process has other code than `code`, which the call's key was made of.
        """
        if (here := self.code(inputs)) != code:
            listed = "; ".join(code_changes(code, here)) or "other modules"
            raise PipelineError(
                f"{self.name}: got {listed} in process {os.getpid()} on {os.uname().nodename}; expected the code that the run "
                "began with. Start the workers of the cluster anew, all with the same code, and run again."
            )
        started = time.monotonic()
        value = self.execute(inputs)
        return Made(value, round(time.monotonic() - started, 3))

    def _bind(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def _answer(self, many: list[dict[str, Any]]) -> list[R]:
        if (plan := context().plan) is not None:
            return [cast("R", self._foresee(inputs, plan)) for inputs in many]
        engine, calls = context().engine, [self.decide(inputs) for inputs in many]
        assert engine is not None, f"{self.name} is called outside a run; use open_run, planning or .fn"
        entries = [self._entry(call) for call in calls]
        outcomes = engine.start(self, calls)
        return [self._tell(*told) for told in zip(calls, entries, outcomes, strict=True)]

    def _foresee(self, inputs: Inputs, plan: Plan) -> R | Unknown:
        if waiting := _unknown(inputs.values()):
            plan.steps.append(Step(self.name, "unknown", f"unknown until {waiting}"))
            return Unknown(waiting)
        call = self.decide(inputs)
        if call.made is None:
            plan.steps.append(Step(self.name, "run", self._explain(call), key=call.key))
            return Unknown(self.name)
        main = _main(call.made.value)
        plan.steps.append(Step(self.name, "cached", "", rows=main.rows, key=call.key, artifact=main))
        return call.made.value

    def _entry(self, call: Call[R]) -> dict[str, Any]:
        """The entry in the run's record for a call that is about to be made."""
        entry: dict[str, Any] = {"name": self.name, "key": call.key, "code": call.code, "inputs": call.counted}
        entry["sizes"] = sizes("", dict(call.inputs))
        if call.made is None:
            entry |= {"state": "running", "reason": self._explain(call)}
            logger.info("%s runs: %s", self.name, entry["reason"])
        elif (there := context().elsewhere.get(call.key)) is not None:
            entry |= {"state": there["state"], "reason": there["reason"]}
        else:
            entry |= {"state": "cached", "reason": "" if context().verify == "full" else "verified by size only"}
        return entry

    def _tell(self, call: Call[R], entry: dict[str, Any], outcome: Callable[[], Made[R]]) -> R:
        """The value of a call, its entry kept up to date and the observers told."""
        tell(StageBegan(entry))
        started = time.monotonic()
        try:
            made = outcome()
        except BaseException as error:
            entry["state"] = "failed" if isinstance(error, Exception) else "stopped"
            tell(StageEnded(entry, call.inputs, None))
            raise
        main, cached = _main(made.value), entry["state"] == "cached"
        entry |= {
            "rows": main.rows,
            "digest": main.digest,
            "path": str(main.path.relative_to(home())),
            "seconds": round(time.monotonic() - started, 3) if cached else made.seconds,
            "state": "cached" if cached else "completed",
        }
        tell(StageEnded(entry, call.inputs, made.value))
        rows = f": {main.rows:,} rows" if main.rows else ""
        logger.info("%s %s%s in %.1f s", self.name, entry["state"], rows, entry["seconds"])
        return made.value

    def _explain(self, call: Call[R]) -> str:
        """Why there is nothing to serve: what changed since this stage last ran, or what became of its output."""
        if call.miss != "not run yet":
            return call.miss
        left = self._unfinished(call.key)
        reason = self._difference(call)
        return f"{reason}; {left}" if left else reason

    def _difference(self, call: Call[R]) -> str:
        run = context().run
        before = last_entry(self.name, run.id if run else None, _recipe_name())
        if before is None:
            return "first run"
        if before["key"] == call.key:
            return "did not finish last time"
        old, new = GivenInputs(before["inputs"], before.get("sizes", {})), GivenInputs(call.counted, sizes("", dict(call.inputs)))
        differences = [*code_changes(before["code"], call.code), *changes(old, new)]
        return "; ".join(differences) or "stage version or modules changed"


def _unknown(values: Iterable[Any]) -> str | None:
    """The stage that some of the values wait for."""
    for value in values:
        if isinstance(value, Unknown):
            return value.until
        if isinstance(value, BaseModel) and (waiting := _unknown(vars(value).values())):
            return waiting
    return None


def _main(value: BaseModel) -> Artifact:
    """The first artifact of a result: the one whose rows and digest stand for it."""
    return next(artifacts_of(value), Artifact(kind="none", digest=""))
