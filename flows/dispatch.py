"""Where finetune and evaluate run: nowhere when both are recorded, else in the child flow amazon-ft-train."""

from __future__ import annotations

from typing import Any

from tasks.config import Recipe
from tasks.evaluate import evaluate
from tasks.finetune import finetune
from tasks.refs import Adapter, Evaluation, Prepared
from tasks.stage import StageReached, is_planning


def tune(recipe: Recipe, prepared: Prepared) -> tuple[Adapter, Evaluation]:
    """The adapter and its evaluation. A child flow run is created only if one of them has to be made."""
    if is_planning() or _is_recorded(recipe, prepared):
        return finetune_and_evaluate(recipe, prepared)
    from flows.train import amazon_ft_train

    done = amazon_ft_train(recipe, prepared)
    if done is None:
        raise StageReached
    return done


def finetune_and_evaluate(recipe: Recipe, prepared: Prepared) -> tuple[Adapter, Evaluation]:
    """The two stages that need the device."""
    adapter = finetune(**_finetune_inputs(recipe, prepared))
    return adapter, evaluate(**_evaluate_inputs(recipe, prepared, adapter))


def _is_recorded(recipe: Recipe, prepared: Prepared) -> bool:
    adapter = finetune.lookup(**_finetune_inputs(recipe, prepared))
    return adapter is not None and evaluate.lookup(**_evaluate_inputs(recipe, prepared, adapter)) is not None


def _finetune_inputs(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    return {
        "model": prepared.model,
        "batches": prepared.batches,
        "config": recipe.finetune,
        "weights": recipe.model.weights,
        "max_tokens": recipe.tokenize.max_tokens,
        "device": recipe.device,
    }


def _evaluate_inputs(recipe: Recipe, prepared: Prepared, adapter: Adapter) -> dict[str, Any]:
    return {
        "model": prepared.model,
        "adapter": adapter,
        "tokens": prepared.tokens,
        "texts": prepared.texts,
        "template": prepared.template,
        "config": recipe.evaluate,
        "weights": recipe.model.weights,
        "device": recipe.device,
    }
