"""Where finetune, baseline and evaluate run: nowhere when all are recorded, else in the child flow amazon-ft-train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flows.pipeline import Tuned, plan_tuning, tune
from flows.running.child import run_child
from flows.running.deployed import flow_run_id
from tasks.caching.context import context, within
from tasks.caching.runs import past_runs
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
    if plan_tuning(recipe, prepared).is_cached:
        return tune(recipe, prepared)
    if flow_run_id() is None:
        done = train_here(recipe, prepared)
        if done is None:
            raise StageReached
        return done
    run_child(recipe, prepared)
    left = [step for step in plan_tuning(recipe, prepared).steps if step.state != "cached"]
    if left:
        raise PipelineError(
            f"amazon-ft-train completed, but {left[0].name} is not recorded under {home()}: {left[0].reason}; expected both "
            "workers to have the same code, unedited since this run began, and to share one AMAZON_FT_HOME, be it a volume or a "
            "network file system. See to both and run again."
        )
    with within(elsewhere=_made_for_this_run()):
        return tune(recipe, prepared)


def _made_for_this_run() -> dict[str, dict[str, Any]]:
    """{key: entry} of the stage calls of the newest run that trained for the present one."""
    run = context().run
    assert run is not None, "a training is left to another machine by a run"
    newest = next((past["stages"] for past in past_runs() if past["parent"] == run.id), [])
    return {entry["key"]: entry for entry in newest}
