"""Conversations keep their turns from row to token: the model's own template renders them, and only answers are learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from tasks.caching.store import publish
from tasks.config import SampleConfig, SharegptConfig, TemplateConfig
from tasks.reading.conversations import Conversation, conversation_table
from tasks.refs import Artifact, InputError, Products, Special, Split, Texts
from tasks.sample import sample
from tasks.sharegpt import sharegpt
from tasks.tables.arrow import write_table
from tasks.template import template
from tests.support.chat_templates import CHATML, LLAMA2, LLAMA3, MISTRAL, PHI3
from tests.support.prepared import encode, rows_of
from tests.support.tiny import BOS, EOS, PAD

SPECIAL = Special(bos=BOS, eos=EOS)
OWN = CHATML.replace("<|im_end|>", EOS)
LONG = Conversation("long", "Seja breve.", ["Chaleira?", "Marca?"], ["De aço.", "Aurora."])
SHORT = Conversation("short", "", ["Panela?"], ["De ferro."])
MODEL = TemplateConfig(source="model")


def published(*rows: Conversation) -> Artifact:
    table = conversation_table(iter(rows))
    with publish("products") as draft:
        draft.rows = write_table(draft / "products.arrow", table.schema, table.to_batches())
    return draft.artifact


def render(*rows: Conversation, own: str | None = OWN, config: TemplateConfig = MODEL) -> Texts:
    split = Split(train=published(*rows), evaluation=published(rows[0]))
    return template.fn(sharegpt.fn(split, SharegptConfig()), SPECIAL, config, own)


def learnt(texts: Texts, directory: Path, **changes: Any) -> list[str]:
    tokens = rows_of(encode(texts, directory, **changes).train)
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    labels = ([token for token in row["labels"] if token != -100] for row in tokens)
    return [backend.decode(row, skip_special_tokens=False) for row in labels]


def test_each_answer_of_a_conversation_is_learnt_and_nothing_else(tmp_path: Path) -> None:
    texts = render(LONG, SHORT)
    assert learnt(texts, tmp_path / "tokenizer") == [f"De aço.{EOS}Aurora.{EOS}", f"De ferro.{EOS}"]
    assert [row["uids"] for row in rows_of(encode(texts, tmp_path / "tokenizer").train)] == [["long"], ["short"]]


def test_texts_are_those_of_the_models_template() -> None:
    said = [row["text"] for row in rows_of(render(LONG, SHORT).train)]
    assert said[0].startswith(f"<|im_start|>system\nSeja breve.{EOS}\n<|im_start|>user\nChaleira?{EOS}\n")
    assert said[1].startswith(f"<|im_start|>system\nYou are a helpful AI assistant.{EOS}\n<|im_start|>user\nPanela?{EOS}\n")
    described = json.loads((render(SHORT).template / "template.json").read_text(encoding="utf-8"))
    assert described["chat_template"] == OWN


def test_documents_template_takes_several_turns_and_a_system_text() -> None:
    config = TemplateConfig(chat_template="{SYSTEM}\n\nQ: {INPUT}\n\nA: {OUTPUT}", system="Responda.")
    said = [row["text"] for row in rows_of(render(LONG, SHORT, config=config).train)]
    assert said == [
        f"{BOS}Seja breve.\n\nQ: Chaleira?\n\nA: De aço.{EOS}\n\nQ: Marca?\n\nA: Aurora.{EOS}",
        f"{BOS}Responda.\n\nQ: Panela?\n\nA: De ferro.{EOS}",
    ]


def test_white_space_goes_where_the_template_strips_it(tmp_path: Path) -> None:
    texts = render(Conversation("u", "", [" Panela?\n"], ["\n De ferro. "]), own=LLAMA3.replace("<|eot_id|>", EOS))
    assert learnt(texts, tmp_path / "tokenizer") == [f"De ferro.{EOS}"]


def test_answer_may_end_with_another_token_that_stops_the_model(tmp_path: Path) -> None:
    own = PHI3.replace("<|end|>", PAD)
    with publish("products") as draft:
        table = conversation_table(iter([LONG, SHORT]))
        draft.rows = write_table(draft / "products.arrow", table.schema, table.to_batches())
    split = Split(train=draft.artifact, evaluation=draft.artifact)
    stops = Special(bos=BOS, eos=EOS, stops=(PAD,))
    texts = template.fn(sharegpt.fn(split, SharegptConfig()), stops, MODEL, own)
    assert learnt(texts, tmp_path / "tokenizer") == [f"De aço.{PAD}Aurora.{PAD}", f"De ferro.{PAD}"]
    assert rows_of(texts.train)[1]["text"] == f"<|user|>\nPanela?{PAD}\n<|assistant|>\nDe ferro.{PAD}\n"


def test_white_space_that_begins_an_answer_is_learnt(tmp_path: Path) -> None:
    own = LLAMA2.replace("bos_token", f"'{BOS}'").replace("eos_token", f"'{EOS}'")
    texts = render(Conversation("u", "", ["Panela?", "E?"], ["De ferro.", " Sim. "]), own=own)
    assert learnt(texts, tmp_path / "tokenizer") == [f" De ferro. {EOS} Sim. {EOS}"]


def test_system_text_without_a_place_is_refused() -> None:
    with pytest.raises(InputError, match="1 conversations have a system text, and the chat template has no place for one"):
        render(LONG, SHORT, own=MISTRAL)


def test_row_that_the_template_renders_otherwise_is_refused() -> None:
    own = OWN.replace("message['content']", "message['content'].split('</think>')[-1]")
    assert render(SHORT, own=own).train.rows == 1
    with pytest.raises(InputError, match="row u: the model's chat template renders it otherwise than its parts"):
        render(SHORT, Conversation("u", "", ["Hi"], ["<think>So</think>Ho"]), own=own)


def test_control_token_in_a_conversation_is_refused_by_name(tmp_path: Path) -> None:
    texts = render(Conversation("u", "", ["Hi"], [f"Ho {EOS} there"]))
    with pytest.raises(InputError, match="product u: special token in its text"):
        encode(texts, tmp_path / "tokenizer")


def test_split_leaks_no_conversation_however_it_is_spaced() -> None:
    rows = [Conversation(f"u{row}", "", [f"Panela {row % 10}?" + " " * (row // 10)], ["De ferro."]) for row in range(30)]
    split = sample.fn(Products(data=published(*rows)), SampleConfig(rows=20, eval_rows=2))
    asked = [
        {" ".join(row["prompts"][0].split()) for row in rows_of(part, "products")} for part in (split.train, split.evaluation)
    ]
    assert not asked[0] & asked[1]
    assert len(asked[1]) == 2
