"""Which process takes which rows of a step: every row once, and as even a load as can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ATTENTION_TOKENS = 5_000
"""A row of so many tokens costs as much in attention as in all else, and attention grows with the square of its length.
Llama-3-8B in fp8 on an H100: 36 of 312 ms for 8,192 tokens whose rows' squares add up to 5.4 million (tests/bench/LOG.md)."""


class Idle(dict[str, Any]):
    """A micro-batch that nothing is learnt from, for a process that a step has no rows left for."""


def row_costs(table: Any) -> list[float]:
    """The work that each row of tokens.arrow, or each pack of packs.arrow, is, in tokens.

    >>> import pyarrow as pa
    >>> row_costs(pa.table({"input_ids": [[1] * 3000, [1] * 1000], "seq_lengths": [[1000, 2000], [1000]]}))
    [4000.0, 1200.0]
    """
    import numpy as np
    import pyarrow.compute as pc

    def lengths(name: str) -> Any:
        return pc.list_value_length(table[name]).to_numpy().astype(np.float64)

    if "seq_lengths" not in table.column_names:
        return (lengths("input_ids") + lengths("input_ids") ** 2 / ATTENTION_TOKENS).tolist()
    starts = np.cumsum(lengths("seq_lengths")) - lengths("seq_lengths")
    squares = pc.list_flatten(table["seq_lengths"]).to_numpy().astype(np.float64) ** 2
    return (lengths("input_ids") + np.add.reduceat(squares, starts.astype(np.int64)) / ATTENTION_TOKENS).tolist()


def micro_steps(rows: int, batch_size: int, ranks: int) -> int:
    """Micro-batches of each process in a step of so many rows: the same for all, and as few as can be.

    >>> micro_steps(8, 2, 3), micro_steps(8, 2, 4), micro_steps(1, 2, 4)
    (2, 1, 1)
    """
    return -(-rows // (batch_size * ranks))


def deal(rows: Sequence[int], costs: Sequence[float], batch_size: int, ranks: int) -> list[list[list[int]]]:
    """For each process its micro-batches of a step's rows, rows of a like cost together; empty ones where rows run out.

    The costliest row first, each to the process with the least so far that has room (Graham 1969, LPT).

    >>> deal([3, 0, 1, 2], [9.0, 2.0, 3.0, 3.0], 2, 2), deal([0], [9.0], 2, 2)
    ([[[0, 1]], [[3, 2]]], [[[0]], [[]]])
    """
    steps = micro_steps(len(rows), batch_size, ranks)
    taken: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for row in sorted(rows, key=lambda row: -costs[row]):
        rank = min((rank for rank in range(ranks) if len(taken[rank]) < steps * batch_size), key=lambda rank: loads[rank])
        taken[rank].append(row)
        loads[rank] += costs[row]
    return [[share[step * batch_size : (step + 1) * batch_size] for step in range(steps)] for share in taken]
