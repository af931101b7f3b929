"""Text to token ids, many texts at a time: the tokenizer's own batch encoder, or each distinct word once.

A byte-level BPE splits a text into words by a fixed pattern and then encodes each word on its own. So it is enough to
split with Polars, give every distinct word a number and encode it once: five times as fast as the tokenizer's own loop on
real rows. `WordEncoder` does so for the patterns it knows and the characters on which both regex engines agree;
all other texts go through the tokenizer. Both give the ids that `Tokenizer.encode` gives.

Ids travel as `large_binary`, one value a text, four bytes an id, so that Arrow's kernels take and join them.
"""

from __future__ import annotations

import json
import logging
import threading
from contextlib import contextmanager
from collections.abc import Generator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.refs import InputError

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    from tokenizers import Tokenizer as Backend

logger = logging.getLogger(__name__)

Ids = NDArray[np.int32]
ID_BYTES = 4

MARK = "\ue000"
"""Stands, while splitting, where a run of spaces ends before a word: Rust's regex has no look-ahead."""

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
RUNS = {
    _LLAMA3: r"([^\S\r\n])([^\S\r\n]\S)",
    _LLAMA3.replace("{1,3}", ""): r"([^\S\r\n])([^\S\r\n]\S)",
    _GPT2: r"(\s)(\s\S)",
}
"""{pattern of Llama 3, Qwen 2, GPT-2: where its look-ahead splits a run of spaces}."""

_AGREED = ((0x00, 0x17E), (0x180, 0x52F), (0x2000, 0x206F), (0x20A0, 0x20BF), (0x2100, 0x214F))
"""Code points whose class is old enough to be the same in every regex engine; checked when an encoder is made."""


def load_tokenizer(directory: Path) -> Backend:
    """The tokenizer of a directory, without padding and truncation.

    Raises:
        InputError: when the directory has no readable tokenizer.json.
    """
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises bare exceptions
        raise InputError(
            f"{directory}: tokenizer.json: got {error}; expected a file of the tokenizers library. "
            "Name a model directory that has one in model.id."
        ) from error
    backend.no_padding()
    backend.no_truncation()
    return backend


