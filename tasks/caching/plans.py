"""Plans of runs: each stage's step and its reason, and the differences between two calls of a stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from tasks.caching.runs import past_runs
from tasks.refs import Artifact


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
    """The newest entry of a stage in past runs, those of the same recipe first."""
    runs = sorted((past for past in past_runs() if past["id"] != run), key=lambda past: past["recipe"] != recipe)
    return next((entry for past in runs for entry in past["stages"] if entry["name"] == name), None)


def code_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The modules of both whose digests differ; one of only one side came with a changed import or setting, told of itself.

    >>> code_changes({"tasks.pack": "a", "tasks.training.fast.backend": "b"}, {"tasks.pack": "c", "tasks.training.hf": "d"})
    ['code changed: tasks/pack.py']
    """
    return [
        f"code changed: {module.replace('.', '/')}.py" for module in sorted({*before} & {*now}) if before[module] != now[module]
    ]


def changes(where: str, before: Any, now: Any) -> list[str]:
    """Dotted paths of what differs, with both values.

    >>> changes("", {"config": {"seed": 1, "rows": 5}}, {"config": {"seed": 2, "rows": 5}})
    ['config.seed 1 -> 2']
    >>> changes("source", {"files": [{"digest": "a"}]}, {"files": [{"digest": "b"}]})
    ['source.files[0].digest "a" -> "b"']
    """
    if before == now:
        return []
    old, new = _parts(before), _parts(now)
    if old and new and (isinstance(before, dict) or len(old) == len(new)):
        return [line for name in {**old, **new} for line in changes(f"{where}{name}".lstrip("."), old.get(name), new.get(name))]
    return [f"{where} {_short(before)} -> {_short(now)}"]


def _parts(value: Any) -> dict[str, Any]:
    """The parts of a value by the paths to them; none for a plain value."""
    if isinstance(value, dict):
        return {f".{name}": item for name, item in sorted(cast("dict[str, Any]", value).items())}
    if isinstance(value, list):
        return {f"[{index}]": item for index, item in enumerate(cast("list[Any]", value))}
    return {}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef"):
        return value[:8]
    return text if len(text) <= 60 else f"{text[:57]}..."
