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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.caching.stage import stage
from tasks.caching.store import publish
from tasks.config import TemplateConfig
from tasks.refs import Artifact, ConfigError, InputError, Special, Split, Texts
from tasks.tables.arrow import Gather, bounded_ranges, list_sums, one_batch, read_table, row_lists, text_bytes, write_table
from tasks.tables.progress import counted
from tasks.tables.streams import in_order
from tasks.text.chat_template import QUESTION, SYSTEM, ChatTemplate, parse_template, to_jinja
from tasks.text.model_template import ModelTemplate, Renderer, messages_of, parse_model_template
from tasks.text.turns import WITH_SYSTEM, conversation_head

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

CHECKED_ROWS = 256
"""Texts that are compared with what the model's own template makes of them."""


@dataclass(frozen=True)
class Way:
    """How texts are made beside what template.json says."""

    config: TemplateConfig
    parts: ModelTemplate | None = None
    """Of a model's own template: it may strip texts of the white space at their ends, and begin answers with some."""
    special: Special | None = None
    """Set for a model's own template."""


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
    } | ({WITH_SYSTEM: parts.preamble} if SYSTEM in parts.preamble else {})


def describe_model_template(parts: ModelTemplate) -> dict[str, str | None]:
    """template.json of a model's own chat template."""
    return {
        "bos": parts.bos,
        "eos": parts.eos,
        "preamble": parts.preamble,
        "before_prompt": parts.before_prompt,
        "before_answer": parts.before_answer,
        "after_answer": parts.after_answer,
        "chat_template": parts.jinja,
    } | ({} if parts.with_system is None else {WITH_SYSTEM: parts.with_system})


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


def join_conversations(texts: pa.Array, batch: pa.RecordBatch, template: Mapping[str, str | None]) -> pa.Array:
    """The texts of turns as conversations of any width, each begun as its system text wants."""
    import pyarrow as pa
    import pyarrow.compute as pc

    heads = [conversation_head(system, template) for system in batch["system"].to_pylist()]
    offsets = np.cumsum([0, *pc.list_value_length(batch["products"]).to_pylist()], dtype=np.int32)
    whole = pc.binary_join(pa.ListArray.from_arrays(offsets, texts), "")
    return pc.binary_join_element_wise(pa.array(heads, pa.string()), whole, "")


def write_texts(conversations: Artifact, draft: Path, template: Mapping[str, str | None], way: Way) -> int:
    """texts.arrow and turns.arrow (tasks/refs.py); how many texts."""
    import pyarrow as pa

    turns = read_table(conversations / "turns.arrow")
    columns = pa.schema([(name, pa.string()) for name in ("uid", "prompt", "question", "answer")])
    write_table(draft / "turns.arrow", columns, _questioned(turns, way, columns))
    asked = read_table(draft / "turns.arrow")
    table = read_table(conversations / "conversations.arrow")
    schema = pa.schema({"uids": pa.list_(pa.string()), "products": pa.list_(pa.int32()), "text": pa.string()})
    if "system" in table.column_names:
        _check_systems(table, template)
        schema = schema.append(pa.field("system", pa.string()))
    else:
        table = table.select(["products"])
    rendered = _rendered(table, asked, template, schema)
    return write_table(draft / "texts.arrow", schema, counted("template", rendered, table.num_rows))


def _check_systems(table: pa.Table, template: Mapping[str, str | None]) -> None:
    import pyarrow.compute as pc

    if WITH_SYSTEM not in template and (count := pc.sum(pc.not_equal(table["system"], "")).as_py()):
        raise InputError(
            f"template: {count:,} conversations have a system text, and the chat template has no place for one. Set "
            "ingest.conversations.system=drop to drop them, write {SYSTEM} into template.chat_template, or use another model."
        )


