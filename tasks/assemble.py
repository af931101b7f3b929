"""Token ids of conversations: each product's turn encoded once, conversations joined from the turns.

    opening  | body of turn 1 (EOS) | rejoin | body of turn 2 (EOS) | ... | closing
    constant |  once per product    | const. |   once per product   |     | constant

EOS is a special token, so the text after it is encoded as if it stood alone: joining is exact. Only where the preamble's
last word may reach into the turn is a cut needed at which both forms agree; `find_cut` looks for one. Whether the result
equals the whole text's ids is checked on a sample (`choose_encoder`); if it doesn't, whole texts are encoded.

A token is learnt if it covers any character of an answer, or of what the template puts between answer and EOS, or is that
EOS. So a token that merges the end of the prompt with the answer's first characters is learnt: every character of the
answer is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.encode import BatchEncoder, Ids, from_ids, make_encoder, to_ids, token_bytes
from tasks.refs import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer as Backend

Template = Mapping[str, Any]
"""template.json, as tasks/template.py describes it."""

PROBES = ("a", " a", "A", "1", "\n", "\n\n", "  b", "#", "'s", "é", ".", "")
"""Beginnings of a text that reach back over a boundary in different ways."""


class Encoded(NamedTuple):
    """Conversations: ids as `large_binary` (tasks/encode.py), and of all ids end to end which are learnt."""

    ids: pa.LargeBinaryArray
    learnt: NDArray[np.bool_]


class Bodies(NamedTuple):
    """Turns: ids as `large_binary`, and how many ids of each come before the answer."""

    ids: pa.LargeBinaryArray
    unlearnt: NDArray[np.int64]


@dataclass(frozen=True)
class Field:
    """Stands for a column of turns.arrow."""

    name: str


@dataclass(frozen=True)
class Segment:
    """Text between two special tokens of a turn: literals and, as `Field`s, columns."""

    pieces: tuple[str | Field, ...]


@dataclass(frozen=True)
class Shape:
    """What surrounds and fills a body, as ids."""

    opening: Ids
    rejoin: Ids
    closing: Ids
    body: tuple[Segment | int, ...]


def choose_encoder(backend: Backend, turns: pa.RecordBatch, width: int, template: Template, *, plain: bool) -> TurnEncoder | None:
    """The fastest way whose ids and learnt tokens equal the whole texts' on these conversations; None for no such way."""
    shape = find_shape(backend, template)
    if shape is None:
        return None
    whole = encode_whole(backend, turns, width, template)
    for encoder in (make_encoder(backend, plain=plain), BatchEncoder(backend, plain=plain)):
        candidate = TurnEncoder(shape, encoder)
        ids, learnt = candidate.join(candidate.encode(turns), width)
        if ids.equals(whole.ids) and np.array_equal(learnt, whole.learnt):
            return candidate
    return None


def find_shape(backend: Backend, template: Template) -> Shape | None:
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
        backend.token_to_id(eos),
    ]
    return Shape(
        opening=_constant(backend, head + before_prompt[:cut]),
        rejoin=_constant(backend, trailing + before_prompt[:cut]),
        closing=_constant(backend, trailing),
        body=tuple(_segments(pieces)),
    )


def find_cut(backend: Backend, head: str, trailing: str, before_prompt: str) -> int | None:
    """Where in `before_prompt` the ids stop to depend on what stands before the turn.

    Behind its last special token; else at the first place where all probes agree, for the first turn and the later ones.
    """
    specials = [match.end() for match in special_pattern(backend).finditer(before_prompt)]
    if specials:
        return specials[-1]
    if not trailing and special_pattern(backend).fullmatch(head):
        return 0
    return next((cut for cut in range(len(before_prompt)) if _cuts(backend, (head, trailing), before_prompt, cut)), None)


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
        pieces += [*_split_question(literal[end : match.start()]), int(backend.token_to_id(match.group()))]
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


