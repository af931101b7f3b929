"""Each distinct word encoded once: five times as fast as the tokenizer's own loop on real rows.

A byte-level BPE splits a text into words by a fixed pattern and then encodes each word on its own. So it is enough to
split with Polars, give every distinct word a number and encode it once. `WordEncoder` does so for the patterns it knows and
the characters on which both regex engines agree; all other texts go through the tokenizer. Both give the ids that
`Tokenizer.encode` gives.

Texts are cut at their spaces first, which is cheaper than the pattern: by each that is known a word begins with a space that
is not among other white space. So the pattern splits each distinct piece once.

    "12 dry  oats, whole"  ->  pieces "12", " dry", " ", " oats,", " whole"  ->  words "12", " dry", " ", " oats", ",", " whole"
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.tables.arrow import batch_ranges
from tasks.text.encoding import BatchEncoder, described, from_ids, to_ids

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    from tokenizers import Tokenizer as Backend

logger = logging.getLogger(__name__)

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

AMONG_SPACE = r"\s \s|\s $"
"""A space where no word need begin: among white space, of which the last character alone can go with what follows."""

_AGREED = ((0x00, 0x17E), (0x180, 0x52F), (0x2000, 0x206F), (0x20A0, 0x20BF), (0x2100, 0x214F))
"""Code points whose class is old enough to be the same in every regex engine; checked when an encoder is made."""


MAX_WORDS = 1 << 19
"""Words remembered at a time, and pieces, some 100 bytes each: real text never stops bringing new ones."""
WORDS_A_TEXT = 512
"""Words handed to the tokenizer as one text: a text costs it more than a word."""


class Dictionary:
    """The ids of texts that come again and again, each encoded once; it is begun anew when it is full."""

    def __init__(self, encode: Callable[[pl.Series], pa.LargeBinaryArray]) -> None:
        self._encode = encode
        self._met = MetTexts(encode)

    def look_up(self, texts: pl.Series) -> pa.LargeBinaryArray:
        """The ids of each text."""
        met = self._met
        ids = met.look_up(texts)
        if len(met) > MAX_WORDS:
            self._met = MetTexts(self._encode)
        return ids


class MetTexts:
    """The ids of the texts met so far."""

    def __init__(self, encode: Callable[[pl.Series], pa.LargeBinaryArray]) -> None:
        import polars as pl

        self._encode = encode
        self._numbers = pl.Categorical(pl.Categories.random())
        self._numbered = pl.Series([""], dtype=self._numbers)  # the numbers live as long as a series that has them
        self._slots = np.full(1 << 16, -1, np.int32)
        self._known = from_ids(np.zeros(0, np.int32), np.zeros(1, np.int64))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def look_up(self, texts: pl.Series) -> pa.LargeBinaryArray:
        """The ids of each text."""
        import pyarrow as pa

        numbers = texts.cast(self._numbers).to_physical().to_numpy()
        with self._lock:
            self._learn(texts, numbers)
            known, slots = self._known, self._slots[numbers]
        return known.take(pa.array(slots))

    def _learn(self, texts: pl.Series, numbers: NDArray[np.uint32]) -> None:
        """Encode those that were not met before."""
        import pyarrow as pa

        top = int(numbers.max(initial=0))
        if top >= len(self._slots):
            self._slots = np.concatenate([self._slots, np.full(2 * top, -1, np.int32)])
        unknown = np.flatnonzero(self._slots[numbers] < 0)
        if not len(unknown):
            return
        new, first = np.unique(numbers[unknown], return_index=True)
        encoded = self._encode(texts.gather(unknown[first]))
        self._slots[new] = np.arange(len(self._known), len(self._known) + len(new))
        self._known = pa.concat_arrays([self._known, encoded])


class WordEncoder(BatchEncoder):
    """Encodes each distinct word once; the rest as `BatchEncoder`."""

    def __init__(self, backend: Backend, *, plain: bool, pattern: str) -> None:
        super().__init__(backend, plain=plain)
        self._run = RUNS[pattern]
        self._word = _markless(pattern)
        added = backend.get_added_tokens_decoder().values()
        self._added = [token.content for token in added if not (plain and token.special)]
        self._words, self._pieces = Dictionary(self._encode_each), Dictionary(self._encode_new)

    def encode(self, texts: pa.Array) -> pa.LargeBinaryArray:
        """The ids of each text, nothing added."""
        import polars as pl
        import pyarrow as pa

        series = pl.Series(pl.from_arrow(texts))
        regular = ~series.str.contains(_unagreed())
        if self._added:
            regular &= ~series.to_frame("text").select(pl.col("text").str.contains_any(self._added)).to_series()
        cut = regular & ~series.str.contains(AMONG_SPACE)
        ways = ((cut, self._encode_pieces), (regular & ~cut, self._encode_words), (~regular, self._encode_others))
        parts = [(chosen.arg_true(), way(series.filter(chosen))) for chosen, way in ways if chosen.any()]
        if len(parts) < 2:
            return parts[0][1] if parts else self._encode_others(series)
        back = np.argsort(np.concatenate([rows.to_numpy() for rows, _ in parts]))
        return pa.concat_arrays([ids for _, ids in parts]).take(pa.array(back))

    def _encode_pieces(self, texts: pl.Series) -> pa.LargeBinaryArray:
        """Of texts with a word's beginning at each space."""
        pieces = (MARK + texts).str.split(" ")
        return _joined_ids(self._pieces.look_up(pieces.explode()), pieces)

    def _encode_new(self, pieces: pl.Series) -> pa.LargeBinaryArray:
        """Of pieces, each without its space; the first of a text, which has none, has a mark."""
        import polars as pl

        piece = pl.col("piece")
        spaced = pl.when(piece.str.starts_with(MARK)).then(piece.str.strip_prefix(MARK)).otherwise(" " + piece)
        return self._encode_words(pieces.to_frame("piece").select(spaced).to_series())

    def _encode_words(self, texts: pl.Series) -> pa.LargeBinaryArray:
        words = self.split(texts)
        return _joined_ids(self._words.look_up(words.explode().drop_nulls()), words)

    def _encode_others(self, texts: pl.Series) -> pa.LargeBinaryArray:
        return self.encode_list(texts.to_list())

    def _encode_each(self, words: pl.Series) -> pa.LargeBinaryArray:
        """The ids of each word. Many go into one call's text, which is cut again where the ids' bytes say that a word ends."""
        assert self.token_bytes is not None, "make_encoder sees to it"
        listed = words.to_list()
        texts = [listed[start:end] for start, end in batch_ranges(len(listed), WORDS_A_TEXT)]
        flat, _ = to_ids(self.encode_list(texts, split=True))
        ends = np.searchsorted(np.cumsum(self.token_bytes[flat]), np.cumsum(words.str.len_bytes()))
        return from_ids(flat, np.concatenate([[0], ends + 1]))

    def split(self, texts: pl.Series) -> pl.Series:
        """The words of each text, a list."""
        import polars as pl

        text = pl.col("text")
        marked = (
            pl.when(text.str.contains(self._run)).then(text.str.replace_all(self._run, f"${{1}}{MARK}${{2}}")).otherwise(text)
        )
        return texts.to_frame("text").select(marked.str.extract_all(self._word)).to_series()


