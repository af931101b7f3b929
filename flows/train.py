"""The child flow amazon-ft-train: what needs the device, run by the CUDA pool's worker or in the parent's process."""

from __future__ import annotations

from contextlib import suppress

from prefect import flow

from flows.dispatch import finetune_and_evaluate
from tasks import runs
from tasks.config import Recipe
from tasks.refs import Adapter, Evaluation, Prepared
from tasks.stage import StageReached


@flow(name="amazon-ft-train", flow_run_name="{recipe.name}")
def amazon_ft_train(recipe: Recipe, prepared: Prepared) -> tuple[Adapter, Evaluation] | None:
    """Fine-tune the model and evaluate it; None when the run was to end earlier."""
    with runs.run_record(recipe.name, recipe.model_dump(mode="json")), suppress(StageReached):
        return finetune_and_evaluate(recipe, prepared)
    return None
