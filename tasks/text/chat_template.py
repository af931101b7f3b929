r"""The document's template language: what it means, as the parts of a turn and as a Jinja chat template.

    preamble         Answer the question.           once per conversation; {SYSTEM} may stand here
    before_prompt    \n\n### Title:\n               then the prompt, in the place of {INPUT}
    before_answer    \n\n### Answer:\n              then the answer, in the place of {OUTPUT}
    after_answer     <EOS>                          added where the template doesn't have it

A template holds one example of a turn, or the same example twice, which leaves no doubt where a turn begins.

Source: unsloth 2026.10.9, `chat_templates.construct_chat_template`, whose parts and Jinja these equal to the byte;
{question} is ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from tasks.refs import ConfigError, Special

INPUT, OUTPUT, SYSTEM, QUESTION = "{INPUT}", "{OUTPUT}", "{SYSTEM}", "{question}"
PLACEHOLDER = re.compile(r"\{\w+\}")
USER_ONLY = "{{ raise_exception('Only user and assistant roles are supported!') }}"


@dataclass(frozen=True)
class ChatTemplate:
    """The literal text around prompt and answer; `after_prompt` is what the user's message keeps of the text between."""

    preamble: str
    before_prompt: str
    after_prompt: str
    before_answer: str
    after_answer: str

    @property
    def between(self) -> str:
        """All text from prompt to answer."""
        return self.after_prompt + self.before_answer


def parse_template(text: str, special: Special) -> ChatTemplate:
    r"""The parts of a chat template, with EOS after the answer and without BOS.

    >>> parse_template("Hi\n# Q:\n{INPUT}\n# A:\n{OUTPUT}", Special(bos=None, eos="</s>"))
    ChatTemplate(preamble='Hi', before_prompt='\n# Q:\n', after_prompt='', before_answer='\n# A:\n', after_answer='</s>')

    Raises:
        ConfigError: for an unknown or misplaced placeholder, or when it can't be seen where a turn begins.
    """
    _check_placeholders(text)
    stripped = text.strip()
    parts = _from_pair(text.lstrip(), special.eos) or _from_pair(stripped, special.eos) or _from_single(stripped)
    if parts is None:
        raise _error(
            f"got {text[:200]!r}; expected {INPUT} before {OUTPUT}, both under a heading of the same form, or the same "
            "turn twice. Write the turn twice, so that it can be seen where it begins"
        )
    if not parts.after_answer.startswith(special.eos):
        parts = replace(parts, after_answer=parts.after_answer + special.eos)
    if special.bos:
        parts = replace(parts, preamble=parts.preamble.removeprefix(special.bos))
    _check_parts(parts, special)
    return parts


def _check_placeholders(text: str) -> None:
    known = (INPUT, OUTPUT, SYSTEM, QUESTION)
    unknown = sorted(set(PLACEHOLDER.findall(text)) - set(known))
    if unknown:
        raise _error(f"unknown placeholder: got {', '.join(unknown)}; expected only {', '.join(known)}. Remove or rename it")
    missing = [name for name in (INPUT, OUTPUT) if name not in text]
    if missing:
        raise _error(f"missing placeholder: got {text[:200]!r}; expected {' and '.join(missing)} in it. Add it")


def _check_parts(parts: ChatTemplate, special: Special) -> None:
    turn = parts.before_prompt + parts.between + parts.after_answer
    if SYSTEM in turn or parts.preamble.count(SYSTEM) > 1:
        raise _error(f"misplaced placeholder: got {SYSTEM} in a turn or twice; expected it once, before the first turn. Move it")
    if QUESTION in parts.preamble:
        raise _error(
            f"misplaced placeholder: got {QUESTION} in the text that comes once per conversation ({parts.preamble[-80:]!r}); "
            "expected it in the turn. Move it between {INPUT} and {OUTPUT}, or write the turn twice"
        )
    if special.bos and special.bos in parts.preamble + turn:
        raise _error(f"BOS: got {special.bos} inside the template; expected it at its start or not at all. Remove it")


def _error(what: str) -> ConfigError:
    return ConfigError(f"template.chat_template: {what}.")


def _from_pair(text: str, eos: str) -> ChatTemplate | None:
    """The parts of a template that ends with the same turn twice."""
    first_output = text.find(OUTPUT)
    second_input = text.find(INPUT, first_output)
    for start in range(first_output + len(OUTPUT), second_input + 1):
        turn = text[start:]
        if text[:start].endswith(turn) and turn.count(INPUT) == turn.count(OUTPUT) == 1:
            kept = re.search(rf"\{{INPUT\}}\s*(?:{re.escape(eos)})?", turn)
            assert kept is not None
            return _parts(text[: start - len(turn)], turn[: kept.end()], turn[kept.end() :])
    return None


