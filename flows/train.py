"""The child flow amazon-ft-train: what needs the device, run by the CUDA pool's worker or in the parent's process."""

from __future__ import annotations

from contextlib import suppress

from prefect import flow

from flows.reports.ui import shown
from flows.running.deployed import supervised
from flows.running.dispatch import finetune_and_evaluate
from flows.running.gpus import one_gpu
from flows.running.naming import name_run
from tasks.caching import runs
from tasks.caching.stage import StageReached, ending_with, last_stage
from tasks.config import Recipe
from tasks.model import with_weights
from tasks.refs import Adapter, Evaluation, Prepared


@flow(name="amazon-ft-train", flow_run_name=name_run)
def amazon_ft_train(recipe: Recipe, prepared: Prepared, until: str | None = None) -> tuple[Adapter, Evaluation] | None:
    """Fine-tune the model and evaluate it; None when the run was to end earlier.

    Args:
        recipe: the parent's.
        prepared: what the stages before made.
        until: the stage to end with; None for all.
    """
    record = runs.run_record(recipe.name, recipe.model_dump(mode="json"), until=until, child=True)
    with supervised(), record, ending_with(until or last_stage()), shown(recipe), one_gpu(recipe.device), suppress(StageReached):
        here = prepared.model_copy(update={"model": with_weights(prepared.model)})
        return finetune_and_evaluate(recipe, here)
    return None
