"""Which process takes which rows, and how rows change packs between processes."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.training.parallel.dealing import deal, micro_steps
from tasks.training.parallel.evening import Room, even_out


@given(st.data(), st.integers(1, 9), st.integers(1, 4))
def test_every_row_is_dealt_once_and_no_micro_batch_is_too_large(data: st.DataObject, ranks: int, batch_size: int) -> None:
    costs = data.draw(st.lists(st.floats(1, 1e6), min_size=1, max_size=40))
    rows = data.draw(st.permutations(range(len(costs))))
    shares = deal(rows, costs, batch_size, ranks)
    assert len(shares) == ranks
    assert {len(share) for share in shares} == {micro_steps(len(rows), batch_size, ranks)}
    assert sorted(row for share in shares for batch in share for row in batch) == sorted(rows)
    assert all(len(batch) <= batch_size for share in shares for batch in share)


def test_long_rows_are_spread() -> None:
    costs = [100.0, 90.0, 10.0, 9.0, 8.0, 1.0]
    loads = [sum(costs[row] for batch in share for row in batch) for share in deal(range(6), costs, 2, 2)]
    assert loads == [109.0, 109.0]


lengths_of_packs = st.lists(st.lists(st.integers(2, 300), min_size=1, max_size=12), min_size=2, max_size=8)


def work(lengths: Any, share: Any) -> int:
    return sum(int((lengths[pack] ** 2).sum()) for pack in share)


@settings(max_examples=40)  # a tenth of a second each
@given(lengths_of_packs, st.integers(2, 4))
def test_rows_that_change_packs_are_all_kept_and_fit(packs: list[list[int]], ranks: int) -> None:
    lengths, ends = np.concatenate([np.array(pack) for pack in packs]), np.cumsum([len(pack) for pack in packs])
    numbered = np.split(np.arange(ends[-1]), ends[:-1])
    shares = [numbered[rank::ranks] for rank in range(ranks)]
    room = Room(max(map(sum, packs)), max(map(len, packs)))
    evened = even_out(shares, lengths, room)
    assert sorted(np.concatenate([pack for share in evened for pack in share]).tolist()) == list(range(len(lengths)))
    assert [len(share) for share in evened] == [len(share) for share in shares]
    assert all(0 < len(pack) <= room.rows and lengths[pack].sum() <= room.tokens for share in evened for pack in share)
    assert max(work(lengths, share) for share in evened) <= max(work(lengths, share) for share in shares)
    again = even_out(shares, lengths, room)
    assert all(np.array_equal(*pair) for pair in zip(chain(*evened), chain(*again), strict=True))


def test_long_rows_change_places_with_as_many_tokens_of_short_ones() -> None:
    lengths = np.array([1000] * 8 + [500] * 16)
    shares = [[np.arange(8)], [np.arange(8, 24)]]
    evened = even_out(shares, lengths, Room(8000, 16))
    first, second = (work(lengths, share) for share in evened)
    assert abs(first - second) <= 0.05 * first
