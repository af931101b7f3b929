"""The template language means what Unsloth makes of it, and its Jinja renders what the pipeline renders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tasks.config import CHAT_TEMPLATE
from tasks.refs import ConfigError, Special
from tasks.text.chat_template import ChatTemplate, parse_template, to_jinja

LLAMA = Special(bos="<|begin_of_text|>", eos="<|end_of_text|>")
NO_BOS = Special(bos=None, eos="</s>")
TEXTS = ["text_llama3_bos_ct_as_given_ext1", "text_llama3_bos_ct_as_given_ext3", "text_llama2_bos_ct_question_removed_ext3",
         "text_nobos_ct_as_given_ext1"]  # fmt: skip


def render_jinja(chat_template: str, messages: list[dict[str, str]], **variables: Any) -> str:
    """As transformers renders a chat template."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(chat_template).render(messages=messages, **variables)


@pytest.mark.parametrize("name", TEXTS)
def test_parts_and_jinja_equal_unsloths(shared: Path, name: str) -> None:
    theirs = json.loads((shared / "golden" / f"{name}.json").read_text(encoding="utf-8"))
    inputs = json.loads((shared / "golden" / "inputs.json").read_text(encoding="utf-8"))
    special = Special(bos=theirs["tokenizer"]["bos"], eos=theirs["tokenizer"]["eos"])
    parts = parse_template(inputs["CT_question_removed" if "question_removed" in name else "CT"], special)
    assert [parts.before_prompt, parts.between] == [theirs["input_part"], theirs["output_part"]]
    assert to_jinja(parts, special, system=None, question=None) == theirs["jinja"]


def test_the_documents_template_has_its_preamble_once_and_eos_after_the_answer() -> None:
    assert parse_template(CHAT_TEMPLATE, LLAMA) == ChatTemplate(
        preamble="Responda à pergunta sobre o produto com base no título e na descrição fornecidos.",
        before_prompt="\n\n### Título do produto:\n",
        after_prompt="",
        before_answer="\n\n### Pergunta:\n{question}\n\n### Resposta (baseada na descrição):\n",
        after_answer="<|end_of_text|>",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Be kind. Q: {INPUT} A: {OUTPUT} Q: {INPUT} A: {OUTPUT}", ChatTemplate("Be kind.", " Q: ", " ", "A: ", "</s>")),
        ("{INPUT} => {OUTPUT}\n{INPUT} => {OUTPUT}\n", ChatTemplate("", "", " ", "=> ", "\n</s>")),
        ("Hi\n# Q {INPUT}</s>\n# A {OUTPUT}</s>", ChatTemplate("Hi", "\n# Q ", "</s>", "\n# A ", "</s>")),
        ("{SYSTEM}\n\n# Q\n{INPUT}\n\n# A\n{OUTPUT}", ChatTemplate("{SYSTEM}", "\n\n# Q\n", "", "\n\n# A\n", "</s>")),
    ],
)
def test_other_templates_fall_into_their_parts(text: str, expected: ChatTemplate) -> None:
    assert parse_template(text, NO_BOS) == expected


def test_a_bos_that_the_template_begins_with_is_not_doubled() -> None:
    assert parse_template(LLAMA.bos + CHAT_TEMPLATE, LLAMA) == parse_template(CHAT_TEMPLATE, LLAMA)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "# Q {INPUT} {title}\n# A {OUTPUT}",
            "unknown placeholder: got {title}; expected only {INPUT}, {OUTPUT}, {SYSTEM}, {question}. Remove or rename it.",
        ),
        ("# Q {INPUT}", "missing placeholder: got '# Q {INPUT}'; expected {OUTPUT} in it. Add it."),
        (
            "{INPUT} => {OUTPUT}",
            "got '{INPUT} => {OUTPUT}'; expected {INPUT} before {OUTPUT}, both under a heading of the same form, or the same "
            "turn twice. Write the turn twice, so that it can be seen where it begins.",
        ),
        (
            "a {OUTPUT} b {INPUT}",
            "got 'a {OUTPUT} b {INPUT}'; expected {INPUT} before {OUTPUT}, both under a heading of the same form, or the same "
            "turn twice. Write the turn twice, so that it can be seen where it begins.",
        ),
        (
            "Hi\n# Q {INPUT} {SYSTEM}\n# A {OUTPUT}",
            "misplaced placeholder: got {SYSTEM} in a turn or twice; expected it once, before the first turn. Move it.",
        ),
        (
            "{question}\n# Q {INPUT}\n# A {OUTPUT}",
            "misplaced placeholder: got {question} in the text that comes once per conversation ('{question}'); "
            "expected it in the turn. Move it between {INPUT} and {OUTPUT}, or write the turn twice.",
        ),
        (
            "Hi\n# Q <|begin_of_text|>{INPUT}\n# A {OUTPUT}",
            "BOS: got <|begin_of_text|> inside the template; expected it at its start or not at all. Remove it.",
        ),
    ],
)
def test_a_wrong_template_is_refused_with_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_template(text, LLAMA)
    assert str(caught.value) == f"template.chat_template: {message}"


def test_jinja_takes_the_messages_question_then_the_variable_then_the_first_of_the_list() -> None:
    jinja = to_jinja(
        parse_template("Hi\n# T {INPUT}\n# Q {question} A {OUTPUT}", NO_BOS), NO_BOS, system=None, question="Default?"
    )
    ask, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    asked = {**ask, "question": "Own?"}
    assert render_jinja(jinja, [asked, answer, ask, answer], question="Given?") == (
        "Hi\n# T x\n# Q Own? A y</s>\n# T x\n# Q Given? A y</s>"
    )
    assert render_jinja(jinja, [ask], add_generation_prompt=True) == "Hi\n# T x\n# Q Default? A "


def test_jinja_takes_a_system_message_or_the_recipes_own() -> None:
    jinja = to_jinja(parse_template("[{SYSTEM}]\n# Q {INPUT}\n# A {OUTPUT}", NO_BOS), NO_BOS, system="Be kind.", question=None)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert render_jinja(jinja, messages) == "[Be kind.]\n# Q x\n# A y</s>"
    assert render_jinja(jinja, [{"role": "system", "content": "Be brief."}, *messages]) == "[Be brief.]\n# Q x\n# A y</s>"


literals = st.text(st.characters(exclude_characters="{}", exclude_categories=["Cs"]), max_size=12)


@given(preamble=literals, before=literals, between=literals, prompt=st.text(), answer=st.text())
def test_jinja_keeps_every_literal_and_every_message(preamble: str, before: str, between: str, prompt: str, answer: str) -> None:
    jinja = to_jinja(ChatTemplate(preamble, before, "", between, "</s>"), LLAMA, system=None, question=None)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    rendered = render_jinja(jinja, messages, bos_token=LLAMA.bos)
    assert rendered == f"{LLAMA.bos}{preamble}{before}{prompt}{between}{answer}</s>"
