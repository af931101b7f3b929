"""Where finetune, baseline and evaluate run: nowhere when all are recorded, else in the child flow amazon-ft-train."""

from __future__ import annotations

from typing import Any

from tasks.baseline import baseline
from tasks.caching.stage import StageReached, is_planning, last_stage
from tasks.config import Recipe
from tasks.evaluate import evaluate
from tasks.finetune import finetune
from tasks.refs import Adapter, Baseline, Evaluation, PipelineError, Prepared, home


def tune(recipe: Recipe, prepared: Prepared) -> tuple[Adapter, Evaluation]:
    """The adapter and its evaluation. A child flow run is created only if something has to be made for them."""
    if is_planning() or _is_recorded(recipe, prepared, last_stage()):
        return finetune_and_evaluate(recipe, prepared)
    from flows.running.deployed import flow_run_id

    return _tune_there(recipe, prepared) if flow_run_id() is not None else _tune_here(recipe, prepared)


def _tune_here(recipe: Recipe, prepared: Prepared) -> tuple[Adapter, Evaluation]:
    from flows.train import amazon_ft_train

    done = amazon_ft_train(recipe, prepared)
    if done is None:
        raise StageReached
    return done


def _tune_there(recipe: Recipe, prepared: Prepared) -> tuple[Adapter, Evaluation]:
    """On the machine that serves work pool `cuda`; both references are then read from the records that both machines share."""
    from flows.running.child import run_child

    run_child(recipe, prepared, last_stage())
    if not _is_recorded(recipe, prepared, last_stage()):
        raise PipelineError(
            f"amazon-ft-train completed, but its records are not under {home()}; expected both workers to share one "
            "AMAZON_FT_HOME, be it a volume or a network file system. Mount the same one on both machines and run again."
        )
    return finetune_and_evaluate(recipe, prepared)


def finetune_and_evaluate(recipe: Recipe, prepared: Prepared) -> tuple[Adapter, Evaluation]:
    """The stages that need the device; Unsloth must be imported before what it patches, so the training comes first."""
    adapter = finetune(**_finetune_inputs(recipe, prepared))
    base = baseline(**_baseline_inputs(recipe, prepared))
    return adapter, evaluate(**_evaluate_inputs(recipe, prepared, adapter, base))


def _is_recorded(recipe: Recipe, prepared: Prepared, until: str | None = None) -> bool:
    adapter = finetune.lookup(**_finetune_inputs(recipe, prepared))
    if adapter is None or until == "finetune":
        return adapter is not None
    base = baseline.lookup(**_baseline_inputs(recipe, prepared))
    if base is None or until == "baseline":
        return base is not None
    return evaluate.lookup(**_evaluate_inputs(recipe, prepared, adapter, base)) is not None


def _finetune_inputs(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    return {
        "model": prepared.model,
        "batches": prepared.batches,
        "config": recipe.finetune,
        "weights": recipe.model.weights,
        "max_tokens": recipe.tokenize.max_tokens,
        "device": recipe.device,
        "held_out": prepared.tokens if recipe.finetune.eval_steps else None,
    }


def _baseline_inputs(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    return {
        "model": prepared.model,
        "tokenizer": prepared.model.tokenizer,
        "tokens": prepared.tokens,
        "texts": prepared.texts,
        "template": prepared.template,
        "config": recipe.evaluate,
        "weights": recipe.model.weights,
        "device": recipe.device,
    }


def _evaluate_inputs(recipe: Recipe, prepared: Prepared, adapter: Adapter, base: Baseline) -> dict[str, Any]:
    own = {"adapter": adapter, "baseline": base, "merged_prompt": recipe.sharegpt.merged_prompt}
    return _baseline_inputs(recipe, prepared) | own
