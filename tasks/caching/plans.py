"""Plans of runs: each stage's step and its reason, which tells the differences between two calls of the stage in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from tasks.caching.runs import past_runs
from tasks.refs import Artifact, SourceFile


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
    """A stage call that has not happened."""

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

    @property
    def is_cached(self) -> bool:
        """Whether every step would be served."""
        return all(step.state == "cached" for step in self.steps)


def last_entry(name: str, run: str | None, recipe: str | None) -> dict[str, Any] | None:
    """The newest entry of a stage in past runs of a recipe."""
    runs = (past for past in past_runs() if past["id"] != run and past["recipe"] == recipe)
    return next((entry for past in runs for entry in past["stages"] if entry["name"] == name), None)


def code_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The modules of both whose digests differ; one of only one side came with a changed import or setting, told of itself.

    >>> code_changes({"tasks.pack": "a", "tasks.training.fast.backend": "b"}, {"tasks.pack": "c", "tasks.training.hf": "d"})
    ['code changed: tasks/pack.py']
    """
    return [
        f"code changed: {module.replace('.', '/')}.py" for module in sorted({*before} & {*now}) if before[module] != now[module]
    ]


def sizes(where: str, value: Any) -> dict[str, dict[str, Any]]:
    """{dotted path: name and bytes of a source file, or rows of an artifact} of a call's inputs; told, never counted.

    >>> sizes("", {"products": Artifact(kind="products", digest="ab", rows=3), "seed": 1})
    {'products': {'rows': 3}}
    """
    if isinstance(value, SourceFile):
        return {where: {"name": Path(value.url).name, "bytes": value.size_bytes}}
    if isinstance(value, Artifact):
        return {where: {"rows": value.rows}}
    parts = _parts(dict(value) if isinstance(value, BaseModel) else list(value) if isinstance(value, tuple) else value)
    return {path: size for name, part in parts.items() for path, size in sizes(f"{where}{name}".lstrip("."), part).items()}


@dataclass(frozen=True)
class GivenInputs:
    """The inputs of a call, as they count, and their sizes."""

    counted: Any
    sizes: Mapping[str, Mapping[str, Any]]


def changes(before: GivenInputs, now: GivenInputs) -> list[str]:
    """Return what differs: of settings the dotted paths with both values, of data its name and by how much it grew.

    >>> size = {"source.files[0]": {"name": "trn.json", "bytes": 1000}}
    >>> old = GivenInputs({"config": {"seed": 1}, "source": {"files": [{"digest": "a"}]}}, size)
    >>> changes(old, GivenInputs({"config": {"seed": 2}, "source": {"files": [{"digest": "b"}]}}, size))
    ['config.seed 1 -> 2', 'source trn.json changed']
    """
    return [_say(*difference, before, now) for difference in _differences("", before.counted, now.counted)]


def _differences(where: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, both values) of what differs."""
    old, new = _parts(before), _parts(now)
    if old and new and (isinstance(before, dict) or len(old) == len(new)):
        for name in {**old, **new}:
            yield from _differences(f"{where}{name}".lstrip("."), old.get(name), new.get(name))
    elif before != now:
        yield where, before, now


def _say(where: str, old: Any, new: Any, before: GivenInputs, now: GivenInputs) -> str:
    owner = where.removesuffix(".digest")
    if owner != where or (_is_digest(old) and _is_digest(new)):
        was, size = before.sizes.get(owner, {}), now.sizes.get(owner, {})
        name = f"{owner.partition('.')[0]} {size['name']}" if "name" in size else owner.removesuffix(".data")
        return f"{name} changed{_growth(was, size)}"
    if isinstance(old, list) and isinstance(new, list) and _holds_data([*old, *new]):
        return f"{where}: {len(new)} instead of {len(old)}"
    return f"{where} {_short(old)} -> {_short(new)}"


def _growth(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    for unit in ("rows", "bytes"):
        if more := now.get(unit, 0) - before.get(unit, now.get(unit, 0)):
            return f" ({abs(more):,} {unit} {'more' if more > 0 else 'fewer'})"
    return ""


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def _holds_data(values: list[Any]) -> bool:
    return any(_is_digest(value) or isinstance(value, dict) for value in values)


def _parts(value: Any) -> dict[str, Any]:
    """The parts of a value by the paths to them; none for a plain value."""
    if isinstance(value, dict):
        return {f".{name}": item for name, item in sorted(cast("dict[str, Any]", value).items())}
    if isinstance(value, list):
        return {f"[{index}]": item for index, item in enumerate(cast("list[Any]", value))}
    return {}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
