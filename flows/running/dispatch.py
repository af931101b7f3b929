"""Where finetune, baseline and evaluate run: nowhere when all are recorded, else in the child flow amazon-ft-train."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from flows.pipeline import Tuned, tune
from flows.running.child import run_child
from flows.running.deployed import flow_run_id
from tasks.caching.context import planning
from tasks.caching.stage import StageReached
from tasks.config import Recipe
from tasks.refs import PipelineError, Prepared, home


def dispatch(recipe: Recipe, prepared: Prepared, train_here: Callable[[Recipe, Prepared], Tuned | None]) -> Tuned:
    """The adapter and its evaluation. A child flow run is created only if something has to be made for them.

    It is a deployment's, on the machine that serves work pool `cuda`, if the parent is one; else `train_here`.

    Raises:
        ChildError: how the deployment's run ended.
        PipelineError: when it left its records under another root.
    """
    if _is_cached(recipe, prepared):
        return tune(recipe, prepared)
    if flow_run_id() is None:
        done = train_here(recipe, prepared)
        if done is None:
            raise StageReached
        return done
    run_child(recipe, prepared)
    if not _is_cached(recipe, prepared):
        raise PipelineError(
            f"amazon-ft-train completed, but its records are not under {home()}; expected both workers to share one "
            "AMAZON_FT_HOME, be it a volume or a network file system. Mount the same one on both machines and run again."
        )
    return tune(recipe, prepared)


def _is_cached(recipe: Recipe, prepared: Prepared) -> bool:
    """Whether every stage of the device would be served, up to the one that the run is to end with."""
    with planning(recipe.name) as planned, suppress(StageReached):
        tune(recipe, prepared)
    return planned.is_cached
