"""Stretches of a plain file: whole lines that whoever parses them reads for himself, in whatever process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from tasks.reading.files.formats import BOM
from tasks.reading.rows import LineBlock

PIECE_BYTES = 2**16
"""Read at a time to find a line break."""
STRETCH_BLOCKS = 1.5
"""A stretch is so many blocks long, that what is done once for each takes less of the time."""
MOST_BYTES = 2**30
"""Of a stretch but for its last line, however long a block is."""


class Stretch(NamedTuple):
    """Whole lines of a file, yet to be read."""

    path: str
    start: int
    size: int
    line_bytes: int = 0
    """Set when it is only the start of one line that is this long."""


def cut_stretches(file: IO[bytes], path: Path, block_bytes: int, max_line_bytes: int) -> Iterator[Stretch]:
    """The stretches of a file; a line longer than both limits is cut short and alone in its stretch."""
    end = os.fstat(file.fileno()).st_size
    file.seek(0)
    start = len(BOM) if file.read(len(BOM)) == BOM else 0
    while start < end:
        about = start + min(int(STRETCH_BLOCKS * block_bytes), MOST_BYTES)
        cut = end if about >= end else _line_end(file, about, min(about + max_line_bytes + 1, end))
        if cut is None and about + max_line_bytes >= end:
            cut = end
        if cut is None:
            line = _line_start(file, start, about)
            if line > start:
                yield Stretch(str(path), start, line - start)
            start, cut = line, _line_end(file, about, end) or end + 1
            yield Stretch(str(path), start, max_line_bytes, cut - 1 - start)
        else:
            yield Stretch(str(path), start, cut - start)
        start = cut


def _line_end(file: IO[bytes], start: int, end: int) -> int | None:
    """Where the line ends that a place lies in, behind its break; None if that is no sooner than `end`."""
    file.seek(start)
    for at in range(start, end, PIECE_BYTES):
        found = file.read(min(PIECE_BYTES, end - at)).find(b"\n")
        if found >= 0:
            return at + found + 1
    return None


def _line_start(file: IO[bytes], start: int, end: int) -> int:
    """Where the line begins that the bytes from a line's start on end with."""
    file.seek(start)
    return start + file.read(end - start).rfind(b"\n") + 1


def read_stretch(stretch: Stretch) -> LineBlock:
    """Read a stretch; its lines are numbered from 1."""
    with Path(stretch.path).open("rb") as file:
        file.seek(stretch.start)
        return LineBlock(file.read(stretch.size), 1, stretch.line_bytes)
