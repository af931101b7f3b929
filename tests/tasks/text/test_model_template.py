"""A model's own chat template comes apart into the texts around a conversation's parts, or is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.refs import ConfigError, Special
from tasks.text.model_template import Renderer, Roles, messages_of, parse_model_template, render_parts
from tests.support.chat_templates import CHATML, GEMMA, LLAMA2, LLAMA3, LLAMA31, MISTRAL, MISTRAL3, PHI3, THINKING

IM_END = Special(bos=None, eos="<|im_end|>")
EOT = Special(bos="<|begin_of_text|>", eos="<|eot_id|>")
S = Special(bos="<s>", eos="</s>")
TURN = Special(bos="<bos>", eos="<eos>", stops=("<end_of_turn>",))
END = Special(bos="<s>", eos="<|endoftext|>", stops=("<|assistant|>", "<|end|>"))
KNOWN = {
    "chatml": (CHATML, IM_END),
    "llama3": (LLAMA3, EOT),
    "llama31": (LLAMA31, EOT),
    "mistral": (MISTRAL, S),
    "mistral3": (MISTRAL3, S),
    "llama2": (LLAMA2, S),
    "gemma": (GEMMA, TURN),
    "phi3": (PHI3, END),
}
WRITTEN = {
    "chatml": (
        "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "[Ho<|im_end|>]\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n[No<|im_end|>]\n"
    ),
    "mistral": "<s>[INST] Hi [/INST][Ho</s>][INST] And? [/INST][No</s>]",
    "mistral3": "<s>[INST] Hi[/INST][ Ho</s>][INST] And?[/INST][ No</s>]",
    "llama2": "<s>[INST] Hi [/INST][ Ho </s>]<s>[INST] And? [/INST][ No </s>]",
    "gemma": (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n[Ho<end_of_turn>]\n"
        "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n[No<end_of_turn>]\n"
    ),
    "phi3": "<|user|>\nHi<|end|>\n<|assistant|>\n[Ho<|end|>]\n<|user|>\nAnd?<|end|>\n<|assistant|>\n[No<|end|>]\n",
}
"""Two turns as each model's documentation writes them, with what is learnt in brackets."""
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() == text
)


@pytest.mark.parametrize("name", KNOWN)
@given(system=st.just("") | WORDS, turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_parts_make_the_text_that_the_template_makes(name: str, system: str, turns: list[tuple[str, str]]) -> None:
    jinja, special = KNOWN[name]
    parts = parse_model_template(jinja, special)
    messages = messages_of(system if parts.with_system else "", *map(list, zip(*turns, strict=True)))
    assert render_parts(parts, messages) + parts.closing == Renderer(parts.jinja, special)(messages)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_learnt_is_the_answer_and_what_ends_it(name: str) -> None:
    parts = parse_model_template(*KNOWN[name])
    head = (parts.bos or "") + parts.preamble
    ends = parts.after_answer.partition(parts.eos)
    turns = [
        f"{parts.before_prompt}{asked}{parts.before_answer}[{parts.lead}{said}{ends[0]}{ends[1]}]{ends[2]}"
        for asked, said in (("Hi", "Ho"), ("And?", "No"))
    ]
    assert head + "".join(turns) == WRITTEN[name]


def test_saved_template_writes_the_models_eos_where_another_token_ends_answers() -> None:
    parts = parse_model_template(PHI3, END)
    assert (parts.eos, parts.closing) == ("<|end|>", "<|endoftext|>")
    saved = Special(bos=END.bos, eos=parts.eos)
    assert Renderer(parts.jinja, saved)(messages_of("", ["Hi"], ["Ho"])) == Renderer(PHI3, END)(messages_of("", ["Hi"], ["Ho"]))


def test_parts_of_a_known_template() -> None:
    parts = parse_model_template(CHATML, IM_END)
    assert parts.preamble == "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"
    assert parts.with_system == "<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    assert (parts.before_prompt, parts.before_answer, parts.after_answer, parts.bos) == (
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
        None,
    )


def test_system_text_is_taken_where_the_template_has_a_place_for_it() -> None:
    assert parse_model_template(LLAMA3, EOT).with_system == "<|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"
    assert parse_model_template(MISTRAL, S).with_system is None


def test_white_space_is_stripped_where_the_template_does_so() -> None:
    assert parse_model_template(CHATML, IM_END).stripped == Roles(False, False, False)
    assert parse_model_template(LLAMA3, EOT).stripped == Roles(True, True, True)


def test_day_is_the_same_every_day() -> None:
    parts = parse_model_template(LLAMA31, EOT)
    assert "Today Date: 26 Jul 2024\n\n<|eot_id|>" in parts.preamble
    assert "26 Jul 2024" in Renderer(parts.jinja, EOT)(messages_of("", ["Hi"], []))


@pytest.mark.parametrize(
    ("jinja", "special", "reason"),
    [
        (THINKING, IM_END, "turns"),
        (
            CHATML.replace("{% endfor %}", "{% if loop.index0 == 5 %}{{ 'The end.' }}{% endif %}{% endfor %}"),
            IM_END,
            "not rendered alike",
        ),
        (GEMMA, Special(bos="<bos>", eos="<eos>"), "not by the tokenizer's EOS <eos>"),
        (PHI3, Special(bos=None, eos="<|endoftext|>"), "not by the tokenizer's EOS <|endoftext|>"),
        (CHATML.replace("assistant\n' }}", "assistant\n<think>' }}"), IM_END, "a server would ask with '<|im_start|>system"),
        ("{{ messages[0]['content'] }}", S, "does not hold each message once"),
        ("{{ messages[0]['content'] | upper }}", S, "does not hold each message once"),
        ("{% if %}", S, "it is no Jinja"),
    ],
)
def test_template_whose_mask_is_not_to_be_found_is_refused(jinja: str, special: Special, reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_model_template(jinja, special)
    assert str(refused.value).startswith(
        "template.source=model: what is to be learnt can't be found in the model's chat template: "
    )
    assert reason in str(refused.value)
