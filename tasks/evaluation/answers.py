"""Questions to base and tuned model on the held-out rows, and the answers of each: shared by baseline and evaluate.

    said.json     nll per labelled token of each row; texts, ended, ends_at_once of each prompt

Equal settings ask both models the same in the same order, so that their answers can be set side by side row by row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict

from tasks.config import EvaluateConfig, WeightsConfig
from tasks.refs import HeldOut, Model, Tokenizer, Value
from tasks.training.inference.likelihood import labelled_tokens

if TYPE_CHECKING:
    from tasks.training.inference.scoring import Answers

SAID = "said.json"
DIGITS = 5
"""Decimals that neither threads nor batches change."""
NOTHING = "no held-out rows: sample.eval_rows is 0, or tokenize dropped them all"


@dataclass(frozen=True)
class Prompt:
    """A text to go on from."""

    uid: str
    asked: str
    """The product as it is asked about: its merged prompt."""
    text: str
    reference: str


@dataclass(frozen=True)
class Questions:
    """The held-out rows and prompts, and the tokenizer of both."""

    tokenizer: Tokenizer
    uids: Sequence[Sequence[str]]
    input_ids: Sequence[Sequence[int]]
    labels: Sequence[Sequence[int]]
    prompts: Sequence[Prompt]

    @property
    def tokens(self) -> list[int]:
        """Labelled ones of each row."""
        return labelled_tokens(self.labels)


class Said(Value):
    """One model's answers, in numbers coarser than what threads or batches change."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    nll: tuple[float, ...]
    """Negative log-likelihood per labelled token of each row, in nats."""
    texts: tuple[str, ...]
    ended: tuple[bool, ...]
    ends_at_once: tuple[float, ...]


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


def read_questions(held_out: HeldOut, config: EvaluateConfig) -> Questions:
    """The held-out rows of tokens.arrow, and prompts from some of the products of turns.arrow."""
    rows = _read(held_out.tokens / "tokens.arrow", "uids", "input_ids", "labels")
    turns = _read(held_out.texts / "turns.arrow", "uid", "prompt", "question", "answer")
    parts = json.loads((held_out.template / "template.json").read_text(encoding="utf-8"))
    prompts = _prompts_of_conversations(held_out, turns, parts, config) or _prompts_of_products(turns, parts, config)
    ends = held_out.tokenizer.special.model_copy(update={"eos": parts["eos"]})
    return Questions(
        tokenizer=held_out.tokenizer.model_copy(update={"special": ends}),
        uids=[row["uids"] for row in rows],
        input_ids=[row["input_ids"] for row in rows],
        labels=[row["labels"] for row in rows],
        prompts=prompts,
    )


def _prompts_of_products(turns: Sequence[Mapping[str, str]], parts: Mapping[str, Any], config: EvaluateConfig) -> list[Prompt]:
    chosen = (turns[row] for row in choose_rows(len(turns), config.generations, config.seed))
    return [Prompt(turn["uid"], turn["prompt"], render_prompt(turn, parts), turn["answer"]) for turn in chosen]


def _prompts_of_conversations(
    held_out: HeldOut, turns: Sequence[Mapping[str, str]], parts: Mapping[str, Any], config: EvaluateConfig
) -> list[Prompt]:
    """Conversations up to their last answer; none where the rows are products."""
    path = held_out.texts / "texts.arrow"
    if len(turns) == 0 or not path.is_file() or "system" not in _columns(path):
        return []
    texts = _read(path, "products", "text")
    chosen = (texts[row] for row in choose_rows(len(texts), config.generations, config.seed))
    return [_last_prompt(turns[text["products"][-1]], text["text"], parts) for text in chosen]


def _last_prompt(turn: Mapping[str, str], text: str, parts: Mapping[str, Any]) -> Prompt:
    asked = text.removesuffix(turn["answer"] + parts["after_answer"])
    return Prompt(turn["uid"], turn["prompt"], asked, turn["answer"])


def _columns(path: Path) -> list[str]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return list(reader.schema.names)


def collect_answers(
    questions: Questions,
    model: Model,
    adapter: Path | None,
    *,
    config: EvaluateConfig,
    weights: WeightsConfig,
    device: str,
) -> Said:
    """Return the answers of the model, with the adapter of a directory or without one.

    Raises:
        ConfigError: when the device is not there.
        InputError: when the model's files are not.
        PipelineError: when memory runs out.
    """
    from tasks.training import hardware
    from tasks.training.inference.scoring import Request, score

    hardware.check_model(model)
    hardware.check_device(device)
    answers = score(
        Request(
            model=model.model_copy(update={"tokenizer": questions.tokenizer}),
            adapter=str(adapter) if adapter else None,
            dtype=hardware.resolve_dtype(weights.dtype, device),
            load_in_4bit=weights.load_in_4bit,
            device=device,
            input_ids=tuple(map(tuple, questions.input_ids)),
            labels=tuple(map(tuple, questions.labels)),
            prompts=tuple(prompt.text for prompt in questions.prompts),
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
        )
    )
    return per_token(answers, questions.tokens)


def per_token(answers: Answers, tokens: Sequence[int]) -> Said:
    """Answers with sums made means, and rounded."""
    return Said(
        nll=tuple(round(total / max(1, count), DIGITS) for total, count in zip(answers.nll, tokens, strict=True)),
        texts=answers.texts,
        ended=answers.ended,
        ends_at_once=tuple(round(share, DIGITS) for share in answers.ends_at_once),
    )


def _read(path: Path, *columns: str) -> list[dict[str, Any]]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return reader.read_all().select(columns).to_pylist()
