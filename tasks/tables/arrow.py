"""Arrow files: read them mapped into memory, write them batch by batch, gather rows from anywhere in them.

Memory is bounded by `BATCH_ROWS` and `BATCH_BYTES`, not by the file: what `read_table` returns are pages of the file itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.caching.files import followed

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 4096
BATCH_BYTES = 32 * 2**20
"""Rows, and bytes of text, made, held and written at a time: a batch ends with the row that reaches either."""

MOST_SLICES = 256
"""More of them take longer than a copy."""

Rows = NDArray[np.integer]


def is_conversations(schema: pa.Schema) -> bool:
    """Whether a table holds conversations (tasks/reading/conversations.py) and not products."""
    return "prompts" in schema.names


def read_table(path: Path) -> pa.Table:
    """An Arrow IPC stream, mapped into memory."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        return stream.read_all()


def write_table(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write batches as an Arrow IPC stream that is digested meanwhile; how many rows they had."""
    import pyarrow as pa

    with followed(path):
        rows = write_scratch(path, schema, batches)
    pa.default_memory_pool().release_unused()  # else Arrow keeps what the batches took
    return rows


def write_scratch(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """As `write_table`, but of no artifact: without a digest. A batch is written while the next one is made."""
    import pyarrow as pa

    rows, written = 0, Future[None]()
    written.set_result(None)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer, ThreadPoolExecutor(1) as pool:
        for batch in batches:
            written.result()
            written = pool.submit(writer.write_batch, batch)
            rows += batch.num_rows
        written.result()
    return rows


def batch_ranges(rows: int, size: int = BATCH_ROWS) -> Iterator[tuple[int, int]]:
    """(start, end) of the batches of so many rows.

    >>> list(batch_ranges(5, 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    return pairwise([*range(0, rows, size), rows])


def bounded_ranges(
    sizes: NDArray[np.int64], *, max_rows: int = BATCH_ROWS, max_bytes: int = BATCH_BYTES
) -> Iterator[tuple[int, int]]:
    """(start, end) of the batches of rows with so many bytes each.

    >>> list(bounded_ranges(np.array([1, 1, 9, 1]), max_rows=3, max_bytes=8))
    [(0, 3), (3, 4)]
    """
    ends, start = np.cumsum(sizes), 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        filled = int(np.searchsorted(ends, before + max_bytes)) + 1
        end = min(start + max_rows, filled, len(ends))
        yield start, end
        start = end


def text_bytes(table: pa.Table, *columns: str) -> NDArray[np.int64]:
    """How many bytes of text each row has in these columns.

    >>> import pyarrow as pa
    >>> text_bytes(pa.table({"title": ["a", None], "content": ["é", "bc"]}), "title", "content").tolist()
    [3, 2]
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    def lengths(column: pa.ChunkedArray) -> NDArray[np.int64]:
        return _list_bytes(column) if pa.types.is_list(column.type) else pc.fill_null(pc.binary_length(column), 0).to_numpy()

    return np.array([lengths(table[name]) for name in columns], np.int64).sum(axis=0)


def _list_bytes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Bytes of text in each list, none of which is empty or null."""
    import pyarrow.compute as pc

    if not len(column):
        return np.zeros(0, np.int64)
    starts = np.cumsum(np.concatenate([[0], list_lengths(column)]))[:-1]
    return np.add.reduceat(pc.binary_length(pc.list_flatten(column)).to_numpy().astype(np.int64), starts)


def list_sums(values: NDArray[np.int64], lists: pa.ChunkedArray) -> NDArray[np.int64]:
    """For each list of row numbers, none of them empty, the sum of those rows' values.

    >>> import pyarrow as pa
    >>> list_sums(np.array([5, 7]), pa.chunked_array([[[0, 1], [1, 1]]])).tolist()
    [12, 14]
    """
    if not len(lists):
        return np.zeros(0, np.int64)
    rows = lists.combine_chunks().flatten().to_numpy()
    starts = np.cumsum(np.concatenate([[0], list_lengths(lists)]))[:-1]
    return np.add.reduceat(values[rows], starts)


def list_lengths(lists: pa.ChunkedArray) -> NDArray[np.int64]:
    """How many values each list has.

    >>> import pyarrow as pa
    >>> list_lengths(pa.chunked_array([[[5, 7]], [[], [9]]])).tolist()
    [2, 0, 1]
    """
    import pyarrow.compute as pc

    return pc.list_value_length(lists).to_numpy().astype(np.int64)


class Gather:
    """Takes rows of a table from anywhere in it, batch by batch: `Table.take` would join its chunks at each call."""

    def __init__(self, table: pa.Table) -> None:
        self._schema = table.schema
        self._batches = table.to_batches()
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])

    def __call__(self, rows: Rows) -> pa.RecordBatch:
        """The rows with these numbers, in this order, repeats allowed."""
        import pyarrow as pa

        batch_of = np.searchsorted(self._ends, rows, side="right")
        order = np.argsort(batch_of, kind="stable")
        cuts = np.searchsorted(batch_of[order], np.arange(len(self._batches) + 1))
        parts = [
            batch.take(pa.array(rows[order[start:end]] - (last - batch.num_rows)))
            for batch, last, (start, end) in zip(self._batches, self._ends, pairwise(cuts), strict=True)
            if end > start
        ]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return one_batch(pa.Table.from_batches(parts, self._schema)).take(pa.array(back))


def kept_rows(table: pa.Table, kept: NDArray[np.bool_]) -> pa.Table:
    """The rows that are kept; where few are not, as slices of the table, of which no copy is made.

    >>> import pyarrow as pa
    >>> kept_rows(pa.table({"title": ["a", "b", "c"]}), np.array([True, False, True]))["title"].to_pylist()
    ['a', 'c']
    """
    import pyarrow as pa

    edges = np.flatnonzero(np.diff(kept, prepend=False, append=False)).reshape(-1, 2)
    if len(edges) > MOST_SLICES or not len(edges):
        return table.filter(pa.array(kept))
    return pa.concat_tables([table.slice(start, end - start) for start, end in edges.tolist()])


def one_batch(table: pa.Table) -> pa.RecordBatch:
    """A table as a single record batch."""
    import pyarrow as pa

    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def row_lists(values: pa.Array, width: int) -> pa.ListArray:
    """A flat array as lists of `width` values each.

    >>> import pyarrow as pa
    >>> row_lists(pa.array([1, 2, 3, 4]), 2).to_pylist()
    [[1, 2], [3, 4]]
    """
    import pyarrow as pa

    offsets = np.arange(0, len(values) + 1, width, dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, values)
