"""Baseline: what the base model says on the held-out rows, asked once for all adapters that are set beside it.

baseline/     said.json (tasks/evaluation/answers.py)
"""

from __future__ import annotations

from tasks.caching.stage import stage
from tasks.caching.store import publish
from tasks.config import EvaluateConfig, WeightsConfig
from tasks.evaluation.answers import SAID, Said, ask, read_asked
from tasks.refs import Artifact, Baseline, Model, Tokenizer

EMPTY = Said(nll=(), texts=(), ended=(), ends_at_once=())


@stage(version=1)
def baseline(
    model: Model,
    tokenizer: Tokenizer,
    tokens: Artifact,
    texts: Artifact,
    template: Artifact,
    config: EvaluateConfig,
    weights: WeightsConfig,
    device: str,
) -> Baseline:
    """Ask the base model on the held-out tokens.arrow and on some of the prompts of turns.arrow; `device` is cpu or cuda.

    The tokenizer is the model's, named by itself because its files count here: they pad and decode.
    """
    said = EMPTY
    if tokens.rows:
        asked = read_asked(tokens, texts, template, config)
        said = ask(asked, model.model_copy(update={"tokenizer": tokenizer}), None, config=config, weights=weights, device=device)
    with publish("baseline") as draft:
        (draft / SAID).write_text(said.model_dump_json(), encoding="utf-8")
        draft.rows = len(said.nll)
    return Baseline(data=draft.artifact)
