"""A set of 128-bit hashes that grows to any size: 16 bytes a member, on disk where it is large.

Members lie in runs sorted by their upper half, which are merged whenever there are many of about equal length, so that there
are some dozens at most. A bitmap answers most questions about new members without a search.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
"""(2, members): upper and lower halves."""
Flags = NDArray[np.bool_]

SPILL_MEMBERS = 2**18
"""Longer runs are files without a name, gone with the process; only the pages in use are in memory."""
BITMAP_BITS = 28
MERGE_RUNS = 8
"""Merged at a time: the fewer times a member is moved, and searches are few."""
MERGE_PARTS = 64
"""Long runs are merged piece by piece; hashes are spread evenly, so the pieces are alike."""


class Distinct:
    """Remembers hashes; says which of a batch it has not seen before.

    >>> seen = Distinct(Path("/tmp"))
    >>> seen.add(np.array([[7, 8, 7], [1, 1, 1]], np.uint64)).tolist()
    [True, True, False]
    >>> seen.add(np.array([[8, 8], [1, 2]], np.uint64)).tolist()
    [False, True]
    """

    def __init__(self, directory: Path, spill_members: int = SPILL_MEMBERS) -> None:
        self._directory = directory
        self._spill_members = spill_members
        self._runs: list[Hashes] = []
        self._bitmap = np.zeros(2 ** (BITMAP_BITS - 3), np.uint8)

    def add(self, hashes: Hashes) -> Flags:
        """Which members of the batch are neither in the set nor earlier in the batch; then all are in the set."""
        order = np.argsort(hashes[0])
        ascending = hashes[:, order]
        if (ascending[0, 1:] == ascending[0, :-1]).any():  # seldom; to sort by both halves takes longer
            order = np.lexsort(hashes[::-1])
            ascending = hashes[:, order]
        new = np.ones(len(order), np.bool_)
        new[1:] = (ascending[:, 1:] != ascending[:, :-1]).any(axis=0)
        maybe = np.flatnonzero(new & self._marked(ascending[0]))
        for run in self._runs:
            new[maybe] &= ~_contains(run, ascending[:, maybe])
        self._insert(ascending[:, new])
        first = np.empty_like(new)
        first[order] = new
        return first

    def _marked(self, high: Hashes) -> Flags:
        """Whether the bit of each hash was set; sets it."""
        bit = high >> np.uint64(64 - BITMAP_BITS)
        byte, mask = bit >> np.uint64(3), np.left_shift(1, bit & np.uint64(7)).astype(np.uint8)
        marked = (self._bitmap[byte] & mask) != 0
        np.bitwise_or.at(self._bitmap, byte, mask)
        return marked

    def _insert(self, run: Hashes) -> None:
        if run.shape[1]:
            self._runs.append(run)
        last = self._runs[-MERGE_RUNS:]
        while len(last) == MERGE_RUNS and last[0].shape[1] <= 2 * last[-1].shape[1]:
            self._runs[-MERGE_RUNS:] = [self._merge(last)]
            last = self._runs[-MERGE_RUNS:]

    def _merge(self, runs: list[Hashes]) -> Hashes:
        merged, at = self._room(sum(run.shape[1] for run in runs)), 0
        bounds = np.arange(1, MERGE_PARTS, dtype=np.uint64) * np.uint64(2**64 // MERGE_PARTS)
        cuts = [pairwise([0, *np.searchsorted(run[0], bounds), run.shape[1]]) for run in runs]
        for places in zip(*cuts, strict=True):
            part = np.concatenate([run[:, start:end] for run, (start, end) in zip(runs, places, strict=True)], axis=1)
            merged[:, at : at + part.shape[1]] = part[:, np.argsort(part[0], kind="stable")]
            at += part.shape[1]
        return merged

    def _room(self, members: int) -> Hashes:
        if members < self._spill_members:
            return np.empty((2, members), np.uint64)
        with TemporaryFile(dir=self._directory) as file:
            os.posix_fallocate(file.fileno(), 0, 16 * members)  # a full disk is an error here, and a dead process in the mapping
            return np.memmap(file, np.uint64, "w+", shape=(2, members))


def _contains(run: Hashes, members: Hashes) -> Flags:
    """Which members are in the run; members with an equal upper half are passed one by one, which is next to never."""
    found = np.zeros(members.shape[1], np.bool_)
    at = np.searchsorted(run[0], members[0])
    while True:
        within = np.minimum(at, run.shape[1] - 1)
        same = (at < run.shape[1]) & (run[0, within] == members[0]) & ~found
        found |= same & (run[1, within] == members[1])
        if not (same & ~found).any():
            return found
        at = at + (same & ~found)
