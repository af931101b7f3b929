"""Arrow files are read as they were written, and rows are gathered from anywhere in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from tasks.tables.arrow import Gather, batch_ranges, bounded_ranges, one_batch, read_table, row_lists, write_table

SCHEMA = pa.schema({"uid": pa.string(), "number": pa.int64()})


def batches_of(*sizes: int) -> list[pa.RecordBatch]:
    """Batches of so many rows, numbered through."""
    ends = np.cumsum([0, *sizes])
    return [
        pa.RecordBatch.from_pylist([{"uid": f"u{number}", "number": number} for number in range(end - size, end)], SCHEMA)
        for size, end in zip(sizes, ends[1:].tolist(), strict=True)
    ]


@pytest.mark.parametrize("sizes", [(), (0,), (3,), (2, 0, 3)])
def test_a_table_is_read_as_it_was_written(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    assert write_table(tmp_path / "rows.arrow", SCHEMA, batches_of(*sizes)) == sum(sizes)
    table = read_table(tmp_path / "rows.arrow")
    assert table.schema == SCHEMA
    assert table.to_pylist() == [row for batch in batches_of(*sizes) for row in batch.to_pylist()]


def test_a_written_table_opens_as_a_dataset_mapped_into_memory(tmp_path: Path) -> None:
    write_table(tmp_path / "rows.arrow", SCHEMA, batches_of(2, 3))
    dataset = Dataset.from_file(str(tmp_path / "rows.arrow"))
    assert dataset.cache_files
    assert dataset[4] == {"uid": "u4", "number": 4}


def test_reading_maps_the_file_instead_of_copying_it(tmp_path: Path) -> None:
    values = pa.RecordBatch.from_arrays([pa.array(np.arange(1_000_000))], ["number"])
    write_table(tmp_path / "rows.arrow", values.schema, [values])
    before = pa.total_allocated_bytes()
    table = read_table(tmp_path / "rows.arrow")
    assert pa.total_allocated_bytes() - before < 100_000
    assert table.num_rows == 1_000_000


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5), data=st.data())
def test_gathered_rows_are_those_asked_for_in_their_order(sizes: list[int], data: st.DataObject) -> None:
    table = pa.Table.from_batches(batches_of(*sizes), SCHEMA)
    last = table.num_rows - 1
    rows = data.draw(st.lists(st.integers(0, last), max_size=12)) if last >= 0 else []
    gathered = Gather(table)(np.array(rows, np.int64))
    assert gathered.schema == SCHEMA
    assert gathered["number"].to_pylist() == rows
    assert gathered["uid"].to_pylist() == [f"u{row}" for row in rows]


@given(rows=st.integers(0, 100), size=st.integers(1, 20))
def test_ranges_cover_every_row_once(rows: int, size: int) -> None:
    ranges = list(batch_ranges(rows, size))
    assert [row for start, end in ranges for row in range(start, end)] == list(range(rows))
    assert all(0 < end - start <= size for start, end in ranges)


@given(sizes=st.lists(st.integers(0, 50), max_size=40), max_rows=st.integers(1, 10), max_bytes=st.integers(1, 100))
def test_bounded_ranges_end_with_the_row_that_reaches_a_limit(sizes: list[int], max_rows: int, max_bytes: int) -> None:
    ranges = list(bounded_ranges(np.array(sizes, np.int64), max_rows=max_rows, max_bytes=max_bytes))
    assert [row for start, end in ranges for row in range(start, end)] == list(range(len(sizes)))
    for start, end in ranges:
        assert end - start <= max_rows
        assert sum(sizes[start : end - 1]) < max_bytes
        assert end == len(sizes) or end - start == max_rows or sum(sizes[start:end]) >= max_bytes


def test_a_table_of_many_batches_becomes_one() -> None:
    table = pa.Table.from_batches(batches_of(1, 2), SCHEMA)
    assert one_batch(table).to_pylist() == table.to_pylist()
    assert one_batch(table.slice(0, 0)).num_rows == 0


def test_lists_of_equal_width() -> None:
    assert row_lists(pa.array(range(6)), 3).to_pylist() == [[0, 1, 2], [3, 4, 5]]
