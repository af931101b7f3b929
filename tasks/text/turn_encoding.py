"""Token ids of conversations: each product's turn encoded once, conversations joined from the turns (tasks/text/turns.py).

Whether the result equals the whole text's ids is checked on a sample (`choose_encoder`); if it doesn't, whole texts are
encoded (`encode_whole`).

A token is learnt if it covers any character of an answer, or of what the template puts between answer and EOS, or is that
EOS. So a token that merges the end of the prompt with the answer's first characters is learnt: every character of the
answer is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.refs import InputError
from tasks.text.encoding import BatchEncoder, Encoded, Ids, from_ids, to_ids
from tasks.text.turns import Field, Segment, Template, TurnShape, find_shape, special_pattern
from tasks.text.word_encoding import make_encoder

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer as Backend


class Bodies(NamedTuple):
    """Turns: ids as `large_binary`, and how many ids of each come before the answer."""

    ids: pa.LargeBinaryArray
    unlearnt: NDArray[np.int64]


def choose_encoder(backend: Backend, turns: pa.RecordBatch, width: int, template: Template, *, plain: bool) -> TurnEncoder | None:
    """The fastest way whose ids and learnt tokens equal the whole texts' on these conversations; None for no such way."""
    shape = find_shape(backend, template)
    if shape is None:
        return None
    whole = encode_whole(backend, turns, width, template)
    for make in (make_encoder, BatchEncoder):
        candidate = TurnEncoder(shape, make(backend, plain=plain))
        ids, learnt = candidate.join(candidate.encode(turns), width)
        if ids.equals(whole.ids) and np.array_equal(learnt, whole.learnt):
            return candidate
    return None


class TurnEncoder:
    """Encodes turns to bodies, and joins bodies to conversations."""

    def __init__(self, shape: TurnShape, encoder: BatchEncoder) -> None:
        self.shape = shape
        self._encoder = encoder

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

        if self._encoder.token_bytes is None:
            ends = zip(self._encoder.token_ends(texts), pc.utf8_length(prompts).to_pylist(), strict=True)
            return np.array([sum(end <= start for end in row) for row, start in ends], np.int64)
        flat, offsets = to_ids(ids)
        ends = np.concatenate([[0], np.cumsum(self._encoder.token_bytes[flat], dtype=np.int64)])
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
    count = turns.num_rows // width
    return encode_conversations(
        backend, turns, [width] * count, [(template["bos"] or "") + template["preamble"]] * count, template
    )


def encode_conversations(
    backend: Backend, turns: pa.RecordBatch, widths: Sequence[int], heads: Sequence[str], template: Template
) -> Encoded:
    """As `encode_whole`, of so many turns each, each with its own text before the first."""
    texts, spans = _texts_with_spans(turns, widths, heads, template)
    rows = backend.encode_batch(texts, add_special_tokens=False)
    flat = [np.array(row.ids, np.int32) for row in rows]
    offsets = np.cumsum([0, *map(len, flat)])
    learnt = [_in_spans(np.array(row.offsets).reshape(-1, 2), span) for row, span in zip(rows, spans, strict=True)]
    return Encoded(from_ids(np.concatenate(flat), offsets), np.concatenate(learnt))


def without_specials(backend: Backend, turns: pa.RecordBatch) -> pa.RecordBatch:
    """Turns (uid, prompt, question, answer) without the text of any special token."""
    import pyarrow as pa
    import pyarrow.compute as pc

    pattern = special_pattern(backend).pattern
    columns = [pc.replace_substring_regex(turns[name], pattern, "") for name in turns.schema.names]
    return pa.RecordBatch.from_arrays(columns, schema=turns.schema)


def refuse_specials(backend: Backend, turns: pa.RecordBatch) -> None:
    """Check that no turn holds the text of a special token.

    Raises:
        InputError: naming the product that does.
    """
    import pyarrow.compute as pc

    pattern = special_pattern(backend).pattern
    found = np.any([pc.match_substring_regex(turns[name], pattern) for name in ("prompt", "question", "answer")], axis=0)
    if found.any():
        raise InputError(
            f"product {turns['uid'][int(found.argmax())].as_py()}: special token in its text: this tokenizer can't take it for "
            "plain text. Set tokenize.special_tokens_in_products=control to let it be the token, or remove the product."
        )


def _texts_with_spans(
    turns: pa.RecordBatch, widths: Sequence[int], heads: Sequence[str], template: Template
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Whole texts, and from where to where, in characters, each answer goes with its EOS."""
    eos_end = template["after_answer"].find(template["eos"]) + len(template["eos"])
    texts: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    rows = iter(turns.to_pylist())
    for head, width in zip(heads, widths, strict=True):
        texts.append(head)
        spans.append([])
        for turn in islice(rows, width):
            asked = template["before_answer"].replace("{question}", turn["question"])
            before = texts[-1] + template["before_prompt"].replace("{question}", turn["question"]) + turn["prompt"] + asked
            spans[-1].append((len(before), len(before) + len(turn["answer"]) + eos_end))
            texts[-1] = before + turn["answer"] + template["after_answer"]
    return texts, spans


def _in_spans(offsets: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    return np.any([(offsets[:, 1] > start) & (offsets[:, 0] < end) for start, end in spans], axis=0)