class TurnEncoder:
    """Encodes turns to bodies, and joins bodies to conversations."""

    def __init__(self, shape: Shape, encoder: BatchEncoder) -> None:
        self.shape = shape
        self._encoder = encoder
        self._token_bytes = token_bytes(encoder.backend)

    def encode(self, turns: pa.RecordBatch) -> Bodies:
        """The bodies of turns (uid, prompt, question, answer)."""
        import pyarrow.compute as pc

        parts: list[Any] = []
        unlearnt = np.zeros(turns.num_rows, np.int64)
        answered = False
        for item in self.shape.body:
            if isinstance(item, int):
                parts.append(_binary(np.array([item], np.int32)))
                unlearnt += not answered
                continue
            ids, before = self._encode_segment(item, turns)
            parts.append(ids)
            unlearnt += 0 if answered else before
            answered = answered or Field("answer") in item.pieces
        return Bodies(pc.binary_join_element_wise(*parts, _binary(np.zeros(0, np.int32))), unlearnt)

    def _encode_segment(self, segment: Segment, turns: pa.RecordBatch) -> tuple[pa.LargeBinaryArray, NDArray[np.int64]]:
        """Ids, and how many of them cover no character of an answer."""
        texts = _joined(segment.pieces, turns)
        ids = self._encoder.encode(texts)
        if Field("answer") not in segment.pieces:
            return ids, np.diff(to_ids(ids)[1])
        return ids, self._before(texts, ids, _joined(segment.pieces[: segment.pieces.index(Field("answer"))], turns))

    def _before(self, texts: pa.Array, ids: pa.LargeBinaryArray, prompts: pa.Array) -> NDArray[np.int64]:
        """How many ids of each text end within its prompt; a byte-level id stands for a known number of bytes."""
        import pyarrow.compute as pc

        if self._token_bytes is None:
            ends = zip(self._encoder.token_ends(texts), pc.utf8_length(prompts).to_pylist(), strict=True)
            return np.array([sum(end <= start for end in row) for row, start in ends], np.int64)
        flat, offsets = to_ids(ids)
        ends = np.concatenate([[0], np.cumsum(self._token_bytes[flat], dtype=np.int64)])
        if not np.array_equal(np.diff(ends[offsets]), pc.binary_length(texts).to_numpy()):
            raise InputError("tokenizer.json: ids don't add up to their text's bytes; expected a byte-level vocabulary")
        starts = ends[offsets[:-1]] + pc.binary_length(prompts).to_numpy()
        return np.searchsorted(ends[1:], starts, side="right") - offsets[:-1]

    def join(self, bodies: Bodies, width: int) -> Encoded:
        """Conversations of `width` bodies each."""
        import pyarrow as pa
        import pyarrow.compute as pc

        shape, count = self.shape, len(bodies.ids) // width
        columns = [pa.array(np.arange(turn, count * width, width)) for turn in range(width)]
        turns = [part for rows in columns for part in (_binary(shape.rejoin), bodies.ids.take(rows))][1:]
        ids = pc.binary_join_element_wise(_binary(shape.opening), *turns, _binary(shape.closing), _binary(np.zeros(0, np.int32)))
        lengths = np.diff(to_ids(bodies.ids)[1]).reshape(count, width)
        gaps = np.full((count, width), len(shape.rejoin))
        gaps[:, 0] = len(shape.opening)
        unlearnt = bodies.unlearnt.reshape(count, width)
        runs = np.empty((count, 2 * width + 1), np.int64)
        runs[:, 0:-1:2], runs[:, 1:-1:2], runs[:, -1] = gaps + unlearnt, lengths - unlearnt, len(shape.closing)
        return Encoded(ids, np.repeat(np.tile(np.arange(2 * width + 1) % 2 == 1, count), runs.ravel()))


def _joined(pieces: Sequence[str | Field], turns: pa.RecordBatch) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = [turns[piece.name] if isinstance(piece, Field) else piece for piece in pieces]
    return pc.binary_join_element_wise(pa.repeat("", turns.num_rows), *columns, "")


def _binary(ids: Ids) -> pa.Scalar[Any]:
    import pyarrow as pa

    return pa.scalar(ids.astype("<i4").tobytes(), pa.large_binary())


def encode_whole(backend: Backend, turns: pa.RecordBatch, width: int, template: Template) -> Encoded:
    """Conversations encoded as whole texts, learnt by the offsets of the answers: the reference, and the slow way."""
    texts, spans = _texts_with_spans(turns, width, template)
    rows = backend.encode_batch(texts, add_special_tokens=False)
    flat = [np.array(row.ids, np.int32) for row in rows]
    offsets = np.cumsum([0, *map(len, flat)])
    learnt = [_in_spans(np.array(row.offsets).reshape(-1, 2), span) for row, span in zip(rows, spans, strict=True)]
    return Encoded(from_ids(np.concatenate(flat), offsets), np.concatenate(learnt))


def _texts_with_spans(turns: pa.RecordBatch, width: int, template: Template) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Whole texts, and from where to where, in characters, each answer goes with its EOS."""
    head = (template["bos"] or "") + template["preamble"]
    eos_end = template["after_answer"].find(template["eos"]) + len(template["eos"])
    texts: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    for number, turn in enumerate(turns.to_pylist()):
        if number % width == 0:
            texts.append(head)
            spans.append([])
        asked = template["before_answer"].replace("{question}", turn["question"])
        before = texts[-1] + template["before_prompt"].replace("{question}", turn["question"]) + turn["prompt"] + asked
        spans[-1].append((len(before), len(before) + len(turn["answer"]) + eos_end))
        texts[-1] = before + turn["answer"] + template["after_answer"]
    return texts, spans


def _in_spans(offsets: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    return np.any([(offsets[:, 1] > start) & (offsets[:, 0] < end) for start, end in spans], axis=0)


__all__ = [
    "Bodies",
    "Encoded",
    "Shape",
    "TurnEncoder",
    "choose_encoder",
    "encode_whole",
    "find_cut",
    "find_shape",
    "special_pattern",
]
