"""Packs hold every row exactly once, none too long, as few as best fit makes of them, the same each time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.config import PackConfig
from tasks.pack import IGNORED, fit_best, order_packs, pack, utilisation
from tasks.refs import InputError
from tests.support.prepared import GOLDEN, encode, golden_products, lines, render, rows_of
from tests.support.tiny import publish_rows, tiny_row, tiny_tokens


def fit_best_naively(lengths: list[int], capacity: int) -> list[int]:
    """Best fit, longest first, as a textbook writes it: every pack is looked at for every row."""
    packs, rooms = [0] * len(lengths), list[int]()
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fitting = [number for number, room in enumerate(rooms) if room >= lengths[row]]
        if fitting:
            chosen = min(fitting, key=lambda number: rooms[number])
        else:
            chosen = len(rooms)
            rooms.append(capacity)
        rooms[chosen] -= lengths[row]
        packs[row] = chosen
    return packs


def filled(lengths: NDArray[np.int64], packs: NDArray[np.int64]) -> list[int]:
    return sorted(np.bincount(packs, weights=lengths).astype(int).tolist()) if len(packs) else []


@given(st.integers(1, 60).flatmap(lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=60))))
def test_rows_are_packed_as_best_fit_packs_them(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case[0], np.array(case[1], np.int64)
    packs = fit_best(lengths, capacity)
    assert all(total <= capacity for total in filled(lengths, packs))
    assert filled(lengths, packs) == filled(lengths, np.array(fit_best_naively(case[1], capacity), np.int64))
    order, bounds = order_packs(packs)
    assert sorted(order.tolist()) == list(range(len(lengths))), "every row once"
    assert bounds.tolist() == sorted(set(bounds.tolist()))
    members = [order[start:end].tolist() for start, end in pairwise(bounds)]
    assert all(len({int(packs[row]) for row in rows}) == 1 for rows in members)
    assert [rows[0] for rows in members] == sorted(rows[0] for rows in members), "packs follow their first rows"
    assert all(rows == sorted(rows) for rows in members), "rows keep their order within a pack"


@pytest.mark.parametrize(("turns", "capacity"), [(1, 2048), (3, 8192)])
def test_packs_of_realistic_rows_are_nearly_full(turns: int, capacity: int) -> None:
    random = np.random.default_rng(7)
    answers = np.exp(random.normal(4.5, 1.1, size=(20_000, turns))).astype(int)
    lengths = np.minimum(answers.sum(axis=1) + 70 * turns, 2048)
    packs = fit_best(lengths, capacity)
    assert utilisation(lengths, int(packs.max()) + 1, capacity) >= 0.99


def test_the_stage_packs_every_row_once_and_learns_no_first_token(caplog: pytest.LogCaptureFixture) -> None:
    tokens = tiny_tokens(40)
    inputs = {"tokens": tokens, "config": PackConfig(tokens=64)}
    with caplog.at_level(logging.INFO, "tasks.pack"):
        packs = pack.execute(inputs)
    rows = {row["uids"][0]: row for row in rows_of(tokens)}
    used = list[str]()
    for packed in rows_of(packs):
        assert len(packed["input_ids"]) == len(packed["labels"]) == sum(packed["seq_lengths"]) <= 64
        start = 0
        for uid, length in zip(packed["uids"], packed["seq_lengths"], strict=True):
            assert packed["input_ids"][start : start + length] == rows[uid]["input_ids"]
            assert packed["labels"][start : start + length] == [IGNORED, *rows[uid]["labels"][1:]]
            start += length
        used += packed["uids"]
    assert sorted(used) == sorted(rows)
    total = sum(len(row["input_ids"]) for row in rows.values())
    assert caplog.messages == [f"pack: 40 rows in {packs.rows} packs of 64 tokens, {100 * total / (64 * packs.rows):.2f} % used"]
    assert pack.execute(inputs) == packs


def test_rows_of_several_products_keep_all_their_names() -> None:
    rows = [tiny_row("a", [5] * 10) | {"uids": ["a", "b"]}, tiny_row("c", [6] * 12) | {"uids": ["c", "d"]}]
    (packed,) = rows_of(pack.fn(publish_rows("tokens", rows), PackConfig(tokens=32)))
    assert packed["uids"] == ["a", "b", "c", "d"]
    assert packed["seq_lengths"] == [12, 14]


def test_a_row_that_fits_no_pack_is_refused() -> None:
    rows = [tiny_row("a", [5] * 8), tiny_row("b", [5] * 40)]
    with pytest.raises(InputError) as caught:
        pack.fn(publish_rows("tokens", rows), PackConfig(tokens=32))
    assert str(caught.value) == (
        "tokens.arrow row 1 (products b): too long: got 42 tokens; expected at most 32 (pack.tokens). "
        "Raise it, or lower tokenize.max_tokens."
    )


def test_packs_equal_their_golden_file(golden: Callable[[str, str], None]) -> None:
    tokens = encode(render(golden_products(), 3), GOLDEN)
    golden("packs.json", lines(rows_of(pack.fn(tokens.train, PackConfig(tokens=2048)))))
