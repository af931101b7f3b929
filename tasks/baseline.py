"""Baseline: what the base model says on the held-out rows, asked once for all adapters that are set beside it.

baseline/     said.json (tasks/evaluation/answers.py)
"""

from __future__ import annotations

from tasks.caching.stage import stage
from tasks.caching.store import publish
from tasks.config import EvaluateConfig, WeightsConfig
from tasks.evaluation.answers import SAID, Said, collect_answers, read_questions
from tasks.refs import Baseline, HeldOut, Model

EMPTY = Said(nll=(), texts=(), ended=(), ends_at_once=())


@stage(version=1)
def baseline(model: Model, held_out: HeldOut, config: EvaluateConfig, weights: WeightsConfig, device: str) -> Baseline:
    """Ask the base model on the held-out tokens.arrow and on some of the prompts of turns.arrow; `device` is cpu or cuda."""
    said = EMPTY
    if held_out.tokens.rows:
        questions = read_questions(held_out, config)
        said = collect_answers(questions, model, None, config=config, weights=weights, device=device)
    with publish("baseline") as draft:
        (draft / SAID).write_text(said.model_dump_json(), encoding="utf-8")
        draft.rows = len(said.nll)
    return Baseline(data=draft.artifact)
