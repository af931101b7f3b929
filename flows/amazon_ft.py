"""The parent flow amazon-ft: `prefect deployment run amazon-ft/default`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.choices import StageName
from flows.recipes import check_until, override, override_pattern
from flows.running.cluster import task_runner
from flows.running.deployed import recipe_name, supervised
from flows.running.dispatch import dispatch
from flows.train import amazon_ft_train
from flows.whole_run import run_recipe
from tasks.caching.engine import PrefectEngine
from tasks.config import Recipe
from tasks.refs import SavedModel

Override = Annotated[str, Field(pattern=override_pattern())]
"""KEY=VALUE; a wrong key is refused where the run is submitted."""


@flow(name="amazon-ft", flow_run_name=recipe_name, task_runner=task_runner())
def amazon_ft(config: Recipe, overrides: tuple[Override, ...] = (), until: StageName | None = None) -> SavedModel | None:
    """From a product file to a fine-tuned model.

    Args:
        config: the recipe.
        overrides: single values to change, such as `finetune.learning_rate=1e-4`.
        until: the stage to end with; None for all.
    """

    def body() -> SavedModel | None:
        recipe = override(config, overrides)
        check_until(until, recipe)
        return run_recipe(recipe, until, PrefectEngine(), partial(dispatch, train_here=amazon_ft_train))

    return supervised(body)
