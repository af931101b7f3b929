r"""A model's own chat template, in Jinja, as the parts of a conversation.

    preamble         <|im_start|>system\nYou are helpful.<|im_end|>\n     and the same with the conversation's system text
    before_prompt    <|im_start|>user\n
    before_answer    <|im_end|>\n<|im_start|>assistant\n                  what a server puts before the answer, no less, no more
    after_answer     <|im_end|>\n                                         begins with what ends the model's answers

An answer ends with the tokenizer's EOS, or with another token that stops the model (Gemma's <end_of_turn>). White space between
what a server asks with and the answer is learnt as the answer's (Llama 2's "[/INST] "). EOS behind the last answer alone is left
out, for nobody reads so far (Phi 3).

The parts are found by rendering conversations of known words, and checked on conversations of one to three turns. A template that
treats turns otherwise (one that drops the thoughts of earlier answers, say) has no such parts: which of its text is the answer's
can't be told, and it is refused. Source of the rendering: transformers 5.17, utils/chat_template_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tasks.refs import ConfigError, Special

SAID, ASKED, TOLD = "answerzq{}", "promptzq{}", "systemzq"
"""Words that no template holds."""
TODAY = "26 Jul 2024"
"""Stands for the day that a template may ask for, so that a text is the same tomorrow; the default of Llama 3.1's template."""
FROZEN = "{%- macro strftime_now(format) -%}" + TODAY + "{%- endmacro -%}"
PINNED = '{{%- set eos_token = "{}" -%}}'
"""The saved tokenizer's EOS is what ends an answer; the template goes on to write the model's."""
SYSTEM = "{SYSTEM}"


class Roles(NamedTuple):
    """Whose text the template strips of white space at both ends."""

    system: bool
    prompt: bool
    answer: bool


@dataclass(frozen=True)
class ModelTemplate:
    """The literal text around a conversation's parts, and the Jinja that it was found in."""

    jinja: str
    bos: str | None
    eos: str
    """The token that ends an answer."""
    preamble: str
    with_system: str | None
    """With {SYSTEM} in the place of the system text; None where the template takes none."""
    before_prompt: str
    before_answer: str
    lead: str
    """White space that each answer begins with."""
    after_answer: str
    closing: str
    """Behind the last answer's; no text of ours has it."""
    stripped: Roles


class Renderer:
    """Renders messages as transformers does."""

    def __init__(self, jinja: str, special: Special) -> None:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import _compile_jinja_template  # pyright: ignore[reportPrivateUsage]

        try:
            self._compiled: Any = _compile_jinja_template(jinja)
        except TemplateError as error:
            raise refusal(f"it is no Jinja: {error}") from error
        self._special = special

    def __call__(self, messages: Sequence[dict[str, str]], *, asks: bool = False) -> str:
        """The text of messages; `asks` ends it where an answer begins.

        Raises:
            ConfigError: with the template's own words when it refuses them.
        """
        from jinja2 import TemplateError

        try:
            tokens = {"bos_token": self._special.bos or "", "eos_token": self._special.eos}
            return str(self._compiled.render(messages=messages, tools=None, add_generation_prompt=asks, **tokens))
        except TemplateError as error:
            raise refusal(f"it does not render {', '.join(one['role'] for one in messages)}: {error}") from error


