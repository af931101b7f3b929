"""Rows that change packs between the processes of a step, until all have as much to do.

Packs are filled up to one length, so what differs is attention, which grows with the square of a row's length. A row's loss and
gradient do not depend on the pack that it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

ROUNDS = 12
CLOSE = 0.02
"""How much more than the mean the busiest process may have to do."""
GIVEN, TAKEN = 6, 10
"""At most so many rows leave the busier pack for so many of the other: few long ones for more short ones."""
TRIED = (600, 3000)
"""Choices of rows that are tried on the two sides, drawn at random."""

Pack = Any
"""Numbers of rows, an array."""


class Room(NamedTuple):
    """The most that a pack may hold."""

    tokens: int
    rows: int


def even_out(shares: Sequence[Sequence[Pack]], lengths: Any, room: Room) -> list[list[Pack]]:
    """Each process's packs, rows exchanged between them; `lengths` has the tokens of each row that a pack may name.

    Each process finds the same.

    >>> packs = even_out([[np.array([0, 1])], [np.array([2, 3, 4, 5])]], np.array([4, 4, 2, 2, 2, 2]), Room(8, 4))
    >>> [[sorted(np.array([4, 4, 2, 2, 2, 2])[pack].tolist()) for pack in share] for share in packs]
    [[[2, 2, 4]], [[2, 2, 4]]]
    """
    evened = [list(share) for share in shares]
    work = np.array([_work(lengths, np.concatenate(share)) if share else 0 for share in evened])
    for _ in range(ROUNDS):
        heavy = int(work.argmax())
        if work[heavy] <= (1 + CLOSE) * work.mean() or not _lighten(evened, heavy, work, lengths, room):
            break
    return evened


def _work(lengths: Any, rows: Pack) -> int:
    return int((lengths[rows] ** 2).sum())


def _lighten(evened: list[list[Pack]], heavy: int, work: Any, lengths: Any, room: Room) -> bool:
    """Exchange rows between the busiest process and the idlest that has some to offer; whether there was one."""
    giver = max(range(len(evened[heavy])), key=lambda number: _work(lengths, evened[heavy][number]))
    for light in map(int, work.argsort()[:-1]):
        if light == heavy or not evened[light]:
            continue
        taker = min(range(len(evened[light])), key=lambda number: _work(lengths, evened[light][number]))
        packs = evened[heavy][giver], evened[light][taker]
        if (exchanged := exchange(*packs, int(work[heavy] - work[light]), lengths, room)) is not None:
            evened[heavy][giver], evened[light][taker] = exchanged
            change = _work(lengths, packs[0]) - _work(lengths, exchanged[0])
            work[heavy] -= change
            work[light] += change
            return True
    return False


def exchange(giver: Pack, taker: Pack, gap: int, lengths: Any, room: Room) -> tuple[Pack, Pack] | None:
    """Two packs with rows exchanged such that their processes, `gap` apart before, are nearest; None if no exchange helps."""
    given, taken = choices(len(giver), GIVEN, TRIED[0]), choices(len(taker), TAKEN, TRIED[1])
    out, back = fitting_pairs(
        given @ lengths[giver], taken @ lengths[taker], room.tokens - lengths[giver].sum(), room.tokens - lengths[taker].sum()
    )
    rows = given.sum(1)[out] - taken.sum(1)[back]
    left = np.abs(gap - 2 * ((given @ lengths[giver] ** 2)[out] - (taken @ lengths[taker] ** 2)[back]))
    left[(rows > room.rows - len(taker)) | (-rows > room.rows - len(giver))] = gap
    if not len(left) or left.min() >= (1 - CLOSE) * gap:
        return None
    leave, come = given[out[left.argmin()]] > 0, taken[back[left.argmin()]] > 0
    return np.concatenate([giver[~leave], taker[come]]), np.concatenate([taker[~come], giver[leave]])


def fitting_pairs(given: Any, taken: Any, giver_room: float, taker_room: float) -> tuple[Any, Any]:
    """The numbers of those sums of tokens that fit into each other's place, one of each side.

    >>> [side.tolist() for side in fitting_pairs(np.array([0, 5]), np.array([6, 0, 4]), 1, 0)]
    [[0, 1], [1, 0]]
    """
    order = taken.argsort()
    first = np.searchsorted(taken[order], given - taker_room, "left")
    counts = np.searchsorted(taken[order], given + giver_room, "right") - first
    out = np.repeat(np.arange(len(given)), counts)
    return out, order[np.arange(len(out)) - np.repeat(np.cumsum(counts) - counts - first, counts)]


@lru_cache
def choices(rows: int, most: int, count: int) -> Any:
    """`count` choices of up to so many of a pack's rows, never of all: ones, (count, rows). They are drawn once for all packs."""
    random = np.random.default_rng(rows)
    sizes = random.integers(0, min(most, rows - 1) + 1, (count, 1))
    return (random.random((count, rows)).argsort(1) < sizes).astype(np.float64)
