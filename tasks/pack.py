"""Rows to packs: as few sequences of a fixed length as possible, each made of whole rows.

    rows of 5, 4, 3, 3 tokens, packs of 8      ->     [5, 3], [4, 3]

`seq_lengths` says where rows begin and end, so that attention stays inside them; a row's first token is never learnt, for
its prediction would come from another row. Best fit, longest rows first; within a pack, and among packs, rows keep the order
that they came in, as far as that is possible.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.caching.stage import stage
from tasks.caching.store import publish
from tasks.config import PackConfig
from tasks.refs import Artifact, InputError
from tasks.tables.arrow import Gather, Rows, list_lengths, read_table, write_table

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of what is not learnt; torch's cross entropy leaves it out."""
BATCH_TOKENS = 1 << 21
"""Tokens gathered and written at a time."""


def fit_best(lengths: NDArray[np.integer], capacity: int) -> NDArray[np.int64]:
    """The pack of each row: longest rows first, each where the least room is left over.

    Room is looked up in one integer whose bit r says that a pack with room for r tokens is open: O(rows) in practice.

    >>> fit_best(np.array([5, 4, 3, 3]), 8).tolist()
    [0, 1, 0, 1]
    """
    packs = np.empty(len(lengths), np.int64)
    open_packs: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    count = 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = open_packs[room].pop()
            rooms ^= (not open_packs[room]) << room
        else:
            room, pack = capacity, count
            count += 1
        packs[row] = pack
        open_packs[room - length].append(pack)
        rooms |= 1 << (room - length)
    return packs


def order_packs(packs: NDArray[np.int64]) -> tuple[Rows, NDArray[np.int64]]:
    """Row numbers pack by pack, and where each pack begins and ends among them; packs follow their first rows.

    >>> order, bounds = order_packs(np.array([1, 0, 1, 0]))
    >>> order.tolist(), bounds.tolist()
    ([0, 2, 1, 3], [0, 2, 4])
    """
    _, first, inverse = np.unique(packs, return_index=True, return_inverse=True)
    leader = first[inverse]
    order = np.argsort(leader, kind="stable")
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(leader[order])) + 1, [len(packs)]])
    return order, np.unique(bounds)


def utilisation(lengths: NDArray[np.integer], packs: int, capacity: int) -> float:
    """The share of all packs' tokens that rows fill."""
    return float(lengths.sum()) / max(packs * capacity, 1)


def join_rows(rows: pa.RecordBatch, bounds: NDArray[np.int64]) -> pa.RecordBatch:
    """Rows of tokens.arrow, pack by pack, as packs; `bounds` are the packs' first rows and the end.

    >>> import pyarrow as pa
    >>> rows = pa.RecordBatch.from_pydict({"uids": [["a"], ["b"]], "input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 4]]})
    >>> join_rows(rows, np.array([0, 2])).to_pylist()
    [{'uids': ['a', 'b'], 'input_ids': [1, 2, 3, 4], 'labels': [-100, 2, -100, 4], 'seq_lengths': [2, 2]}]
    """
    import pyarrow as pa

    def joined(column: pa.Array, values: pa.Array | None = None) -> pa.ListArray:
        offsets = column.offsets.to_numpy()
        ends = pa.array((offsets - offsets[0])[bounds], pa.int32())
        return pa.ListArray.from_arrays(ends, column.flatten() if values is None else values)

    starts = rows["input_ids"].offsets.to_numpy()
    labels = rows["labels"].flatten().to_numpy().copy()
    labels[(starts - starts[0])[:-1]] = IGNORED
    lengths = pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array(np.diff(starts), pa.int32()))
    columns = [joined(rows["uids"]), joined(rows["input_ids"]), joined(rows["labels"], pa.array(labels)), lengths]
    return pa.RecordBatch.from_arrays(columns, names=["uids", "input_ids", "labels", "seq_lengths"])


def _batches(table: pa.Table, order: Rows, bounds: NDArray[np.int64], step: int) -> Iterator[pa.RecordBatch]:
    gather = Gather(table)
    starts = [*range(0, len(bounds) - 1, step), len(bounds) - 1]
    for start, end in pairwise(starts):
        span = bounds[start : end + 1]
        yield join_rows(gather(order[span[0] : span[-1]]), span - span[0])


def _check_lengths(table: pa.Table, lengths: NDArray[np.int64], capacity: int) -> None:
    too_long = np.flatnonzero(lengths > capacity)
    if len(too_long):
        row = int(too_long[0])
        raise InputError(
            f"tokens.arrow row {row} (products {', '.join(table['uids'][row].as_py())}): too long: got {lengths[row]} tokens; "
            f"expected at most {capacity} (pack.tokens). Raise it, or lower tokenize.max_tokens."
        )


@stage(version=1)
def pack(tokens: Artifact, config: PackConfig) -> Artifact:
    """Packs of at most `config.tokens` tokens."""
    import pyarrow as pa

    table = read_table(tokens / "tokens.arrow")
    lengths = list_lengths(table["input_ids"])
    _check_lengths(table, lengths, config.tokens)
    order, bounds = order_packs(fit_best(lengths, config.tokens))
    batches = _batches(table, order, bounds, max(BATCH_TOKENS // config.tokens, 1))
    lists = [("uids", pa.string()), ("input_ids", pa.int32()), ("labels", pa.int32()), ("seq_lengths", pa.int32())]
    with publish("packs", need_bytes=tokens.size_bytes) as draft:
        draft.rows = write_table(draft / "packs.arrow", pa.schema([(name, pa.list_(kind)) for name, kind in lists]), batches)
    used = utilisation(lengths, draft.rows, config.tokens)
    logger.info(
        "pack: %s rows in %s packs of %s tokens, %.2f %% used", f"{len(lengths):,}", f"{draft.rows:,}", config.tokens, 100 * used
    )
    return draft.artifact
