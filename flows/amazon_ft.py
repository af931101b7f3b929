"""The parent flow amazon-ft: `prefect deployment run amazon-ft/default`."""

from __future__ import annotations

from functools import partial
from typing import cast

from prefect import flow
from prefect.client.schemas.objects import State

from flows.recipes import check_until, override
from flows.running.child import ChildError
from flows.running.cluster import task_runner
from flows.running.deployed import recipe_name, supervised
from flows.running.dispatch import dispatch
from flows.train import amazon_ft_train
from flows.whole_run import run_recipe
from tasks.caching.engine import PrefectEngine
from tasks.config import Recipe
from tasks.refs import SavedModel


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
    try:
        with supervised():
            return run_recipe(recipe, until, PrefectEngine(), partial(dispatch, train_here=amazon_ft_train))
    except ChildError as end:
        state = State(type=end.state.type, name=end.state.name, message=str(end))
        return cast("SavedModel", state)  # Prefect takes a state that a flow returns for its own
