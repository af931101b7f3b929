"""Where finetune and evaluate run: nowhere when both are recorded, else in the child flow amazon-ft-train."""

from __future__ import annotations

from tasks.evaluate import evaluate
from tasks.finetune import finetune

from tasks.config import Recipe
from tasks.refs import Adapter, Artifact, Evaluation, Model
from tasks.stage import StageReached, is_planning


def tune(recipe: Recipe, model: Model, batches: Artifact, tokens: Artifact, texts: Artifact) -> tuple[Adapter, Evaluation]:
    """The adapter and its evaluation. A child flow run is created only if one of them has to be made."""
    if is_planning() or _is_recorded(recipe, model, batches, tokens, texts):
        return finetune_and_evaluate(recipe, model, batches, tokens, texts)
    from flows.train import amazon_ft_train

    done = amazon_ft_train(recipe, model, batches, tokens, texts)
    if done is None:
        raise StageReached
    return done


def finetune_and_evaluate(
    recipe: Recipe, model: Model, batches: Artifact, tokens: Artifact, texts: Artifact
) -> tuple[Adapter, Evaluation]:
    """The two stages that need the device."""
    adapter = finetune(model, batches, recipe.finetune, recipe.model.weights, recipe.tokenize.max_tokens, recipe.device)
    return adapter, evaluate(model, adapter, tokens, texts, recipe.evaluate, recipe.model.weights, recipe.device)


def _is_recorded(recipe: Recipe, model: Model, batches: Artifact, tokens: Artifact, texts: Artifact) -> bool:
    adapter = finetune.lookup(model, batches, recipe.finetune, recipe.model.weights, recipe.tokenize.max_tokens, recipe.device)
    if adapter is None:
        return False
    return evaluate.lookup(model, adapter, tokens, texts, recipe.evaluate, recipe.model.weights, recipe.device) is not None