def _from_single(text: str) -> ChatTemplate | None:
    """The parts of a template with one turn: it begins where the heading of the answer appears before the prompt.

    What follows {OUTPUT} is expected after {INPUT} too.
    """
    ending = text[text.find(OUTPUT) + len(OUTPUT) :]
    asked = text.find(INPUT + ending)
    start = asked + len(INPUT + ending)
    answered = text.find(OUTPUT + ending, start + 1)
    if asked < 0 or answered < 0:
        return None
    reply = text[start : answered + len(OUTPUT + ending)]
    length = next((size for size in range(1, len(reply)) if not _heads(text, reply[:size], asked)), len(reply)) - 1
    if length < 1:
        return None
    begin = text.rfind(reply[:length], 0, asked)
    return _parts(text[:begin], text[begin:start], reply)


def _heads(text: str, heading: str, asked: int) -> bool:
    """Whether the heading stands before the prompt, with something between."""
    return 0 <= text.find(heading) < asked - len(heading)


def _parts(preamble: str, asking: str, reply: str) -> ChatTemplate:
    before_prompt, after_prompt = asking.split(INPUT)
    before_answer, after_answer = reply.split(OUTPUT)
    return ChatTemplate(preamble, before_prompt, after_prompt, before_answer, after_answer)


def to_jinja(parts: ChatTemplate, special: Special, *, system: str | None, question: str | None) -> str:
    """The chat template that renders messages as the pipeline does.

    With a `question`, {question} stands for the user message's `question`, else the variable `question`, else that text.

    >>> parts = ChatTemplate("", "Q: ", "", " A: ", "</s>")
    >>> to_jinja(parts, Special(bos=None, eos="</s>"), system=None, question=None)  # doctest: +ELLIPSIS
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'Q: ' + message['content'] }}{% elif ..."
    """
    asks = question is not None and QUESTION in parts.before_prompt + parts.between + parts.after_answer
    given = f"question | default({_quoted(question or '')}, true)"
    preamble, messages = _preamble(parts.preamble, system)
    asking = _sum(_spoken(parts.before_prompt, asks), ["message['content']"], _spoken(parts.after_prompt, asks))
    answering = _sum(_spoken(parts.before_answer, asks), ["message['content']"], _spoken(parts.after_answer, asks))
    return "".join(
        [
            "{{ bos_token }}" if special.bos else "",
            preamble,
            f"{{% set asked = namespace(question={given}) %}}" if asks else "",
            f"{{% for message in {messages} %}}{{% if message['role'] == 'user' %}}",
            f"{{% set asked.question = message['question'] | default({given}, true) %}}" if asks else "",
            f"{{{{ {asking} }}}}{{% elif message['role'] == 'assistant' %}}{{{{ {answering} }}}}",
            f"{{% else %}}{USER_ONLY}{{% endif %}}{{% endfor %}}",
            f"{{% if add_generation_prompt %}}{{{{ {_sum(_spoken(parts.before_answer, asks)) or _quoted('')} }}}}{{% endif %}}",
        ]
    )


def _preamble(preamble: str, system: str | None) -> tuple[str, str]:
    """The Jinja before the loop, and the name of the messages to loop over."""
    if not preamble:
        return "", "messages"
    if SYSTEM not in preamble:
        return f"{{{{ {_quoted(preamble)} }}}}", "messages"
    before, after = preamble.split(SYSTEM)
    given = _sum([_quoted(before)] if before else [], ["messages[0]['content']"], [_quoted(after)] if after else [])
    default = _quoted(preamble.replace(SYSTEM, system or ""))
    return (
        f"{{% if messages[0]['role'] == 'system' %}}{{{{ {given} }}}}{{% set loop_messages = messages[1:] %}}"
        f"{{% else %}}{{{{ {default} }}}}{{% set loop_messages = messages %}}{{% endif %}}"
    ), "loop_messages"


def _spoken(text: str, asks: bool) -> list[str]:
    """A literal as Jinja expressions, {question} by name if it is asked."""
    pieces = re.split(r"(\{question\})", text) if asks else [text]
    return ["asked.question" if asks and piece == QUESTION else _quoted(piece) for piece in pieces if piece]


def _sum(*expressions: list[str]) -> str:
    return " + ".join(item for items in expressions for item in items)


def _quoted(text: str) -> str:
    """A Jinja string; its lexer would turn a bare carriage return into a newline."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace('"', '\\"').replace("\r", "\\r")
    return f"'{escaped}'"
