"""Streams keep their order and their bounds, and errors come through."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.tables.streams import fixed_batches, in_order


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_when_early(number: int) -> int:
        time.sleep((20 - number) / 2000)
        return -number

    assert list(in_order(slow_when_early, range(20))) == [-number for number in range(20)]


def test_no_more_items_are_drawn_than_are_under_way() -> None:
    drawn = list[int]()

    def items() -> Iterator[int]:
        for number in range(1000):
            drawn.append(number)
            yield number

    results = in_order(abs, items())
    next(results)
    time.sleep(0.05)
    threads = threading.active_count()
    assert len(drawn) <= threads + 3
    results.close()
    assert threading.active_count() < threads


def test_so_many_threads_work_and_so_many_items_wait_as_are_named() -> None:
    at_work, begun, let_go = list[int](), threading.Barrier(3), threading.Event()

    def work(number: int) -> int:
        at_work.append(number)
        if number < 2:
            begun.wait(60)
            let_go.wait(60)
        return number

    drawn = list[int]()

    def items() -> Iterator[int]:
        for number in range(100):
            drawn.append(number)
            yield number

    results = in_order(work, items(), threads=2, waiting=3)
    taker = threading.Thread(target=lambda: next(results))
    taker.start()
    begun.wait(60)
    until = time.monotonic() + 60
    while len(drawn) < 7 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)  # in which no more are drawn
    assert (sorted(at_work), len(drawn)) == ([0, 1], 7)
    let_go.set()
    taker.join(60)
    assert list(results) == list(range(1, 100))


def test_error_in_the_work_ends_the_stream() -> None:
    def fail_at_three(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    results = in_order(fail_at_three, range(100))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_error_among_the_items_ends_the_stream() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(in_order(abs, items()))


ROWS = st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), max_size=30)


@given(ROWS, st.data(), st.integers(1, 7), st.integers(1, 40))
def test_batches_depend_on_the_rows_alone(
    rows: list[tuple[str, str]], data: st.DataObject, max_rows: int, max_bytes: int
) -> None:
    schema = pa.schema({"title": pa.string(), "content": pa.string()})
    table = pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=5)))
    parts = [table.slice(start, end - start) for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    batches = list(fixed_batches(parts, max_rows, max_bytes))
    assert [tuple(row.values()) for batch in batches for row in batch.to_pylist()] == rows
    whole = fixed_batches([table], max_rows, max_bytes)
    assert [batch.serialize().to_pybytes() for batch in batches] == [batch.serialize().to_pybytes() for batch in whole]
    for batch in batches:
        sizes = [len(title.encode()) + len(content.encode()) for title, content in zip(*batch.to_pydict().values(), strict=True)]
        assert batch.num_rows <= max_rows
        assert sum(sizes[:-1]) < max_bytes