def messages_of(system: str, prompts: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    """A conversation as messages; one prompt more than answers for a question that waits.

    >>> [one["role"] for one in messages_of("Be brief.", ["Hi", "And?"], ["Ho"])]
    ['system', 'user', 'assistant', 'user']
    """
    turns = [{"role": "system", "content": system}] if system else []
    for turn, prompt in enumerate(prompts):
        turns.append({"role": "user", "content": prompt})
        turns += [{"role": "assistant", "content": answer} for answer in answers[turn : turn + 1]]
    return turns


def parse_model_template(jinja: str, special: Special) -> ModelTemplate:
    """The parts of a model's chat template.

    Raises:
        ConfigError: when which of its text is learnt can't be told, or its answers don't end with the tokenizer's EOS.
    """
    if "strftime_now" in jinja:
        jinja = FROZEN + jinja
    render = Renderer(jinja, special)
    first, between, tail = _cut(render(_probe(1)), ASKED.format(0), SAID.format(0))
    eos = next((token for token in (special.eos, *special.stops) if tail.lstrip().startswith(token)), None)
    if eos is None:
        raise refusal(
            f"an answer is followed by {tail!r}, not by the tokenizer's EOS {' or '.join((special.eos, *special.stops))}"
        )
    closing = special.eos if eos != special.eos and tail.endswith(special.eos) else ""
    after = tail.removesuffix(closing)
    _, _, middle, _, _ = _cut(render(_probe(2)), *(word.format(turn) for turn in (0, 1) for word in (ASKED, SAID)))
    before = middle.removeprefix(after)
    if not middle.startswith(after) or not first.endswith(before):
        raise refusal(
            f"the text between two turns is {middle!r}, which is not that after an answer ({after!r}) and before a prompt"
        )
    opening, lead = first.removesuffix(before), _lead(render, between)
    bos = special.bos if special.bos and opening.startswith(special.bos) else None
    parts = ModelTemplate(
        jinja=PINNED.format(special.eos) + jinja if eos != special.eos and "eos_token" in jinja else jinja,
        bos=bos,
        eos=eos,
        preamble=opening.removeprefix(bos or ""),
        with_system=_with_system(render, before, bos),
        before_prompt=before,
        before_answer=between.removesuffix(lead),
        lead=lead,
        after_answer=after,
        closing=closing,
        stripped=_stripped(render),
    )
    _check(parts, render)
    return parts


def _lead(render: Renderer, between: str) -> str:
    """The white space by which a text goes on where a server would ask."""
    _, asked = _cut(render(_probe(1)[:1], asks=True), ASKED.format(0))
    rest = between.removeprefix(asked)
    return rest if between.startswith(asked) and not rest.strip() else ""


def _probe(turns: int, system: str = "") -> list[dict[str, str]]:
    words = ([word.format(turn) for turn in range(turns)] for word in (ASKED, SAID))
    return messages_of(system, *words)


def _cut(text: str, *words: str) -> list[str]:
    """The text before, between and behind the words, each of which it must hold once, in this order."""
    pieces = re.split("|".join(map(re.escape, words)), text)
    if re.findall("|".join(map(re.escape, words)), text) != list(words):
        raise refusal(f"it does not hold each message once, in order: {text!r}")
    return pieces


def _with_system(render: Renderer, before: str, bos: str | None) -> str | None:
    try:
        text = render(_probe(1, TOLD))
    except ConfigError:
        return None
    head, told, rest = text.partition(TOLD)
    opening, asked, _ = rest.partition(ASKED.format(0))
    if not told or not asked or not opening.endswith(before):
        return None
    return head.removeprefix(bos or "") + SYSTEM + opening.removesuffix(before)


def _stripped(render: Renderer) -> Roles:
    def padded(role: str) -> bool:
        probe = [dict(one, content=f" \n{one['content']}\n ") if one["role"] == role else one for one in _probe(1, TOLD)]
        probe = probe if role == "system" else probe[1:]
        (content,) = (one["content"] for one in probe if one["role"] == role)
        return content not in render(probe)

    try:
        system = padded("system")
    except ConfigError:
        system = False
    return Roles(system, padded("user"), padded("assistant"))


def _check(parts: ModelTemplate, render: Renderer) -> None:
    """Refuse a template whose parts don't make the texts that it makes."""
    for turns in (1, 2, 3):
        for system in ("", TOLD) if parts.with_system else ("",):
            probe = _probe(turns, system)
            if (text := render(probe)) != render_parts(parts, probe) + parts.closing:
                raise refusal(f"turns are not rendered alike in {text!r}")
    asked = render(_probe(1)[:1], asks=True)
    if not render(_probe(1)).startswith(asked) or not asked.endswith(parts.before_answer):
        raise refusal(f"a server would ask with {asked!r}, which is not how a text to learn from begins")


def render_parts(parts: ModelTemplate, messages: Sequence[dict[str, str]]) -> str:
    """The text of messages by the parts alone, up to what ends the last answer."""
    has_system = messages[0]["role"] == "system"
    head = (parts.with_system or "").replace(SYSTEM, messages[0]["content"], 1) if has_system else parts.preamble
    around = {"user": (parts.before_prompt, parts.before_answer), "assistant": (parts.lead, parts.after_answer)}
    spoken = messages[1:] if has_system else messages
    return (parts.bos or "") + head + "".join(one["content"].join(around[one["role"]]) for one in spoken)


def refusal(what: str) -> ConfigError:
    """The error of a template whose parts can't be found."""
    return ConfigError(
        f"template.source=model: what is to be learnt can't be found in the model's chat template: {what}; expected turns that "
        "are rendered alike, each answer ended by a token that stops the model. Use template.source=document, or another model."
    )
