"""A chat template in token ids: what is the same in every conversation, and what a turn is made of.

    opening  | body of turn 1 (EOS) | rejoin | body of turn 2 (EOS) | ... | closing
    constant |  once per product    | const. |   once per product   |     | constant

EOS is a special token, so the text after it is encoded as if it stood alone: joining is exact. Only where the preamble's
last word may reach into the turn is a cut needed at which both forms agree; `find_cut` looks for one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.text.encoding import Ids, special_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

Template = Mapping[str, Any]
"""template.json, as tasks/template.py describes it."""

WITH_SYSTEM = "preamble_with_system"
"""The key of template.json for the text before the first turn of a conversation with a system text."""
SYSTEM = "{SYSTEM}"

PROBES = ("a", " a", "A", "1", "\n", "\n\n", "  b", "#", "'s", "é", ".", "")
"""Beginnings of a text that reach back over a boundary in different ways."""


@dataclass(frozen=True)
class Field:
    """Stands for a column of turns.arrow."""

    name: str


@dataclass(frozen=True)
class Segment:
    """Text between two special tokens of a turn: literals and, as `Field`s, columns."""

    pieces: tuple[str | Field, ...]


@dataclass(frozen=True)
class TurnShape:
    """The ids around the bodies of turns, and the parts of a body."""

    opening: Ids
    rejoin: Ids
    closing: Ids
    body: tuple[Segment | int, ...]


def conversation_head(system: str, template: Template) -> str:
    """The text before a conversation's first turn.

    >>> template = {"bos": "<s>", "preamble": "Hi.", "preamble_with_system": "Be: {SYSTEM}."}
    >>> conversation_head("", template), conversation_head("brief", template)
    ('<s>Hi.', '<s>Be: brief.')
    """
    text = template[WITH_SYSTEM].replace(SYSTEM, system, 1) if system else template["preamble"]
    return (template["bos"] or "") + text


def find_shape(backend: Backend, template: Template) -> TurnShape | None:
    """The constant parts of a conversation and the parts of a turn; None when no cut is safe."""
    head = (template["bos"] or "") + template["preamble"]
    before_eos, eos, trailing = template["after_answer"].partition(template["eos"])
    before_prompt = template["before_prompt"]
    cut = find_cut(backend, head, trailing, before_prompt)
    if cut is None:
        return None
    pieces = [
        *_split_specials(backend, before_prompt[cut:]),
        Field("prompt"),
        *_split_specials(backend, template["before_answer"]),
        Field("answer"),
        *_split_specials(backend, before_eos),
        special_id(backend, eos),
    ]
    return TurnShape(
        opening=_constant(backend, head + before_prompt[:cut]),
        rejoin=_constant(backend, trailing + before_prompt[:cut]),
        closing=_constant(backend, trailing),
        body=tuple(_segments(pieces)),
    )


def find_cut(backend: Backend, head: str, trailing: str, before_prompt: str) -> int | None:
    """Where in `before_prompt` the ids stop to depend on what stands before the turn.

    Behind the last special token; else at the first place where all probes agree, for the first turn and the later ones.
    """
    specials = [match.end() for match in special_pattern(backend).finditer(before_prompt)]
    if specials:
        return specials[-1]
    if _is_closed(backend, head) and _is_closed(backend, trailing):
        return 0
    return next((cut for cut in range(len(before_prompt)) if _cuts(backend, (head, trailing), before_prompt, cut)), None)


def _is_closed(backend: Backend, text: str) -> bool:
    """Whether nothing that follows the text can change its ids."""
    return not text or any(match.end() == len(text) for match in special_pattern(backend).finditer(text))


def _cuts(backend: Backend, befores: Sequence[str], text: str, cut: int) -> bool:
    return all(
        _constant(backend, before + text + probe).tolist()
        == [*_constant(backend, before + text[:cut]).tolist(), *_constant(backend, text[cut:] + probe).tolist()]
        for before in befores
        for probe in PROBES
    )


def _constant(backend: Backend, text: str) -> Ids:
    """Ids of template text, special tokens recognised."""
    return np.array(backend.encode(text, add_special_tokens=False).ids, np.int32)


def special_pattern(backend: Backend) -> re.Pattern[str]:
    """Matches the text of any added token."""
    contents = [token.content for token in backend.get_added_tokens_decoder().values()]
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or r"(?!)")


def _split_specials(backend: Backend, literal: str) -> list[str | Field | int]:
    """A literal's text, {question}, and special tokens as ids, in order."""
    pieces: list[str | Field | int] = []
    end = 0
    for match in special_pattern(backend).finditer(literal):
        pieces += [*_split_question(literal[end : match.start()]), special_id(backend, match.group())]
        end = match.end()
    return [*pieces, *_split_question(literal[end:])]


def _split_question(text: str) -> list[str | Field]:
    pieces = re.split(r"(\{question\})", text)
    return [Field("question") if piece == "{question}" else piece for piece in pieces if piece]


def _segments(pieces: Sequence[str | Field | int]) -> list[Segment | int]:
    """Text pieces gathered between the special tokens."""
    segments: list[Segment | int] = []
    for piece in pieces:
        if isinstance(piece, int):
            segments.append(piece)
        elif segments and isinstance(segments[-1], Segment):
            segments[-1] = Segment((*segments[-1].pieces, piece))
        else:
            segments.append(Segment((piece,)))
    return segments
