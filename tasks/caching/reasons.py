"""Why a stage runs: what differs between two of its calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from tasks.caching.runs import past_runs


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
    """What a value holds, by the path to it; nothing for a plain value."""
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


__all__ = ["changes", "code_changes", "last_entry"]
