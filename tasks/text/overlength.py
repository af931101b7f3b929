"""Rows of at most so many tokens, checked and counted.

Exactly one BOS, at the start, and EOS after every answer; a row that is too long is dropped, shortened to end with EOS, cut
off, or an error.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.config import TokenizeConfig
from tasks.refs import InputError
from tasks.text.encoding import Encoded, Ids, from_ids, to_ids

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)


@dataclass
class RowCounts:
    """Counts of the rows of one file by what became of them."""

    rows: int = 0
    tokens: int = 0
    learnt: int = 0
    kept: int = 0
    overlong: int = 0
    longest: int = 0
    unlearnable: int = 0
    """Rows within max_tokens, or cut to it, without a single label."""
    stray_bos: int = 0
    """BOS tokens inside products' texts."""

    @property
    def affected_share(self) -> float:
        """Of all rows, those that were too long or have no label."""
        return (self.overlong + self.unlearnable) / max(self.rows, 1)


def shorten(ids: Ids, learnt: NDArray[np.bool_], max_tokens: int, eos: int) -> tuple[Ids, NDArray[np.bool_]]:
    """A row cut in its last answer that has room for a token and EOS, and ended there; empty if no answer has.

    >>> ids, learnt = np.array([0, 5, 8, 9, 1, 5, 8, 1], np.int32), np.array([0, 0, 1, 1, 1, 0, 1, 1], bool)
    >>> [shorten(ids, learnt, most, 1)[0].tolist() for most in (4, 6, 3)]
    [[0, 5, 8, 1], [0, 5, 8, 9, 1], []]
    """
    last = max_tokens - 1
    if learnt[last] and learnt[last - 1] and ids[last - 1] != eos:
        return np.append(ids[:last], np.int32(eos)), learnt[: last + 1]
    ended = np.flatnonzero(learnt[:max_tokens] & (ids[:max_tokens] == eos))
    end = int(ended[-1]) + 1 if len(ended) else 0
    return ids[:end], learnt[:end]


def fit(encoded: Encoded, uids: pa.ListArray, config: TokenizeConfig, eos: int) -> tuple[Encoded, NDArray[np.int64]]:
    """Rows of at most max_tokens ids, and which rows they were.

    Raises:
        InputError: naming the first row that is too long, with on_overlength=error.
    """
    flat, offsets = to_ids(encoded.ids)
    overlong = np.flatnonzero(np.diff(offsets) > config.max_tokens)
    if not len(overlong):
        return encoded, np.arange(len(encoded.ids))
    if config.on_overlength == "error":
        raise _overlong_error(uids[int(overlong[0])].as_py(), int(np.diff(offsets)[overlong[0]]), config.max_tokens)
    rows = [(flat[start:end], encoded.learnt[start:end]) for start, end in pairwise(offsets)]
    for row in overlong:
        rows[row] = _shortened(*rows[row], config, eos)
    kept = np.array([row for row, (ids, _) in enumerate(rows) if len(ids)], np.int64)
    lengths = np.cumsum([0, *(len(rows[row][0]) for row in kept)])
    ids = np.concatenate([np.zeros(0, np.int32), *(rows[row][0] for row in kept)])
    learnt = np.concatenate([np.zeros(0, bool), *(rows[row][1] for row in kept)])
    return Encoded(from_ids(ids, lengths), learnt), kept


def _shortened(ids: Ids, learnt: NDArray[np.bool_], config: TokenizeConfig, eos: int) -> tuple[Ids, NDArray[np.bool_]]:
    match config.on_overlength:
        case "truncate":
            return shorten(ids, learnt, config.max_tokens, eos)
        case "cut":
            return ids[: config.max_tokens], learnt[: config.max_tokens]
        case _:
            return ids[:0], learnt[:0]


def _overlong_error(uids: list[str], tokens: int, max_tokens: int) -> InputError:
    return InputError(
        f"products {', '.join(uids)}: too long: got {tokens} tokens; expected at most {max_tokens} (tokenize.max_tokens). "
        "Raise it, or set tokenize.on_overlength to drop, truncate or cut."
    )


def check_ends(encoded: Encoded, eos: int) -> None:
    """Assert that every answer is followed by EOS.

    Raises:
        InputError: when the tokenizer doesn't encode its EOS as one token of its own.
    """
    flat, _ = to_ids(encoded.ids)
    last = encoded.learnt & ~np.append(encoded.learnt[1:], False)
    wrong = int((flat[last] != eos).sum())
    if wrong:
        raise InputError(
            f"tokenizer.json: EOS: got {wrong} answers without EOS (id {eos}) behind them; expected it to be an added token. "
            "Choose a tokenizer whose EOS is one."
        )


def count_bos(encoded: Encoded, bos: int | None) -> int:
    """How many BOS there are beyond the one that every row must begin with.

    Raises:
        InputError: when a row doesn't begin with BOS.
    """
    flat, offsets = to_ids(encoded.ids)
    if bos is None or not len(encoded.ids):
        return 0
    if (flat[offsets[:-1]] != bos).any():
        raise InputError(f"tokenizer.json: BOS: got a row without BOS (id {bos}) in front; expected it to be an added token.")
    return int((flat == bos).sum()) - len(encoded.ids)


def check_counts(name: str, counts: RowCounts, config: TokenizeConfig) -> None:
    """Warn with numbers when rows were changed, have no label, or hold BOS in their midst.

    Raises:
        InputError: when they are more than max_affected_share of all, or nothing is left.
    """
    if counts.stray_bos:
        hint = "set tokenize.special_tokens_in_products=text to keep them characters"
        logger.warning("%s: %s BOS inside products' texts; %s", name, f"{counts.stray_bos:,}", hint)
    if not counts.overlong + counts.unlearnable:
        return
    what = (
        f"{counts.overlong:,} of {counts.rows:,} rows are longer than {config.max_tokens} tokens (the longest has "
        f"{counts.longest:,}; {config.on_overlength}), {counts.unlearnable:,} have no label"
    )
    if counts.affected_share > config.max_affected_share or not counts.kept:
        raise InputError(
            f"{name}: too many rows affected: got {what}; expected at most {config.max_affected_share:.1%} of the rows "
            "(tokenize.max_affected_share). Raise tokenize.max_tokens, set on_overlength=truncate, or raise the share."
        )
    logger.warning("%s: %s", name, what)