def _questioned(turns: pa.Table, way: Way, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The turns with a question each, or with the literal text {question}; stripped of white space where the template does so."""
    import pyarrow as pa

    config = way.config
    questions = config.questions if config.fill_question else (QUESTION,)
    drawn = draw_questions(turns.num_rows, questions, config.seed)
    for start, end in bounded_ranges(text_bytes(turns, "prompt", "answer")):
        batch = one_batch(turns.slice(start, end - start))
        asked = pa.array(questions).take(pa.array(drawn[start:end]))
        prompts, answers = batch["prompt"], batch["answer"]
        if (parts := way.parts) is not None:
            prompts = _spoken(prompts, strip=parts.stripped.prompt)
            answers = _spoken(answers, strip=parts.stripped.answer, lead=parts.lead)
        yield pa.RecordBatch.from_arrays([batch["uid"], prompts, asked, answers], schema=schema)


def _spoken(texts: pa.Array, *, strip: bool, lead: str = "") -> pa.Array:
    import pyarrow as pa

    if not strip and not lead:
        return texts
    return pa.array([lead + (text.strip() if strip else text) for text in texts.to_pylist()], pa.string())


def _rendered(
    table: pa.Table, turns: pa.Table, template: Mapping[str, str | None], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    gather = Gather(turns)

    def texts(span: tuple[int, int]) -> pa.RecordBatch:
        batch = one_batch(table.slice(span[0], span[1] - span[0]))
        rows = batch["products"].flatten().to_numpy()
        if "system" in table.column_names:
            text = join_conversations(render_turns(gather(rows), template), batch, template)
            return pa.RecordBatch.from_arrays([batch["uids"], batch["products"], text, batch["system"]], schema=schema)
        width = len(rows) // (span[1] - span[0])
        taken = gather(rows)
        text = join_turns(render_turns(taken, template), width, template)
        return pa.RecordBatch.from_arrays([row_lists(taken["uid"], width), row_lists(pa.array(rows), width), text], schema=schema)

    return in_order(texts, bounded_ranges(list_sums(text_bytes(turns, "prompt", "answer"), table["products"])))


def _render(conversations: Artifact, template: Mapping[str, str | None], way: Way) -> Artifact:
    with publish("texts", need_bytes=2 * conversations.size_bytes) as draft:
        draft.rows = write_texts(conversations, draft.path, template, way)
        if way.parts is not None and way.special is not None:
            check_against_jinja(draft.path, Renderer(way.parts.jinja, way.special), way.parts)
    return draft.artifact


def check_against_jinja(texts: Path, render: Renderer, parts: ModelTemplate) -> None:
    """Compare some texts with what the model's template itself makes of their messages.

    Raises:
        InputError: for the first that differs, with both.
    """
    table, turns = read_table(texts / "texts.arrow"), Gather(read_table(texts / "turns.arrow"))
    for row in np.unique(np.linspace(0, table.num_rows - 1, CHECKED_ROWS).astype(np.int64)) if table.num_rows else ():
        text = table.slice(row, 1).to_pylist()[0]
        spoken = turns(np.array(text["products"]))
        answers = [answer.removeprefix(parts.lead) for answer in spoken["answer"].to_pylist()]
        messages = messages_of(text.get("system") or "", spoken["prompt"].to_pylist(), answers)
        if (theirs := render(messages)) != text["text"] + parts.closing:
            raise InputError(
                f"template: row {text['uids'][0]}: the model's chat template renders it otherwise than its parts: got "
                f"{text['text'][:400]!r}; expected {theirs[:400]!r}. Use template.source=document, or leave such rows out."
            )


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


def choose_way(special: Special, config: TemplateConfig, own: str | None) -> tuple[dict[str, str | None], Way]:
    """template.json, and how texts are made by it.

    Raises:
        ConfigError: when the template can't be used, or the model has none.
    """
    if config.source == "document":
        return describe_template(parse_template(config.chat_template, special), special, config), Way(config)
    if own is None:
        raise ConfigError(
            "template.source=model: the model's tokenizer has no chat template; expected an instruct model's. Name one in "
            "model.id, or use template.source=document."
        )
    parts = parse_model_template(own, special)
    return describe_model_template(parts), Way(config, parts, special)


@stage(version=1)
def template(conversations: Split, special: Special, config: TemplateConfig, own: str | None = None) -> Texts:
    """Texts with the preamble once, a question per product and EOS after every answer; and the Jinja chat template.

    `own` is the model's chat template, where the recipe is to use it.
    """
    description, way = choose_way(special, config, own)
    train = _render(conversations.train, description, way)
    evaluation = _render(conversations.evaluation, description, way)
    logger.info("template: %s texts, %s to evaluate on", f"{train.rows:,}", f"{evaluation.rows:,}")
    return Texts(train=train, evaluation=evaluation, template=_publish_template(description), preview=_preview(train))
