"""Streams whose result shows neither the number of threads nor the size of the blocks they came in."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tasks.tables.arrow import BATCH_BYTES, BATCH_ROWS, one_batch, text_bytes

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(work: Callable[[T], R], items: Iterable[T], *, threads: int = 0, waiting: int = 0) -> Generator[R]:
    """As `map`, in order, by as many threads as there are cores, or as are named; a bounded number of items is under way.

    One more thread draws the items, one ahead, so that reading and working overlap. No item is None. With more items `waiting`
    no thread stands still while the results are late to be taken.

    >>> list(in_order(abs, [-1, 2, -3]))
    [1, 2, 3]
    """
    threads, drawn = threads or cores(), iter(items)
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as reader:
        begun, ahead = deque[Future[R]](), reader.submit(next, drawn, None)
        try:
            while (item := ahead.result()) is not None:
                ahead = reader.submit(next, drawn, None)
                begun.append(pool.submit(work, item))
                if len(begun) > threads + waiting:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()


def fixed_batches(
    tables: Iterable[pa.Table], max_rows: int = BATCH_ROWS, max_bytes: int = BATCH_BYTES
) -> Iterator[pa.RecordBatch]:
    """The rows of tables of strings in batches that depend on nothing but the rows.

    >>> import pyarrow as pa
    >>> tables = [pa.table({"title": ["a"]}), pa.table({"title": ["b", "c", "long"]})]
    >>> [batch["title"].to_pylist() for batch in fixed_batches(tables, max_rows=2)]
    [['a', 'b'], ['c', 'long']]
    >>> [batch["title"].to_pylist() for batch in fixed_batches(tables, max_bytes=3)]
    [['a', 'b', 'c'], ['long']]
    """
    pending: list[pa.Table] = []
    rows, size = 0, 0
    for table in tables:
        ends, start = np.cumsum(text_bytes(table, *table.column_names)), 0
        while start < table.num_rows:
            before = int(ends[start - 1]) if start else 0
            filled = int(np.searchsorted(ends, before + max_bytes - size)) + 1
            end = min(start + max_rows - rows, filled, table.num_rows)
            pending.append(table.slice(start, end - start))
            rows, size, start = rows + end - start, size + int(ends[end - 1]) - before, end
            if rows == max_rows or size >= max_bytes:
                yield _joined(pending)
                pending, rows, size = [], 0, 0
    if pending:
        yield _joined(pending)


def _joined(tables: list[pa.Table]) -> pa.RecordBatch:
    """One batch in buffers of its own: the writer would pad a lone slice with its neighbour's bytes."""
    import pyarrow as pa

    return one_batch(pa.concat_tables([*tables, tables[0].slice(0, 0)]))
