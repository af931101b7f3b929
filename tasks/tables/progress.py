"""How far a stage has come: told to the run's observers, and now and then in the log, with rows a second and the time left."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tasks.caching.context import tell
from tasks.caching.events import RowsPassed

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

REPORT_SECONDS = 5.0
"""Between two lines in the log."""

Meter = Callable[[int, float], None]
"""Takes the rows so far, and the share of all work that they are."""


@contextmanager
def metered(stage: str, unit: str = "rows") -> Generator[Meter]:
    """Tell observers of what is counted in the block, and log it every few seconds."""
    started = reported = time.monotonic()

    def count(rows: int, share: float) -> None:
        nonlocal reported
        now = time.monotonic()
        seconds = max(now - started, 1e-6)
        speed = f"{rows:,} {unit}, {rows / seconds:,.0f} a second"
        tell(RowsPassed(stage, speed, share))
        if now - reported > REPORT_SECONDS:
            reported = now
            logger.info("%s: %s, %.0f s left", stage, speed, seconds / max(share, 1e-6) - seconds)

    yield count


def counted(stage: str, batches: Iterable[pa.RecordBatch], total: int) -> Iterator[pa.RecordBatch]:
    """The batches, told of as they pass; `total` is how many rows there will be."""
    rows = 0
    with metered(stage) as count:
        for batch in batches:
            yield batch
            rows += batch.num_rows
            count(rows, rows / max(total, 1))
