"""Tokens are those of the whole texts, answers alone are learnt, and what was changed is told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from tasks.config import SharegptConfig, TemplateConfig, TokenizeConfig
from tasks.refs import Artifact, InputError, Special, Texts, Tokenizer
from tasks.sharegpt import sharegpt
from tasks.template import template
from tasks.text.encoding import load_tokenizer_json
from tasks.tokenize import IGNORED, tokenize
from tests.support.prepared import AS_WRITTEN, GOLDEN, SPECIAL, encode, golden_products, lines, render, rows_of, split_products
from tests.support.tiny import BOS, EOS
from tests.tasks.text.test_turn_encoding import MERGING, merging_tokenizer, sentencepiece_like

BOS_ID, EOS_ID = 0, 1
PRODUCTS = [(f"Chaleira {number}", f"Feita de aço, {number} litros." * (number % 4 + 1)) for number in range(20)]
DOCUMENT = {"loss_on": "everything", "on_overlength": "cut", "special_tokens_in_products": "control", "max_affected_share": 1.0}


def learnt_answers(backend: Backend, row: dict[str, Any]) -> str:
    return backend.decode([number for number in row["labels"] if number != IGNORED], skip_special_tokens=False)


def answers_of(texts: Artifact, row: dict[str, Any]) -> str:
    turns = {turn["uid"]: turn for turn in rows_of(texts, "turns")}
    return "".join(turns[uid]["answer"] + EOS for uid in row["uids"])


@pytest.mark.parametrize(("name", "of_template", "of_tokens"), [("default", {}, {}), ("as_written", AS_WRITTEN, DOCUMENT)])
def test_tokens_equal_their_golden_file(
    golden: Callable[[str, str], None], name: str, of_template: dict[str, Any], of_tokens: dict[str, Any]
) -> None:
    golden(f"tokens_{name}.json", lines(rows_of(encode(render(golden_products(), 3, **of_template), GOLDEN, **of_tokens).train)))


@pytest.mark.parametrize("turns", [1, 3])
def test_the_stage_gives_the_whole_texts_ids_and_learns_the_answers(tmp_path: Path, turns: int) -> None:
    texts = render(PRODUCTS, turns)
    made = encode(texts, tmp_path / "tiny")
    backend = load_tokenizer_json(tmp_path / "tiny")
    for text, row in zip(rows_of(texts.train), rows_of(made.train), strict=True):
        assert row["uids"] == text["uids"]
        assert row["input_ids"] == backend.encode(text["text"], add_special_tokens=False).ids
        assert (row["input_ids"][0], row["input_ids"].count(BOS_ID)) == (BOS_ID, 1)
        assert row["input_ids"].count(EOS_ID) == turns
        assert all(label in (IGNORED, number) for number, label in zip(row["input_ids"], row["labels"], strict=True))
        assert learnt_answers(backend, row) == answers_of(texts.train, row)


def test_the_stage_counts_what_it_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = render(PRODUCTS, 2)
    with caplog.at_level(logging.INFO, "tasks.tokenize"):
        made = encode(texts, tmp_path / "tiny")
    rows = rows_of(made.train)
    tokens = sum(len(row["input_ids"]) for row in rows)
    learnt = sum(label != IGNORED for row in rows for label in row["labels"])
    assert made.counts == {
        "rows": 20, "kept": 20, "tokens": tokens, "learnt": learnt, "longest": max(len(row["input_ids"]) for row in rows),
        "overlong": 0, "unlearnable": 0, "stray_bos": 0, "evaluation": 1,
    }  # fmt: skip
    assert caplog.messages[-1] == f"tokenize: 20 rows, {tokens:,} tokens, {learnt:,} of them learnt"


def test_the_stage_gives_the_same_bytes_again(tmp_path: Path) -> None:
    texts = render(PRODUCTS, 2)
    made = encode(texts, tmp_path / "tiny")
    inputs = {
        "texts": texts,
        "tokenizer": Tokenizer(path=str(tmp_path / "tiny"), digest="tiny", special=SPECIAL),
        "config": TokenizeConfig(),
    }
    assert tokenize.execute(inputs) == made
    assert sorted(path.name for path in made.train.path.iterdir()) == ["manifest.json", "tokens.arrow"]


def test_loss_on_everything_labels_every_token(tmp_path: Path) -> None:
    for row in rows_of(encode(render(PRODUCTS, 2), tmp_path / "tiny", loss_on="everything").train):
        assert row["labels"] == row["input_ids"]


def test_a_tokenizer_without_bos_gives_rows_without_it(tmp_path: Path) -> None:
    made = encode(render(PRODUCTS, 2, special=Special(bos=None, eos=EOS)), tmp_path / "tiny")
    assert all(BOS_ID not in row["input_ids"] for row in rows_of(made.train))


@pytest.mark.parametrize(("policy", "kept", "last"), [("drop", 19, EOS_ID), ("truncate", 20, EOS_ID), ("cut", 20, None)])
def test_overlong_rows_follow_the_policy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, policy: str, kept: int, last: int | None
) -> None:
    texts = render([*PRODUCTS[:19], ("Chaleira", "de aço, 2 litros " * 200)])
    with caplog.at_level(logging.WARNING, "tasks.text.overlength"):
        made = encode(texts, tmp_path / "tiny", on_overlength=policy, max_tokens=300)
    rows = rows_of(made.train)
    assert (made.train.rows, len(rows), made.counts["overlong"]) == (kept, kept, 1)
    assert max(len(row["input_ids"]) for row in rows) <= 300
    if policy != "drop":
        assert rows[-1]["uids"] == ["u19"]
        assert len(rows[-1]["input_ids"]) == 300
        assert (rows[-1]["input_ids"][-1] == EOS_ID) == (last == EOS_ID)
    longest = int(made.counts["longest"])
    assert caplog.messages == [
        "tokenize training rows: 1 of 20 rows are longer than 300 tokens "
        f"(the longest has {longest:,}; {policy}), 0 have no label"
    ]


def test_an_overlong_row_stops_the_run_when_it_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^products u1: too long: got \d+ tokens; expected at most 300 "):
        encode(render([PRODUCTS[0], ("T", "x " * 2000)]), tmp_path / "tiny", on_overlength="error", max_tokens=300)


def test_too_many_overlong_rows_stop_the_run_and_leave_nothing(tmp_path: Path, home: Path) -> None:
    texts = render([*PRODUCTS[:8], *[("T", "x " * 2000)] * 2])
    with pytest.raises(InputError, match=r"^tokenize training rows: too many rows affected: got 2 of 10 rows"):
        encode(texts, tmp_path / "tiny", max_tokens=300)
    assert not (home / "artifacts" / "tokens").exists()
    assert not list((home / "drafts").glob("tokens-*"))


def test_special_tokens_in_products_stay_text_by_default_and_become_tokens_as_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = render([(f"A {EOS} in a title", f"{BOS} and {EOS} in a text"), ("Tutu", "Blue")])
    made = encode(texts, tmp_path / "tiny")
    backend = load_tokenizer_json(tmp_path / "tiny")
    row = rows_of(made.train)[0]
    assert (row["input_ids"].count(BOS_ID), row["input_ids"].count(EOS_ID)) == (1, 1)
    assert backend.decode(row["input_ids"], skip_special_tokens=False) == rows_of(texts.train)[0]["text"]
    assert learnt_answers(backend, row) == answers_of(texts.train, row)
    assert not caplog.messages
    control = encode(texts, tmp_path / "tiny", special_tokens_in_products="control")
    assert caplog.messages == [
        "tokenize training rows: 1 BOS inside products' texts; "
        "set tokenize.special_tokens_in_products=text to keep them characters"
    ]
    ids = rows_of(control.train)[0]["input_ids"]
    assert (ids.count(BOS_ID), ids.count(EOS_ID), control.counts["stray_bos"]) == (2, 3, 1)


def test_a_template_that_merges_with_the_answer_learns_the_whole_answer(tmp_path: Path) -> None:
    backend = merging_tokenizer()
    backend.save(str(tmp_path / "tokenizer.json"))
    texts = render([("Caneca", "azul claro"), ("Prato", "preto")], chat_template=MERGING)
    rows = rows_of(encode(texts, tmp_path).train)
    assert [learnt_answers(backend, row) for row in rows] == [f" corazul claro{EOS}", f"preto{EOS}"]


def test_turns_that_do_not_stand_alone_are_encoded_as_whole_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = sentencepiece_like(metaspace=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    texts = render(PRODUCTS, 2)
    made = encode(texts, tmp_path)
    assert caplog.messages[-1].startswith("tokenize: turns can't be encoded on their own with this tokenizer and template")
    for text, row in zip(rows_of(texts.train), rows_of(made.train), strict=True):
        assert row["input_ids"] == backend.encode(text["text"], add_special_tokens=False).ids
        assert learnt_answers(backend, row).endswith(answers_of(texts.train, row)[-20:])
    with pytest.raises(InputError, match=r"^product u0: special token in its text"):
        encode(render([(EOS, "x"), ("y", "z")], 2), tmp_path)


def test_an_eos_that_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    texts: Texts = render(PRODUCTS, special=Special(bos=None, eos="</s>"))
    with pytest.raises(InputError, match=r"^tokenizer\.json: special token: got none for '</s>'"):
        encode(texts, tmp_path / "tiny")


def test_no_evaluation_rows_make_an_empty_file(tmp_path: Path) -> None:
    conversations = sharegpt.fn(split_products(PRODUCTS, evaluation=[]), SharegptConfig())
    made = encode(template.fn(conversations, SPECIAL, TemplateConfig()), tmp_path / "tiny")
    assert (made.evaluation.rows, rows_of(made.evaluation)) == (0, [])
