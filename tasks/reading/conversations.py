"""Rows that hold conversations, whoever wrote them, to one form: a system text, and prompts each with its answer.

    messages        [{"role": "system" | "user" | "assistant", "content": ...}, ...]       OpenAI's
    sharegpt        conversations: [{"from": "human" | "gpt", "value": ...}, ...]
    completion      prompt, completion: texts, or lists of messages
    alpaca          instruction, input (may be absent), output
                                   ->      uid, system, prompts: [...], answers: [...]

A row that is no conversation is rejected as a bad line is. One that can't be learnt from is left out and counted, or an error, by
a switch each: roles out of order, no answer at the end, an empty turn, calls of tools, images.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from tasks.config import IngestConfig
from tasks.reading.columns import digest_row
from tasks.reading.rows import LineBlock, ParsedBlock, json_text, read_object, sort_lines
from tasks.refs import InputError

if TYPE_CHECKING:
    import pyarrow as pa

Kind = Literal["products", "messages", "sharegpt", "completion", "alpaca"]
NEEDED: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
"""{kind: columns by which it is known}."""
FURTHER = ("system", "input")
"""Columns that are read where they are."""
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_call", "observation", "ipython"), "tool"),
}

Switch = Literal["role_order", "unanswered", "empty_turn", "tool_calls", "images"]
Row = Mapping[str, Any]


class Unfit(NamedTuple):
    """Why nothing can be learnt from a conversation, and the switch that decides what becomes of it."""

    switch: Switch
    reason: str


class Message(NamedTuple):
    """A role's words."""

    role: str
    text: str


class Conversation(NamedTuple):
    """A row of the conversations table."""

    uid: str
    system: str
    prompts: list[str]
    answers: list[str]


def find_kind(columns: Sequence[str], config: IngestConfig) -> Kind:
    """The kind of rows that have these columns; products where it is none.

    >>> find_kind(["id", "messages"], IngestConfig()), find_kind(["asin", "title", "content"], IngestConfig())
    ('messages', 'products')
    """
    if {config.columns.title, config.columns.content} <= set(columns):
        return "products"
    for kind, needed in NEEDED.items():
        if set(needed) <= set(columns):
            return kind
    return "products"


def conversation_columns(kind: Kind, config: IngestConfig) -> dict[str, str]:
    """The columns to read, as `wanted_columns`; those of FURTHER may be absent."""
    return {"uid": config.columns.uid or "uid"} | {name: name for name in (*NEEDED[kind], *FURTHER)}


def conversation_schema() -> pa.Schema:
    """uid, system: string; prompts, answers: list<string>."""
    import pyarrow as pa

    texts = pa.list_(pa.string())
    return pa.schema([("uid", pa.string()), ("system", pa.string()), ("prompts", texts), ("answers", texts)])


def read_conversation(row: Row, kind: Kind, config: IngestConfig) -> Conversation | Unfit:
    r"""A row's conversation, or why nothing can be learnt from it.

    >>> row = {"instruction": "Add.", "input": "1 + 2", "output": "3"}
    >>> read_conversation(row, "alpaca", IngestConfig())[1:]
    ('', ['Add.\n\n1 + 2'], ['3'])

    Raises:
        ValueError: when it is none, saying what is wrong.
    """
    messages = list[Message]()
    for message in _messages(row, kind):
        if isinstance(message, Unfit):
            return message
        messages.append(message)
    first = 1 if messages and messages[0].role == "system" else 0
    asked, said = messages[first::2], messages[first + 1 :: 2]
    if unfit := _unfit(messages, asked, said):
        return unfit
    prompts, answers = [one.text for one in asked], [one.text for one in said]
    system = messages[0].text if first and config.conversations.system == "keep" else ""
    uid = json_text("uid", row.get(config.columns.uid or "uid")) or digest_row([system, *prompts, *answers])
    return Conversation(uid, system, prompts, answers)


def _unfit(messages: Sequence[Message], asked: Sequence[Message], said: Sequence[Message]) -> Unfit | None:
    if any(one.role != "user" for one in asked) or any(one.role != "assistant" for one in said) or not asked:
        roles = ", ".join(one.role for one in messages) or "of nobody"
        return Unfit("role_order", f"roles {roles}; expected user and assistant by turns")
    if len(asked) != len(said):
        return Unfit("unanswered", "no answer at the end; expected the assistant's turn last")
    if any(not one.text.strip() for one in (*asked, *said)):
        return Unfit("empty_turn", "an empty turn; expected text in every one")
    return None


