r"""Conversations to text, and the chat template that a server will render the same text with.

    preamble                              <BOS>Answer the question.
    prompt, question, answer       ->     ### Title:\nTutu\n\n### Question:\nWhat is it?\n\n### Answer:\n3 layers<EOS>

Product text is data: whatever it looks like, it is copied and never interpreted. The language itself is in
tasks/text/chat_template.py. turns.arrow keeps the pieces (uid, prompt, question, answer) beside the whole texts, so that each
product is tokenized once and the loss mask knows where an answer is.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.caching.stage import stage
from tasks.caching.store import publish
from tasks.config import TemplateConfig
from tasks.refs import Artifact, ConfigError, Special, Split, Texts
from tasks.tables.arrow import Gather, bounded_ranges, list_sums, one_batch, read_table, row_lists, text_bytes, write_table
from tasks.tables.progress import counted
from tasks.tables.streams import in_order
from tasks.text.chat_template import QUESTION, SYSTEM, ChatTemplate, parse_template, to_jinja

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)


def draw_questions(rows: int, questions: tuple[str, ...], seed: int) -> NDArray[np.int64]:
    """The number of each product's question; that of row i is the same however many rows follow.

    >>> draw_questions(3, ("What?", "Why?"), 3407).tolist() == draw_questions(5, ("What?", "Why?"), 3407).tolist()[:3]
    True
    """
    return np.random.default_rng(seed).integers(len(questions), size=rows)


def fill_system(preamble: str, system: str | None) -> str:
    """The preamble with the system message in it.

    Raises:
        ConfigError: when there is a place for it and no message.
    """
    if SYSTEM in preamble and system is None:
        raise ConfigError(
            f"template.system: got null; expected a text for {SYSTEM} in template.chat_template. Set it, or remove {SYSTEM}."
        )
    return preamble.replace(SYSTEM, system or "")


def describe_template(parts: ChatTemplate, special: Special, config: TemplateConfig) -> dict[str, str | None]:
    """template.json: what a tokenizer's directory and the tokenize stage need to know.

    The text of a turn is before_prompt, prompt, before_answer, answer, after_answer, with the question in place of {question}.
    """
    return {
        "bos": special.bos,
        "eos": special.eos,
        "preamble": fill_system(parts.preamble, config.system),
        "before_prompt": parts.before_prompt,
        "before_answer": parts.between,
        "after_answer": parts.after_answer,
        "chat_template": to_jinja(
            parts, special, system=config.system, question=config.questions[0] if config.fill_question else None
        ),
    }


def render_turns(turns: pa.RecordBatch, template: Mapping[str, str | None]) -> pa.Array:
    """The text of each turn (uid, prompt, question, answer).

    >>> import pyarrow as pa
    >>> turns = pa.RecordBatch.from_pydict({"prompt": ["Tutu"], "question": ["What?"], "answer": ["{INPUT}"]})
    >>> template = {"before_prompt": "T: ", "before_answer": " {question} A: ", "after_answer": "</s>"}
    >>> render_turns(turns, template).to_pylist()
    ['T: Tutu What? A: {INPUT}</s>']
    """
    import pyarrow.compute as pc

    def literal(name: str) -> Iterator[Any]:
        pieces = re.split(r"(\{question\})", template[name] or "")
        return (turns["question"] if piece == QUESTION else piece for piece in pieces)

    parts = [*literal("before_prompt"), turns["prompt"], *literal("before_answer"), turns["answer"], *literal("after_answer")]
    return pc.binary_join_element_wise(*parts, "")


def join_turns(texts: pa.Array, width: int, template: Mapping[str, str | None]) -> pa.Array:
    """Conversations of `width` turns each: BOS and preamble, then the turns."""
    import pyarrow.compute as pc

    head = (template["bos"] or "") + (template["preamble"] or "")
    turns = [texts.take(np.arange(turn, len(texts), width)) for turn in range(width)]
    return pc.binary_join_element_wise(head, *turns, "")


def write_texts(conversations: Artifact, draft: Path, template: Mapping[str, str | None], config: TemplateConfig) -> int:
    """texts.arrow and turns.arrow (tasks/refs.py); how many texts."""
    import pyarrow as pa

    turns = read_table(conversations / "turns.arrow")
    columns = pa.schema([(name, pa.string()) for name in ("uid", "prompt", "question", "answer")])
    write_table(draft / "turns.arrow", columns, _questioned(turns, config, columns))
    asked = read_table(draft / "turns.arrow")
    table = read_table(conversations / "conversations.arrow").select(["products"])
    schema = pa.schema({"uids": pa.list_(pa.string()), "products": pa.list_(pa.int32()), "text": pa.string()})
    rendered = _rendered(table, asked, template, schema)
    return write_table(draft / "texts.arrow", schema, counted("template", rendered, table.num_rows))


def _questioned(turns: pa.Table, config: TemplateConfig, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The turns with a question each, or with the literal text {question}."""
    import pyarrow as pa

    questions = config.questions if config.fill_question else (QUESTION,)
    drawn = draw_questions(turns.num_rows, questions, config.seed)
    for start, end in bounded_ranges(text_bytes(turns, "prompt", "answer")):
        batch = one_batch(turns.slice(start, end - start))
        asked = pa.array(questions).take(pa.array(drawn[start:end]))
        yield pa.RecordBatch.from_arrays([batch["uid"], batch["prompt"], asked, batch["answer"]], schema=schema)


def _rendered(
    table: pa.Table, turns: pa.Table, template: Mapping[str, str | None], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    gather = Gather(turns)

    def texts(span: tuple[int, int]) -> pa.RecordBatch:
        rows = one_batch(table.slice(span[0], span[1] - span[0]))["products"].flatten().to_numpy()
        width = len(rows) // (span[1] - span[0])
        taken = gather(rows)
        text = join_turns(render_turns(taken, template), width, template)
        return pa.RecordBatch.from_arrays([row_lists(taken["uid"], width), row_lists(pa.array(rows), width), text], schema=schema)

    return in_order(texts, bounded_ranges(list_sums(text_bytes(turns, "prompt", "answer"), table["products"])))


def _render(conversations: Artifact, template: Mapping[str, str | None], config: TemplateConfig) -> Artifact:
    with publish("texts", need_bytes=2 * conversations.size_bytes) as draft:
        draft.rows = write_texts(conversations, draft.path, template, config)
    return draft.artifact


def _publish_template(template: Mapping[str, str | None]) -> Artifact:
    with publish("template") as draft:
        text = json.dumps(template, ensure_ascii=False, indent=1, sort_keys=True)
        (draft / "template.json").write_text(text, encoding="utf-8", newline="\n")
    return draft.artifact


def _preview(texts: Artifact) -> tuple[str, ...]:
    preview = tuple(read_table(texts / "texts.arrow").slice(0, 2)["text"].to_pylist())
    for number, text in enumerate(preview):
        logger.info("training row %s:\n%s", number, text)
    return preview


@stage(version=1)
def template(conversations: Split, special: Special, config: TemplateConfig) -> Texts:
    """Texts with the preamble once, a question per product and EOS after every answer; and the Jinja chat template."""
    description = describe_template(parse_template(config.chat_template, special), special, config)
    train = _render(conversations.train, description, config)
    evaluation = _render(conversations.evaluation, description, config)
    logger.info("template: %s texts, %s to evaluate on", f"{train.rows:,}", f"{evaluation.rows:,}")
    return Texts(train=train, evaluation=evaluation, template=_publish_template(description), preview=_preview(train))