def _joined_ids(ids: pa.LargeBinaryArray, lists: pl.Series) -> pa.LargeBinaryArray:
    """The ids of each list, of those of all their members end to end."""
    flat, ends = to_ids(ids)
    return from_ids(flat, ends[np.concatenate([[0], np.cumsum(lists.list.len().to_numpy(), dtype=np.int64)])])


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
        if encoder.token_bytes is not None and _splits_alike(encoder):
            return encoder
    logger.info("tokenize: encodes with the tokenizer's own loop: its splitting pattern is not one of those known to be safe")
    return BatchEncoder(backend, plain=plain)


def _split_pattern(backend: Backend) -> str | None:
    """The pattern of a byte-level BPE that changes nothing else about a text, if it is a known one."""
    from tokenizers.models import BPE

    if backend.normalizer is not None or not isinstance(backend.model, BPE) or backend.model.dropout:
        return None
    match described(backend.pre_tokenizer):
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


def _splits_alike(encoder: WordEncoder) -> bool:
    """Whether both regex engines split alike around every agreed code point."""
    import polars as pl

    pre_tokenizer = encoder.backend.pre_tokenizer
    points = chain.from_iterable(range(low, high + 1) for low, high in _AGREED)
    probes = [f"a{c}b'{c}l {c}1{c}23{c}{c}- {c} -  {c}\n{c}  \n {c}x{c}" for c in map(chr, points)]
    theirs = [[probe[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(probe)] for probe in probes]
    return encoder.split(pl.Series(probes)).to_list() == theirs
