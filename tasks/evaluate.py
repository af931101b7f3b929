"""Evaluate: the tuned model against the base model on held-out rows.

    metrics.json         rows, tokens; base and tuned {nll, perplexity, their intervals, rouge1, ..., copies_title};
                         difference {nll, nll_low, nll_high}; buckets; both models' nll of every row (tasks/evaluation/metrics.py)
    generations.jsonl    uid, prompt, reference; of each model what it said, whether it ended, how likely an empty answer was

nll is the mean negative log-likelihood per labelled token, in nats; perplexity is its exponential.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.caching.stage import stage
from tasks.caching.store import publish
from tasks.config import EvaluateConfig, WeightsConfig
from tasks.evaluation.answers import NOTHING, SAID, Prompt, Questions, Said, collect_answers, read_questions
from tasks.evaluation.metrics import length_buckets, likelihood, text_scores
from tasks.refs import Adapter, Artifact, Baseline, Evaluation, HeldOut, InputError, Model

logger = logging.getLogger(__name__)


def title_of(asked: str, merged_prompt: str) -> str:
    """A product's title in its merged prompt; all of the prompt where that is more than a title in plain text.

    >>> title_of("Título do produto: Red Kettle", "Título do produto: {title}")
    'Red Kettle'
    """
    before, found, after = merged_prompt.partition("{title}")
    plain = found and not set("{}[]") & set(before + after)
    return asked.removeprefix(before).removesuffix(after).strip() if plain else asked


def compute_metrics(questions: Questions, base: Said, tuned: Said, merged_prompt: str) -> dict[str, Any]:
    """metrics.json: means over all rows with their intervals, scores of the texts, and each row's likelihood."""
    both, tokens = {"base": base, "tuned": tuned}, questions.tokens
    likely = likelihood(tokens, base.nll, tuned.nll)
    references = [prompt.reference for prompt in questions.prompts]
    titles = [title_of(prompt.asked, merged_prompt) for prompt in questions.prompts]
    scores = {name: text_scores(said.texts, references, titles, said.ended) for name, said in both.items()}
    return {
        "rows": len(questions.uids),
        "tokens": sum(tokens),
        **{name: likely[name] | scores[name] for name in both},
        "difference": likely["difference"],
        "buckets": length_buckets(tokens, base.nll, tuned.nll),
        "per_row": [
            {"uids": list(row), "tokens": count, "base_nll": one, "tuned_nll": other}
            for row, count, one, other in zip(questions.uids, tokens, base.nll, tuned.nll, strict=True)
        ],
    }


def side_by_side(prompts: Sequence[Prompt], base: Said, tuned: Said) -> list[dict[str, Any]]:
    """generations.jsonl: what was asked and what each model said."""
    both = {"base": base, "tuned": tuned}
    return [
        {
            "uid": prompt.uid,
            "prompt": prompt.text,
            "reference": prompt.reference,
            **{name: said.texts[index] for name, said in both.items()},
            **{f"{name}_ended": said.ended[index] for name, said in both.items()},
            **{f"{name}_ends_at_once": said.ends_at_once[index] for name, said in both.items()},
        }
        for index, prompt in enumerate(prompts)
    ]


def check_adapter_fits(adapter: Path, model: Model) -> None:
    """Refuse an adapter that was made for another base model.

    Raises:
        InputError: with both shapes.
    """
    from safetensors import safe_open

    from tasks.training.model_shape import read_shape

    shape = read_shape(Path(model.path))
    with safe_open(adapter / "adapter_model.safetensors", framework="np") as file:
        sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # not a mapping
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in sizes if ".layers." in name}
    if shape is None or not layers:
        return
    widths = {sizes[name][1] for name in sizes if name.endswith("q_proj.lora_A.weight")} or {shape.hidden}
    got = f"{max(layers) + 1} layers of width {', '.join(map(str, sorted(widths)))}"
    if max(layers) >= shape.layers or widths != {shape.hidden}:
        raise InputError(
            f"evaluate: the adapter does not fit the base model {model.name}: got {got}; expected {shape.layers} of width "
            f"{shape.hidden}. Use the model that it was trained on."
        )


def _publish(metrics: Mapping[str, Any], generations: Sequence[Mapping[str, Any]]) -> Artifact:
    with publish("evaluation") as draft:
        (draft / "metrics.json").write_text(json.dumps(metrics, indent=1, ensure_ascii=False), encoding="utf-8")
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in generations)
        (draft / "generations.jsonl").write_text("".join(lines), encoding="utf-8")
        draft.rows = metrics["rows"]
    return draft.artifact


def _skip() -> Evaluation:
    logger.warning("evaluate is skipped: %s.", NOTHING)
    return Evaluation(data=_publish({"rows": 0, "skipped": NOTHING}, []), summary={"rows": 0.0})


@stage(version=1)
def evaluate(
    model: Model,
    adapter: Adapter,
    baseline: Baseline,
    held_out: HeldOut,
    config: EvaluateConfig,
    weights: WeightsConfig,
    merged_prompt: str,
    device: str,
) -> Evaluation:
    """Ask the tuned model what the base model was asked, and measure how they differ; `device` is cpu or cuda."""
    if not held_out.tokens.rows:
        return _skip()
    check_adapter_fits(adapter.data.path, model)
    questions = read_questions(held_out, config)
    base = Said.model_validate_json((baseline.data / SAID).read_bytes())
    tuned = collect_answers(questions, model, adapter.data.path, config=config, weights=weights, device=device)
    metrics = compute_metrics(questions, base, tuned, merged_prompt)
    summary = {f"{name}_{figure}": metrics[name][figure] for name in ("base", "tuned") for figure in ("nll", "perplexity")}
    return Evaluation(data=_publish(metrics, side_by_side(questions.prompts, base, tuned)), summary=summary)
