"""How far a stage has come: a bar on a terminal, and now and then a line in the log, with rows a second and the time left."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

REPORT_SECONDS = 5.0
"""Between two lines in the log."""

Tell = Callable[[int, float], None]
"""Takes the rows so far, and the share of all work that they are."""


@contextmanager
def metered(stage: str, unit: str = "rows") -> Generator[Tell]:
    """What is told in the block is shown on a terminal and logged every few seconds."""
    started = reported = time.monotonic()
    with _shown(stage) as show:

        def tell(rows: int, share: float) -> None:
            nonlocal reported
            now = time.monotonic()
            seconds = max(now - started, 1e-6)
            speed = f"{rows:,} {unit}, {rows / seconds:,.0f} a second"
            show(speed, share)
            if now - reported > REPORT_SECONDS:
                reported = now
                logger.info("%s: %s, %.0f s left", stage, speed, seconds / max(share, 1e-6) - seconds)

        yield tell


@contextmanager
def _shown(stage: str) -> Generator[Callable[[str, float], None]]:
    """Shows a line and a share as a bar, where standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _line, _share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(stage), BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda line, share: bar.update(task, description=line, completed=share)


def counted(stage: str, batches: Iterable[pa.RecordBatch], total: int) -> Iterator[pa.RecordBatch]:
    """The batches, told of as they pass; `total` is how many rows there will be."""
    rows = 0
    with metered(stage) as tell:
        for batch in batches:
            yield batch
            rows += batch.num_rows
            tell(rows, rows / max(total, 1))


__all__ = ["REPORT_SECONDS", "Tell", "counted", "metered"]
