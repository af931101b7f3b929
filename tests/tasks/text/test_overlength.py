"""A row that is too long is dropped, shortened, cut or refused as the recipe says, and told of with numbers."""

from __future__ import annotations

import logging
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.config import TokenizeConfig
from tasks.refs import InputError
from tasks.text.encoding import Encoded, from_ids
from tasks.text.overlength import RowCounts, check_counts, check_ends, count_bos, fit, shorten
from tests.support.prepared import id_rows

BOS, EOS = 0, 1
Conversation = list[tuple[list[int], list[int]]]
"""Prompts and answers as ids."""


def encode(conversations: list[Conversation]) -> Encoded:
    """BOS, then for each turn prompt, answer and EOS; the latter two learnt."""
    rows = [[BOS] + [number for prompt, answer in turns for number in (*prompt, *answer, EOS)] for turns in conversations]
    learnt = [
        [False] + [flag for prompt, answer in turns for flag in (*[False] * len(prompt), *[True] * (len(answer) + 1))]
        for turns in conversations
    ]
    flat = np.array([number for row in rows for number in row], np.int32)
    return Encoded(from_ids(flat, np.cumsum([0, *map(len, rows)])), np.array([flag for row in learnt for flag in row], bool))


def uids_of(encoded: Encoded) -> pa.ListArray:
    return pa.array([[f"u{number}"] for number in range(len(encoded.ids))], pa.list_(pa.string()))


def fitted(encoded: Encoded, **changes: object) -> tuple[list[list[int]], list[int], Encoded]:
    config = TokenizeConfig.model_construct(**{"max_tokens": 8, **changes})
    fitting, kept = fit(encoded, uids_of(encoded), config, EOS)
    return id_rows(fitting.ids), kept.tolist(), fitting


SHORT: Conversation = [([5], [8])]
LONG: Conversation = [([5, 5], [8, 8]), ([6], [9, 9, 9])]
"""0 5 5 8 8 1 6 9 9 9 1: eleven ids, the last answer of which begins at the eighth."""


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("drop", [[0, 5, 8, 1], [0, 5, 8, 1]]),
        ("truncate", [[0, 5, 8, 1], [0, 5, 5, 8, 8, 1], [0, 5, 8, 1]]),
        ("cut", [[0, 5, 8, 1], [0, 5, 5, 8, 8, 1, 6, 9], [0, 5, 8, 1]]),
    ],
)
def test_a_row_that_is_too_long_is_dealt_with_and_the_others_stay(policy: str, expected: list[list[int]]) -> None:
    rows, kept, fitting = fitted(encode([SHORT, LONG, SHORT]), on_overlength=policy)
    assert rows == expected
    assert kept == ([0, 2] if policy == "drop" else [0, 1, 2])
    assert len(fitting.learnt) == sum(map(len, rows))


def test_truncate_ends_the_last_answer_that_has_room_with_eos() -> None:
    rows, _, fitting = fitted(encode([LONG]), on_overlength="truncate", max_tokens=9)
    assert rows == [[0, 5, 5, 8, 8, 1, 6, 9, 1]]
    assert fitting.learnt.tolist() == [False, False, False, True, True, True, False, True, True]


def test_a_row_that_holds_no_answer_within_the_limit_is_left_out() -> None:
    assert fitted(encode([[([5] * 20, [8])]]), on_overlength="truncate")[:2] == ([], [])


def test_an_overlong_row_is_refused_by_its_products() -> None:
    with pytest.raises(InputError) as caught:
        fitted(encode([SHORT, LONG]), on_overlength="error")
    assert str(caught.value) == (
        "products u1: too long: got 11 tokens; expected at most 8 (tokenize.max_tokens). "
        "Raise it, or set tokenize.on_overlength to drop, truncate or cut."
    )


def test_every_answer_must_be_followed_by_eos() -> None:
    encoded = encode([SHORT, LONG])
    check_ends(encoded, EOS)
    with pytest.raises(InputError) as caught:
        check_ends(encoded, 7)
    assert str(caught.value) == (
        "tokenizer.json: EOS: got 3 answers without EOS (id 7) behind them; expected it to be an added token. "
        "Choose a tokenizer whose EOS is one."
    )


def test_every_row_must_begin_with_bos_and_further_ones_are_counted() -> None:
    assert count_bos(encode([SHORT, [([5, BOS], [BOS])]]), BOS) == 2
    assert count_bos(encode([SHORT]), None) == 0
    with pytest.raises(InputError, match=r"^tokenizer\.json: BOS: got a row without BOS \(id 7\) in front"):
        count_bos(encode([SHORT]), 7)


def test_rows_that_were_changed_are_told_with_numbers(caplog: pytest.LogCaptureFixture) -> None:
    config = TokenizeConfig(max_affected_share=0.1)
    with caplog.at_level(logging.WARNING):
        check_counts("training rows", RowCounts(rows=1000, kept=1000), config)
        assert not caplog.messages
        check_counts("training rows", RowCounts(rows=1000, kept=1000, overlong=40, unlearnable=60, longest=5000), config)
    assert caplog.messages == [
        "training rows: 40 of 1,000 rows are longer than 2048 tokens (the longest has 5,000; drop), 60 have no label"
    ]


def test_too_many_changed_rows_stop_the_run() -> None:
    with pytest.raises(InputError) as caught:
        check_counts("training rows", RowCounts(rows=1000, kept=1000, overlong=101, longest=5000), TokenizeConfig())
    assert str(caught.value) == (
        "training rows: too many rows affected: got 101 of 1,000 rows are longer than 2048 tokens (the longest has 5,000; drop), "
        "0 have no label; expected at most 10.0% of the rows (tokenize.max_affected_share). "
        "Raise tokenize.max_tokens, set on_overlength=truncate, or raise the share."
    )
    with pytest.raises(InputError):
        check_counts("training rows", RowCounts(rows=3, overlong=3), TokenizeConfig(max_affected_share=1))


ids = st.lists(st.integers(2, 9), max_size=6)
conversations = st.lists(st.lists(st.tuples(ids, ids), min_size=1, max_size=4), min_size=1, max_size=4)


@given(conversations=conversations, max_tokens=st.integers(2, 20))
def test_truncated_rows_fit_and_end_with_eos(conversations: list[Conversation], max_tokens: int) -> None:
    encoded = encode(conversations)
    whole = id_rows(encoded.ids)
    rows, kept, fitting = fitted(encoded, on_overlength="truncate", max_tokens=max_tokens)
    for row, number in zip(rows, kept, strict=True):
        assert len(row) <= max_tokens
        assert row[-1] == EOS
        assert row[:-1] == whole[number][: len(row) - 1]
    check_ends(fitting, EOS)
    bounds = pairwise(np.cumsum([0, *map(len, rows)]))
    assert all(fitting.learnt[start:end].any() for start, end in bounds)
    assert all(whole[number] in rows for number in range(len(whole)) if len(whole[number]) <= max_tokens)
    roomy = {number for number, turns in enumerate(conversations) if turns[0][1] and len(turns[0][0]) + 3 <= max_tokens}
    assert roomy <= set(kept), "a row whose first answer has room for BOS, its prompt, a token and EOS is kept"


@given(max_tokens=st.integers(3, 11))
def test_shortening_never_ends_in_a_prompt(max_tokens: int) -> None:
    encoded = encode([LONG])
    ids, learnt = shorten(np.array(id_rows(encoded.ids)[0], np.int32)[:11], encoded.learnt, min(max_tokens, 10), EOS)
    assert not len(ids) or (ids[-1] == EOS and learnt[-1])
