"""The parent flow amazon-ft: `prefect deployment run amazon-ft/default`."""

from __future__ import annotations

from contextlib import suppress

from prefect import flow

from flows.pipeline import pipeline
from flows.recipes import build_recipe
from tasks import runs
from tasks.config import Recipe
from tasks.refs import SavedModel
from tasks.save import publish_link
from tasks.stage import StageReached, ending_with


@flow(name="amazon-ft", flow_run_name="{config.name} {config.sample.rows}")
def amazon_ft(config: Recipe, overrides: tuple[str, ...] = (), until: str | None = None) -> SavedModel | None:
    """From a product file to a fine-tuned model.

    Args:
        config: the recipe.
        overrides: single values to change, such as `finetune.learning_rate=1e-4`.
        until: the stage to end with; None for all.
    """
    recipe = build_recipe(config.model_dump(mode="json"), overrides)
    with runs.run_record(recipe.name, recipe.model_dump(mode="json")), ending_with(until), suppress(StageReached):
        saved = pipeline(recipe)
        publish_link(saved, recipe.name)
        return saved
    return None
