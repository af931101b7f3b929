"""How unlike the work of processes that share a step of packs is, before and after rows have changed places; and what that costs.

    python -m tests.bench.bench_evening PACKS_ARROW

Work is the squares of rows' lengths, to which attention's time is proportional. A pack a process, steps drawn at random. Last,
what a process takes for its whole micro-batch: to deal the step, exchange rows, read them, and lay them out for a GPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tasks.tables.arrow import read_table
from tasks.training.parallel.evening import Room, even_out

PROCESSES = (2, 4, 8)
LAID_OUT = (1, *PROCESSES)
STEPS = 100


def main(packs: Path) -> None:
    lists = read_table(packs)["seq_lengths"].to_pylist()
    lengths, ends = np.concatenate(lists).astype(np.int64), np.cumsum([len(rows) for rows in lists])
    numbered = np.split(np.arange(ends[-1]), ends[:-1])
    room = Room(max(map(sum, lists)), max(map(len, lists)))
    print(f"{len(lists)} packs, squares of a pack's rows {(lengths**2).sum() / len(lists):,.0f} in the mean")
    random = np.random.default_rng(0)
    for processes in PROCESSES:
        before, after, seconds = list[float](), list[float](), list[float]()
        for _ in range(STEPS):
            shares = [[numbered[pack]] for pack in random.permutation(len(lists))[:processes]]
            began = time.perf_counter()
            evened = even_out(shares, lengths, room)
            seconds.append(time.perf_counter() - began)
            before.append(over_mean(shares, lengths))
            after.append(over_mean(evened, lengths))
        print(
            f"{processes} processes: the busiest over the mean {statistics.mean(before):.1%}, then {statistics.mean(after):.1%} "
            f"(median {statistics.median(after):.1%}); {1000 * statistics.mean(seconds):.1f} ms a step"
        )


def lay_out(packs: Path) -> None:
    """Print the time of a micro-batch."""
    from datasets import Dataset

    from tasks.training.fast.backend import gpu_collator, max_lengths
    from tasks.training.parallel.loader import CollateShare, MicroBatch, Shares

    rows: Any = Dataset.from_file(str(packs))
    collate = CollateShare(gpu_collator(max_lengths(rows), 1, packed=True), packed=True)
    random = np.random.default_rng(0)
    for processes in LAID_OUT:
        shares, seconds = Shares(rows, packed=True, batch_size=1, rank=0, ranks=processes), list[float]()
        for _ in range(STEPS):
            step = MicroBatch(tuple(random.permutation(len(rows))[:processes].tolist()), 0)
            began = time.perf_counter()
            collate([shares[step]])
            seconds.append(time.perf_counter() - began)
        print(f"{processes} processes: {1000 * statistics.median(seconds):.1f} ms to lay out a micro-batch, in the median")


def over_mean(shares: Any, lengths: Any) -> float:
    """How much more the busiest process has to do than the mean, as a share of that."""
    work = [sum(int((lengths[pack] ** 2).sum()) for pack in share) for share in shares]
    return max(work) / statistics.mean(work) - 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    lay_out(Path(sys.argv[1]))
