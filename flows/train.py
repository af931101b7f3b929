"""The child flow amazon-ft-train: what needs the device, run by the CUDA pool's worker or in the parent's process."""

from __future__ import annotations

from contextlib import suppress

from prefect import flow

from flows.pipeline import Tuned, tune
from flows.reports.subscribers import subscribers
from flows.running.deployed import supervised
from flows.running.gpus import gpus_wanted, held_gpus
from tasks.caching.context import open_run
from tasks.caching.engine import PrefectEngine
from tasks.caching.stage import StageReached
from tasks.config import Recipe
from tasks.model import with_weights
from tasks.refs import Prepared


@flow(name="amazon-ft-train")
def amazon_ft_train(recipe: Recipe, prepared: Prepared, until: str | None = None, run: str | None = None) -> Tuned | None:
    """Fine-tune the model and evaluate it; None when the run was to end earlier.

    Args:
        recipe: the parent's.
        prepared: what the stages before made.
        until: the stage to end with; None for all.
        run: the parent's run record, by its id; None in the parent's process.
    """

    def body() -> Tuned | None:
        observers = subscribers(recipe.tracking, run)
        record = open_run(
            recipe.name, recipe.model_dump(mode="json"), until=until, parent=run, engine=PrefectEngine(), observers=observers
        )
        with record, held_gpus(recipe.device, gpus_wanted(recipe.finetune)), suppress(StageReached):
            return tune(recipe, prepared.model_copy(update={"model": with_weights(prepared.model)}))
        return None

    return supervised(body)
