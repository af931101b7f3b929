"""A whole run of a recipe: its record, its stages, and what follows a saved model: its link, the verdict, the report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from flows.pipeline import Tuned, pipeline
from flows.recipes import run_tags
from flows.reports.page import write_report
from flows.reports.subscribers import subscribers
from flows.running.promotion import promote
from tasks.caching.context import Engine, open_run, tell
from tasks.caching.events import ModelSaved
from tasks.caching.stage import StageReached
from tasks.config import Recipe
from tasks.refs import Prepared, SavedModel
from tasks.save import publish_link


def run_recipe(
    recipe: Recipe, until: str | None, engine: Engine, tune_there: Callable[[Recipe, Prepared], Tuned]
) -> SavedModel | None:
    """The saved model; None when the run was to end earlier.

    Args:
        recipe: valid, with its overrides.
        until: the stage to end with; None for all.
        engine: runs the stages' bodies.
        tune_there: `flows.pipeline.tune`, wherever the device is.
    """
    settings, observers = recipe.model_dump(mode="json"), subscribers(recipe.tracking)
    record = open_run(recipe.name, settings, tags=run_tags(recipe), until=until, engine=engine, observers=observers)
    with record as run, suppress(StageReached):
        saved = pipeline(recipe, tune_there)
        link = publish_link(saved, recipe.name)
        promote(saved, recipe)
        tell(ModelSaved(run, saved, link, write_report(recipe, saved)))
        return saved
    return None
