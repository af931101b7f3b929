"""The parent flow amazon-ft: `prefect deployment run amazon-ft/default`."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import cast

from prefect import flow
from prefect.client.schemas.objects import State

from flows.pipeline import pipeline
from flows.recipes import check_until, override, run_tags
from flows.reports.page import write_report
from flows.reports.subscribers import subscribers
from flows.running.child import ChildError
from flows.running.cluster import task_runner
from flows.running.deployed import recipe_name, supervised
from flows.running.dispatch import dispatch
from flows.running.promotion import promote
from flows.train import amazon_ft_train
from tasks.caching.context import open_run, tell
from tasks.caching.engine import PrefectEngine
from tasks.caching.events import ModelSaved
from tasks.caching.stage import StageReached
from tasks.config import Recipe
from tasks.refs import SavedModel
from tasks.save import publish_link


@flow(name="amazon-ft", flow_run_name=recipe_name, task_runner=task_runner())
def amazon_ft(config: Recipe, overrides: tuple[str, ...] = (), until: str | None = None) -> SavedModel | None:
    """From a product file to a fine-tuned model.

    Args:
        config: the recipe.
        overrides: single values to change, such as `finetune.learning_rate=1e-4`.
        until: the stage to end with; None for all.
    """
    recipe = override(config, overrides)
    check_until(until, recipe)
    tags = run_tags(recipe)
    settings, observers = recipe.model_dump(mode="json"), subscribers(recipe.tracking)
    record = open_run(recipe.name, settings, tags=tags, until=until, engine=PrefectEngine(), observers=observers)
    try:
        with supervised(), record as run, suppress(StageReached):
            saved = pipeline(recipe, partial(dispatch, train_here=amazon_ft_train))
            link = publish_link(saved, recipe.name)
            promote(saved, recipe)
            tell(ModelSaved(run, saved, link, write_report(recipe, saved)))
            return saved
    except ChildError as end:
        state = State(type=end.state.type, name=end.state.name, message=str(end))
        return cast("SavedModel", state)  # Prefect takes a state that a flow returns for its own
    return None
