"""The parent flow amazon-ft: `prefect deployment run amazon-ft/default`."""

from __future__ import annotations

from contextlib import suppress
from typing import cast

from prefect import flow
from prefect.client.schemas.objects import State

from flows.pipeline import pipeline
from flows.recipes import build_recipe, check_until
from flows.reports.page import write_report
from flows.reports.trackers import check_tracking, track
from flows.reports.ui import show_model, show_report, show_verdict, shown
from flows.running.child import ChildError
from flows.running.deployed import supervised
from flows.running.naming import name_run
from flows.running.promotion import promote
from flows.running.shards import task_runner
from tasks.caching import runs
from tasks.caching.stage import StageReached, ending_with
from tasks.config import Recipe
from tasks.refs import SavedModel
from tasks.save import publish_link


@flow(name="amazon-ft", flow_run_name=name_run, task_runner=task_runner())
def amazon_ft(config: Recipe, overrides: tuple[str, ...] = (), until: str | None = None) -> SavedModel | None:
    """From a product file to a fine-tuned model.

    Args:
        config: the recipe.
        overrides: single values to change, such as `finetune.learning_rate=1e-4`.
        until: the stage to end with; None for all.
    """
    recipe = build_recipe(config.model_dump(mode="json"), overrides)
    check_tracking(recipe.tracking)
    check_until(until, recipe)
    record = runs.run_record(recipe.name, recipe.model_dump(mode="json"), until=until)
    try:
        with supervised(), record, ending_with(until), shown(recipe), suppress(StageReached):
            saved = pipeline(recipe)
            show_model(publish_link(saved, recipe.name))
            show_verdict(promote(saved, recipe))
            page = write_report(recipe, saved)
            show_report(page)
            track(recipe, saved, page)
            return saved
    except ChildError as end:
        state = State(type=end.state.type, name=end.state.name, message=str(end))
        return cast("SavedModel", state)  # Prefect takes a state that a flow returns for its own
    return None
