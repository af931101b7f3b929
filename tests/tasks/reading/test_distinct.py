"""The set of hashes answers as a Python set does, in memory and on disk."""

from __future__ import annotations

from pathlib import Path
from tempfile import gettempdir

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tasks.reading.distinct import Distinct

FEW = st.integers(0, 3).map(lambda number: number << 62) | st.integers(0, 2**64 - 1)
"""Upper halves that are often equal."""
BATCHES = st.lists(st.lists(st.tuples(FEW, st.integers(0, 3)), max_size=12), max_size=12)


def by_python(batches: list[list[tuple[int, int]]]) -> list[list[bool]]:
    seen, told = set[tuple[int, int]](), list[list[bool]]()
    for batch in batches:
        told.append([])
        for member in batch:
            told[-1].append(member not in seen)
            seen.add(member)
    return told


def by_us(batches: list[list[tuple[int, int]]], spill_members: int) -> list[list[bool]]:
    seen = Distinct(Path(gettempdir()), spill_members)
    return [seen.add(np.array(batch, np.uint64).reshape(-1, 2).T).tolist() for batch in batches]


@given(BATCHES, st.sampled_from([1, 8, 2**20]))
def test_distinct_answers_as_a_set(batches: list[list[tuple[int, int]]], spill_members: int) -> None:
    assert by_us(batches, spill_members) == by_python(batches)


def test_many_members_spill_to_files_without_a_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, (2, 50_000), np.uint64)
    seen = Distinct(tmp_path, spill_members=1000)
    assert all(seen.add(part).all() for part in np.split(hashes, 50, axis=1))
    assert not seen.add(hashes[:, ::-1]).any()
    assert not list(tmp_path.iterdir())
