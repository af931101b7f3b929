"""Texts equal Unsloth's to the byte, and a server renders the same text from the saved chat template."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import RecordBatch

from tasks.config import QUESTIONS, TemplateConfig
from tasks.refs import ConfigError, Special
from tasks.template import describe_template, draw_questions, join_turns, render_turns, template
from tasks.text.chat_template import parse_template
from tests.support.prepared import AS_WRITTEN, SPECIAL, converse, golden_products, lines, render, rows_of
from tests.tasks.text.test_chat_template import TEXTS, render_jinja

SHORT = "Answer.\n\n# T:\n{INPUT}\n\n# Q:\n{question}\n\n# A:\n{OUTPUT}"


@pytest.mark.parametrize(("name", "changes"), [("as_written", AS_WRITTEN), ("default", {})])
def test_texts_equal_their_golden_file(golden: Callable[[str, str], None], name: str, changes: dict[str, bool]) -> None:
    made = render(golden_products(), 3, **changes)
    golden(f"text_{name}.json", lines(rows_of(made.train)))
    golden(f"template_{name}.json", (made.template / "template.json").read_text(encoding="utf-8") + "\n")


@pytest.mark.parametrize("name", TEXTS)
def test_texts_equal_unsloths(shared: Path, name: str) -> None:
    theirs = json.loads((shared / "golden" / f"{name}.json").read_text(encoding="utf-8"))
    inputs = json.loads((shared / "golden" / "inputs.json").read_text(encoding="utf-8"))
    made = render(
        [(row["title"], row["content"]) for row in inputs["rows"]],
        int(name[-1]),
        Special(bos=theirs["tokenizer"]["bos"], eos=theirs["tokenizer"]["eos"]),
        chat_template=inputs["CT_question_removed" if "question_removed" in name else "CT"],
        **AS_WRITTEN,
    )
    assert [row["text"] for row in rows_of(made.train)] == theirs["text"]
    assert json.loads((made.template / "template.json").read_text(encoding="utf-8"))["chat_template"] == theirs["jinja"]


def test_only_as_written_leaves_the_question_open() -> None:
    assert "{question}" in rows_of(render([("Tutu", "Blue")], **AS_WRITTEN).train)[0]["text"]
    texts = [row["text"] for row in rows_of(render([(f"T{number}", "Blue") for number in range(40)]).train)]
    assert not any("{question}" in text for text in texts)
    assert {question for text in texts for question in QUESTIONS if question in text} == set(QUESTIONS)


def test_the_saved_chat_template_renders_each_training_text() -> None:
    made = render(golden_products(), 3)
    turns = rows_of(made.train, "turns")
    described = json.loads((made.template / "template.json").read_text(encoding="utf-8"))
    for row in rows_of(made.train):
        messages = [
            message
            for turn in (turns[product] for product in row["products"])
            for message in (
                {"role": "user", "content": turn["prompt"], "question": turn["question"]},
                {"role": "assistant", "content": turn["answer"]},
            )
        ]
        assert render_jinja(described["chat_template"], messages, bos_token=SPECIAL.bos) == row["text"]


def test_the_stage_shows_the_first_two_rows_as_the_document_does(caplog: pytest.LogCaptureFixture) -> None:
    inputs = {
        "conversations": converse([("A", "B"), ("C", "D"), ("E", "F")]),
        "special": Special(bos="<s>", eos="</s>"),
        "config": TemplateConfig(chat_template=SHORT, questions=("What?",)),
    }
    with caplog.at_level(logging.INFO, "tasks.template"):
        made = template.execute(inputs)
    first = "<s>Answer.\n\n# T:\nTítulo do produto: A\n\n# Q:\nWhat?\n\n# A:\nB</s>"
    assert made.preview == (first, first.replace(": A", ": C").replace("\nB<", "\nD<"))
    assert caplog.messages == [
        "template: 3 texts, 1 to evaluate on",
        f"training row 0:\n{made.preview[0]}",
        f"training row 1:\n{made.preview[1]}",
    ]
    assert template.execute(inputs) == made


def test_a_system_message_is_filled_in_or_asked_for() -> None:
    described = "{SYSTEM}\n\n# T:\n{INPUT}\n\n# A:\n{OUTPUT}"
    (row,) = rows_of(render([("A", "B")], chat_template=described, system="Be kind.").train)
    assert row["text"].startswith("<|begin_of_text|>Be kind.\n\n# T:\n")
    with pytest.raises(ConfigError) as caught:
        render([("A", "B")], chat_template=described)
    assert str(caught.value) == (
        "template.system: got null; expected a text for {SYSTEM} in template.chat_template. Set it, or remove {SYSTEM}."
    )


def test_a_products_question_does_not_depend_on_how_many_follow() -> None:
    assert draw_questions(1000, QUESTIONS, 7)[:10].tolist() == draw_questions(10, QUESTIONS, 7).tolist()


texts = st.lists(st.tuples(st.text(), st.text(), st.text()), min_size=2, max_size=6).filter(lambda rows: len(rows) % 2 == 0)


@given(texts)
def test_any_text_survives_and_none_is_interpreted(rows: list[tuple[str, str, str]]) -> None:
    special, config = Special(bos="<s>", eos="</s>"), TemplateConfig(chat_template=SHORT)
    described = describe_template(parse_template(SHORT, special), special, config)
    columns = dict(zip(("prompt", "question", "answer"), map(list, zip(*rows, strict=True)), strict=True))
    turns = [f"\n\n# T:\n{prompt}\n\n# Q:\n{question}\n\n# A:\n{answer}</s>" for prompt, question, answer in rows]
    joined = join_turns(render_turns(RecordBatch.from_pydict(columns), described), 2, described)
    assert joined.to_pylist() == ["<s>Answer." + "".join(turns[start : start + 2]) for start in range(0, len(turns), 2)]
