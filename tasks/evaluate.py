"""Evaluate: the base model against the tuned one on held-out rows.

    metrics.json         rows, tokens, base and tuned {nll, perplexity}, and both models' nll of every row
    generations.jsonl    uid, prompt, reference, base, tuned, and each model's probability of an empty answer

nll is the mean negative log-likelihood per labelled token, in nats; perplexity is its exponential. Numbers are rounded to
DIGITS decimals, coarser than what threads or batches change.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config import EvaluateConfig, WeightsConfig
from tasks.refs import Adapter, Artifact, Evaluation, InputError, Model
from tasks.stage import stage
from tasks.store import publish

if TYPE_CHECKING:
    from tasks.backends.scoring import Prompt, Result

logger = logging.getLogger(__name__)

DIGITS = 5


def render_prompt(turn: Mapping[str, str], template: Mapping[str, str | None]) -> str:
    """The text of a conversation up to its first answer; as the template stage renders it.

    >>> template = {"bos": "<s>", "preamble": "Hi. ", "before_prompt": "T: ", "before_answer": " {question} A: "}
    >>> render_prompt({"prompt": "Tutu", "question": "What?"}, template)
    '<s>Hi. T: Tutu What? A: '
    """
    before, between = (
        str(template[name] or "").replace("{question}", turn["question"]) for name in ("before_prompt", "before_answer")
    )
    return f"{template['bos'] or ''}{template['preamble'] or ''}{before}{turn['prompt']}{between}"


def choose_rows(rows: int, wanted: int, seed: int) -> list[int]:
    """Which rows to generate for, in ascending order.

    >>> choose_rows(5, 9, 3407)
    [0, 1, 2, 3, 4]
    """
    import numpy as np

    return sorted(int(row) for row in np.random.default_rng(seed).permutation(rows)[:wanted])


def measure(uids: Sequence[Sequence[str]], tokens: Sequence[int], result: Result) -> dict[str, Any]:
    """metrics.json: means per token over all rows, and each row's."""
    models = {"base": result.base.nll, "tuned": result.tuned.nll}
    means = {name: sum(nll) / max(1, sum(tokens)) for name, nll in models.items()}
    return {
        "rows": len(uids),
        "tokens": sum(tokens),
        **{name: {"nll": round(mean, DIGITS), "perplexity": round(math.exp(mean), DIGITS)} for name, mean in means.items()},
        "per_row": [
            {
                "uids": list(row),
                "tokens": count,
                **{f"{name}_nll": round(nll[index] / max(1, count), DIGITS) for name, nll in models.items()},
            }
            for index, (row, count) in enumerate(zip(uids, tokens, strict=True))
        ],
    }


def side_by_side(prompts: Sequence[Prompt], result: Result) -> list[dict[str, Any]]:
    """generations.jsonl: what was asked and what each model said."""
    return [
        {
            "uid": prompt.uid,
            "prompt": prompt.text,
            "reference": prompt.reference,
            "base": result.base.texts[index],
            "tuned": result.tuned.texts[index],
            "base_ends_at_once": round(result.base.ends_at_once[index], DIGITS),
            "tuned_ends_at_once": round(result.tuned.ends_at_once[index], DIGITS),
        }
        for index, prompt in enumerate(prompts)
    ]


def check_adapter(adapter: Path, model: Model) -> None:
    """Refuse an adapter that was made for another base model.

    Raises:
        InputError: with both shapes.
    """
    from safetensors import safe_open

    from tasks.backends.memory import read_shape

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


def _read(path: Path, *columns: str) -> list[dict[str, Any]]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return reader.read_all().select(columns).to_pylist()


def _prompts(texts: Artifact, template: Artifact, config: EvaluateConfig) -> tuple[Prompt, ...]:
    from tasks.backends.scoring import Prompt

    turns = _read(texts / "turns.arrow", "uid", "prompt", "question", "answer")
    parts = json.loads((template / "template.json").read_text())
    chosen = (turns[row] for row in choose_rows(len(turns), config.generations, config.seed))
    return tuple(Prompt(uid=turn["uid"], text=render_prompt(turn, parts), reference=turn["answer"]) for turn in chosen)


def _publish(metrics: Mapping[str, Any], generations: Sequence[Mapping[str, Any]]) -> Artifact:
    with publish("evaluation") as draft:
        (draft / "metrics.json").write_text(json.dumps(metrics, indent=1, ensure_ascii=False))
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in generations)
        (draft / "generations.jsonl").write_text("".join(lines))
        draft.rows = metrics["rows"]
    return draft.artifact


def _skip() -> Evaluation:
    reason = "no held-out rows: sample.eval_rows is 0, or tokenize dropped them all"
    logger.warning("evaluate is skipped: %s.", reason)
    return Evaluation(data=_publish({"rows": 0, "skipped": reason}, []), summary={"rows": 0.0})


@stage(version=1, chosen=lambda _: ("tasks.backends.scoring",))
def evaluate(
    model: Model,
    adapter: Adapter,
    tokens: Artifact,
    texts: Artifact,
    template: Artifact,
    config: EvaluateConfig,
    weights: WeightsConfig,
    device: str,
) -> Evaluation:
    """Score base and tuned model on the held-out tokens.arrow, and let both answer some of the prompts of turns.arrow."""
    from tasks.backends import hardware
    from tasks.backends.scoring import Request, score

    rows = _read(tokens / "tokens.arrow", "uids", "input_ids", "labels") if tokens.rows else []
    if not rows:
        return _skip()
    hardware.check_model(model)
    hardware.check_device(device)
    check_adapter(adapter.data.path, model)
    prompts = _prompts(texts, template, config)
    result = score(
        Request(
            model=model,
            adapter=str(adapter.data.path),
            dtype=hardware.resolve_dtype(weights.dtype, device),
            load_in_4bit=weights.load_in_4bit,
            device=device,
            input_ids=tuple(tuple(row["input_ids"]) for row in rows),
            labels=tuple(tuple(row["labels"]) for row in rows),
            prompts=prompts,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )
    )
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    metrics = measure([row["uids"] for row in rows], counts, result)
    summary = {f"{name}_{figure}": metrics[name][figure] for name in ("base", "tuned") for figure in ("nll", "perplexity")}
    return Evaluation(data=_publish(metrics, side_by_side(prompts, result)), summary=summary)