def from_ids(flat: Ids, offsets: NDArray[np.int64]) -> pa.LargeBinaryArray:
    """Ids of all texts end to end, and where each text's begin, as one binary value a text."""
    import pyarrow as pa

    buffers = [None, pa.py_buffer(offsets.astype(np.int64) * ID_BYTES), pa.py_buffer(np.ascontiguousarray(flat, dtype="<i4"))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


def to_ids(texts: pa.LargeBinaryArray) -> tuple[Ids, NDArray[np.int64]]:
    """The inverse of `from_ids`, without a copy.

    >>> flat, offsets = to_ids(from_ids(np.array([7, 8, 9], np.int32), np.array([0, 2, 3])))
    >>> flat.tolist(), offsets.tolist()
    ([7, 8, 9], [0, 2, 3])
    """
    _, ends, data = texts.buffers()
    offsets = np.frombuffer(ends, np.int64)[texts.offset : texts.offset + len(texts) + 1] // ID_BYTES
    flat = np.frombuffer(data or b"", "<i4")[offsets[0] : offsets[-1]]
    return flat, offsets - offsets[0]


class BatchEncoder:
    """The tokenizer's own batch encoder; `plain` takes the text of special tokens for plain text."""

    def __init__(self, backend: Backend, *, plain: bool) -> None:
        self.backend = backend
        self.plain = plain
        self._lock = threading.RLock()

    def encode(self, texts: pa.Array) -> pa.LargeBinaryArray:
        """The ids of each text, nothing added."""
        return self._encode_list(texts.to_pylist())

    def _encode_list(self, texts: list[str]) -> pa.LargeBinaryArray:
        with self._configured():
            rows = [row.ids for row in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = np.cumsum([0, *map(len, rows)])
        return from_ids(np.fromiter(chain.from_iterable(rows), np.int32, offsets[-1]), offsets)

    def token_ends(self, texts: pa.Array) -> list[list[int]]:
        """For each text, at which of its characters each id ends."""
        with self._configured():
            rows = self.backend.encode_batch(texts.to_pylist(), add_special_tokens=False)
        return [[end for _, end in row.offsets] for row in rows]

    @contextmanager
    def _configured(self) -> Generator[None]:
        """The backend with `plain` set: a setting of the whole object, so one thread at a time."""
        with self._lock:
            self.backend.encode_special_tokens = self.plain
            try:
                yield
            finally:
                self.backend.encode_special_tokens = False


class WordEncoder(BatchEncoder):
    """Encodes each distinct word once; the rest as `BatchEncoder`."""

    def __init__(self, backend: Backend, *, plain: bool, pattern: str) -> None:
        import polars as pl

        super().__init__(backend, plain=plain)
        self._run = RUNS[pattern]
        self._word = _markless(pattern)
        added = backend.get_added_tokens_decoder().values()
        self._added = [token.content for token in added if not (plain and token.special)]
        self._numbers = pl.Categorical(pl.Categories.random())
        self._numbered = pl.Series([""], dtype=self._numbers)  # the numbers live as long as a series that has them
        self._slots = np.full(1 << 16, -1, np.int32)
        self._known: pa.LargeBinaryArray = from_ids(np.zeros(0, np.int32), np.zeros(1, np.int64))

    def encode(self, texts: pa.Array) -> pa.LargeBinaryArray:
        """The ids of each text, nothing added."""
        import polars as pl
        import pyarrow as pa

        series = pl.Series(pl.from_arrow(texts))
        regular = ~series.str.contains(_unagreed())
        if self._added:
            regular &= ~series.to_frame("text").select(pl.col("text").str.contains_any(self._added)).to_series()
        if regular.all():
            return self._encode_words(series)
        both = [self._encode_words(series.filter(regular)), self._encode_list(series.filter(~regular).to_list())]
        back = np.argsort(np.argsort(~regular.to_numpy(), kind="stable"), kind="stable")
        return pa.concat_arrays(both).take(pa.array(back))

    def _encode_words(self, texts: pl.Series) -> pa.LargeBinaryArray:
        import pyarrow as pa

        words, counts = self.split(texts)
        numbers = words.cast(self._numbers).to_physical().to_numpy()
        with self._lock:
            self._learn(words, numbers)
            known, slots = self._known, self._slots[numbers]
        flat, ends = to_ids(known.take(pa.array(slots)))
        return from_ids(flat, ends[np.concatenate([[0], np.cumsum(counts)])])

    def split(self, texts: pl.Series) -> tuple[pl.Series, NDArray[np.int64]]:
        """The words of all texts end to end, and how many each text has."""
        import polars as pl

        text = pl.col("text")
        marked = (
            pl.when(text.str.contains(self._run)).then(text.str.replace_all(self._run, f"${{1}}{MARK}${{2}}")).otherwise(text)
        )
        words = texts.to_frame("text").select(marked.str.extract_all(self._word)).to_series()
        return words.explode().drop_nulls(), words.list.len().to_numpy().astype(np.int64)

    def _learn(self, words: pl.Series, numbers: NDArray[np.uint32]) -> None:
        """Encode the words that were not met before."""
        import pyarrow as pa

        top = int(numbers.max(initial=0))
        if top >= len(self._slots):
            self._slots = np.concatenate([self._slots, np.full(2 * top, -1, np.int32)])
        unknown = np.flatnonzero(self._slots[numbers] < 0)
        if not len(unknown):
            return
        new, first = np.unique(numbers[unknown], return_index=True)
        encoded = self._encode_list(words.gather(unknown[first]).to_list())
        self._slots[new] = np.arange(len(self._known), len(self._known) + len(new))
        self._known = pa.concat_arrays([self._known, encoded])


def _markless(pattern: str) -> str:
    """A splitting pattern without look-ahead that leaves the mark out of every word."""
    return pattern.replace(r"|\s+(?!\S)", "").replace(r"\p{L}\p{N}]", rf"\p{{L}}\p{{N}}{MARK}]")


def _unagreed() -> str:
    return "[^" + "".join(rf"\x{{{low:x}}}-\x{{{high:x}}}" for low, high in _AGREED) + "]"


def make_encoder(backend: Backend, *, plain: bool) -> BatchEncoder:
    """The fastest encoder that gives this tokenizer's ids."""
    pattern = _split_pattern(backend)
    if pattern is not None:
        encoder = WordEncoder(backend, plain=plain, pattern=pattern)
        if _splits_alike(encoder):
            return encoder
    logger.info("tokenize: encodes with the tokenizer's own loop: its splitting pattern is not one of those known to be safe")
    return BatchEncoder(backend, plain=plain)


def _split_pattern(backend: Backend) -> str | None:
    """The pattern of a byte-level BPE that changes nothing else about a text, if it is a known one."""
    from tokenizers.models import BPE

    if backend.normalizer is not None or not isinstance(backend.model, BPE) or backend.model.dropout:
        return None
    match _described(backend.pre_tokenizer):
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if pattern in RUNS:
            return pattern
        case _:
            return None


def _described(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as it stands in tokenizer.json."""
    return {} if part is None else json.loads(part.__getstate__())


def _splits_alike(encoder: WordEncoder) -> bool:
    """Whether both regex engines split alike around every agreed code point."""
    import polars as pl

    pre_tokenizer = encoder.backend.pre_tokenizer
    points = chain.from_iterable(range(low, high + 1) for low, high in _AGREED)
    probes = [f"a{c}b'{c}l {c}1{c}23{c}{c}- {c} -  {c}\n{c}  \n {c}x{c}" for c in map(chr, points)]
    words, counts = encoder.split(pl.Series(probes))
    theirs = [probe[start:end] for probe in probes for _, (start, end) in pre_tokenizer.pre_tokenize_str(probe)]
    return words.to_list() == theirs and int(counts.sum()) == len(theirs)


def token_bytes(backend: Backend) -> Ids | None:
    """How many bytes of text each id stands for; None unless the vocabulary is byte-level."""
    if backend.normalizer is not None or _described(backend.decoder).get("type") != "ByteLevel":
        return None
    sizes = np.zeros(max(backend.get_vocab(with_added_tokens=True).values()) + 1, np.int32)
    vocabulary = backend.get_vocab(with_added_tokens=False)
    sizes[list(vocabulary.values())] = list(map(len, vocabulary))
    for number, token in backend.get_added_tokens_decoder().items():
        sizes[number] = len(token.content.encode())
    return sizes


__all__ = [
    "BatchEncoder", "Ids", "WordEncoder", "from_ids", "load_tokenizer", "make_encoder", "to_ids", "token_bytes",
]  # fmt: skip
