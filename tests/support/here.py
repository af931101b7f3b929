"""Whole runs in this process, without a server: each stage is made once and served from its record ever after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from flows.pipeline import tune
from flows.whole_run import run_recipe
from tasks.caching.stage import Call, Made, Stage
from tasks.config import Recipe
from tasks.refs import SavedModel
from tests.support.records import write_record


class MadeHere:
    """An engine that makes what has no record, and writes one; it remembers what it made."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def start(self, stage: Stage[..., Any], calls: Sequence[Call[Any]]) -> Sequence[Callable[[], Made[Any]]]:
        return [partial(self._make, stage, call) for call in calls]

    def _make(self, stage: Stage[..., Any], call: Call[Any]) -> Made[Any]:
        if call.made is not None:
            return call.made
        self.made.append(stage.name)
        made = stage.make(call.inputs, call.code)
        write_record(call.key, made.value, made.seconds)
        return made


def make_here(recipe: Recipe, until: str) -> list[str]:
    """The stages that had to be made of a run that ends with one of them."""
    engine = MadeHere()
    run_recipe(recipe, until, engine, tune)
    return engine.made


def run_here(recipe: Recipe) -> tuple[SavedModel, list[str]]:
    """The saved model of a whole run, and the stages that had to be made."""
    engine = MadeHere()
    saved = run_recipe(recipe, None, engine, tune)
    assert saved is not None
    return saved, engine.made
