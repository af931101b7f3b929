"""How unlike the work of processes that share a step of packs is, before and after rows have changed places; and what that costs.

    python -m tests.bench.bench_evening PACKS_ARROW

Work is the squares of rows' lengths, to which attention's time is proportional. A pack a process, steps drawn at random.
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


def over_mean(shares: Any, lengths: Any) -> float:
    """How much more the busiest process has to do than the mean, as a share of that."""
    work = [sum(int((lengths[pack] ** 2).sum()) for pack in share) for share in shares]
    return max(work) / statistics.mean(work) - 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