def _messages(row: Row, kind: Kind) -> list[Message | Unfit]:
    if missing := [name for name in NEEDED[kind] if row.get(name) is None]:
        raise ValueError(f'missing "{missing[0]}"; expected {", ".join(NEEDED[kind])}')
    system = [Message("system", text)] if (text := json_text("system", row.get("system"))).strip() else []
    match kind:
        case "alpaca":
            asked = [json_text(name, row.get(name)) for name in ("instruction", "input")]
            spoken = [
                Message("user", "\n\n".join(text for text in asked if text.strip())),
                Message("assistant", json_text("output", row["output"])),
            ]
        case "completion":
            spoken = [
                *_spoken("prompt", row["prompt"], "user"),
                *_spoken("completion", row["completion"], "assistant"),
            ]
        case _:
            (name,) = NEEDED[kind]
            spoken = _spoken(name, row[name], None)
    told = bool(spoken) and isinstance(spoken[0], Message) and spoken[0].role == "system"
    return [*([] if told else system), *spoken]


def _spoken(name: str, value: Any, role: str | None) -> list[Message | Unfit]:
    """A list of messages, as such or as JSON; where there is a role, its plain text too."""
    if isinstance(value, str) and role is None:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f'"{name}" is text and no JSON; expected a list of messages') from None
    if role is not None and not isinstance(value, list):
        return [Message(role, json_text(name, value))]
    if not isinstance(value, list):
        raise ValueError(f'"{name}" is no list; expected a list of messages')
    return [_message(name, item) for item in cast("list[Any]", value)]


def _message(name: str, item: Any) -> Message | Unfit:
    if not isinstance(item, dict):
        raise ValueError(f'"{name}" holds what is no object; expected messages of role and content')
    message = cast("dict[str, Any]", item)
    named, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    role = ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise ValueError(f'"{name}" has the role {named!r}; expected one of {", ".join(ROLES)}')
    if role == "tool" or message.get("tool_calls") or message.get("function_call"):
        return Unfit("tool_calls", "a call of a tool; expected text alone")
    if not isinstance(content, list):
        return Message(role, json_text(name, content))
    parts = cast("list[Any]", content)
    if any(not isinstance(part, dict) or part.get("type", "text") != "text" for part in parts):
        return Unfit("images", "a part that is no text, such as an image; expected text alone")
    return Message(role, "".join(json_text(name, part.get("text")) for part in parts))


class Chooser:
    """Makes conversations of rows; those left out are counted by reason."""

    def __init__(self, kind: Kind, file: str, config: IngestConfig) -> None:
        self.dropped = Counter[str]()
        self._kind: Kind = kind
        self._file = file
        self._config = config
        self._choices = config.conversations.model_dump()

    def __call__(self, row: Row, place: str) -> Conversation | None:
        """The row's conversation; None where it is left out.

        Raises:
            ValueError: as read_conversation.
            InputError: for a row that the settings do not want left out.
        """
        found = read_conversation(row, self._kind, self._config)
        if isinstance(found, Conversation):
            return found
        if self._choices[found.switch] == "fail":
            raise InputError(
                f"{self._file} {place}: {found.reason}. "
                f"Set ingest.conversations.{found.switch}=drop to leave such rows out, counted."
            )
        self.dropped[found.switch.replace("_", " ")] += 1
        return None


def parse_lines(block: LineBlock, choose: Chooser, config: IngestConfig) -> ParsedBlock:
    """A block's conversations, line by line."""

    def made(raw: bytes, number: int) -> Conversation | None:
        return choose(read_object(raw, {}), f"{block.unit} {number}")

    found, parsed = sort_lines(block, config.max_line_bytes, made)
    parsed.table = conversation_table(one for one in found if one is not None)
    parsed.dropped = choose.dropped
    return parsed


def conversation_table(rows: Iterator[Conversation]) -> pa.Table:
    """Conversations as Arrow."""
    import pyarrow as pa

    columns = list(zip(*rows, strict=True)) or [()] * len(Conversation._fields)
    schema = conversation_schema()
    return pa.table([pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)], schema=schema)
