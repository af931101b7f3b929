"""Stretches parsed and cleaned by other processes beside this one, so that no two wait for one lock of Python's.

A process takes its task, then a stretch a line, on its standard input. It tells which code it runs; then it answers each stretch
with a line of JSON and, unless that is null, an Arrow IPC stream. It ends with its input, however the one that began it ended.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Lock
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from tasks.caching.code.loading import imported_code, is_as_read, process_of
from tasks.config import IngestConfig
from tasks.reading.cleaning import clean_rows
from tasks.reading.columns import Wanted
from tasks.reading.decoding import LineDecoder
from tasks.reading.distinct import Hashes
from tasks.reading.files.stretches import Stretch, read_stretch
from tasks.refs import Value

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

MOST_PROCESSES = 4
"""More of them make rows faster than one process puts them in order and writes them."""
PIPE_BYTES = 2**20
"""As much as Linux lets anyone ask for, so that an answer takes few turns. Source: pipe(7), /proc/sys/fs/pipe-max-size."""
ALONE = {"OPENBLAS_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
"""Environment of a process that leaves the other cores to others."""

_begun = list[subprocess.Popen[bytes]]()
"""Without a task yet, for the next crew."""


class Task(Value):
    """The settings of a process, the same for all its stretches."""

    config: IngestConfig
    wanted: dict[str, str]


class CleanLines(NamedTuple):
    """The rows of a stretch in which every line is a well-formed product, as CleanRows."""

    table: pa.Table
    hashes: Hashes
    dropped: dict[str, int]
    lines: int


class Cleaner:
    """Parses and cleans stretches, with what is made once for all of them."""

    def __init__(self, config: IngestConfig, wanted: Wanted) -> None:
        self._config = config
        self._decoder = LineDecoder(wanted)

    def clean(self, stretch: Stretch) -> CleanLines | None:
        """The rows of a stretch; None when a line is, or may be, anything but one well-formed product."""
        frame = self._decoder.read(read_stretch(stretch), self._config.max_line_bytes)
        return None if frame is None else CleanLines(*clean_rows(frame, self._config), frame.height)


class CleanerApart:
    """A Cleaner in another process."""

    def __init__(self, process: subprocess.Popen[bytes], task: Task) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self._asked, self._told = process.stdin.fileno(), process.stdout
        self._is_known = False
        with suppress(BrokenPipeError):  # the first stretch will tell
            os.write(self._asked, task.model_dump_json().encode() + b"\n")

    def clean(self, stretch: Stretch) -> CleanLines | None:
        """As Cleaner.

        Raises:
            ChildProcessError: when the process has ended, or runs other code.
        """
        try:
            os.write(self._asked, json.dumps(stretch).encode() + b"\n")
            self._is_known = self._is_known or is_as_read(json.loads(self._told.readline()))
            cleaned = read_answer(self._told) if self._is_known else None
        except (OSError, ValueError, AttributeError) as error:
            self.process.kill()
            raise ChildProcessError(f"ended with exit code {self.process.wait()}") from error
        if not self._is_known:
            raise ChildProcessError("runs code that was edited since this one was started")
        return cleaned


class Crew:
    """Cleans each stretch by another process that has nothing to do, else in this one."""

    def __init__(self, cleaner: Cleaner, others: Iterable[CleanerApart]) -> None:
        self._cleaner = cleaner
        self._idle = SimpleQueue[CleanerApart]()
        self._untold = Lock()
        for other in others:
            self._idle.put(other)

    def clean(self, stretch: Stretch) -> CleanLines | None:
        """As Cleaner; what a process that ends leaves undone is done in this one."""
        try:
            other = self._idle.get_nowait()
        except Empty:
            return self._cleaner.clean(stretch)
        try:
            cleaned = other.clean(stretch)
        except ChildProcessError as error:
            if self._untold.acquire(blocking=False):  # once
                logger.warning("ingest: a process that cleans rows %s; its part is done in this one", error)
            return self._cleaner.clean(stretch)
        self._idle.put(other)
        return cleaned


def begin_ahead(processes: int) -> None:
    """Begin so many processes for the next crew, so that their libraries are loaded when its task is known."""
    _begun.extend([_begin() for _ in range(processes - len(_begun))])


def end_begun() -> None:
    """End those that no crew has taken over."""
    while _begun:
        _end(_begun.pop())


@contextmanager
def crew_of(processes: int, config: IngestConfig, wanted: Wanted) -> Generator[Crew]:
    """A crew of this process and so many others, which end with the block."""
    task = Task(config=config, wanted=dict(wanted))
    with ExitStack() as stack:
        others = list[CleanerApart]()
        for _ in range(processes):
            process = _take_begun() or _begin()
            stack.callback(_end, process)
            others.append(CleanerApart(process, task))
        yield Crew(Cleaner(config, wanted), others)


def _take_begun() -> subprocess.Popen[bytes] | None:
    """One that lives, if there is any."""
    while True:
        try:
            process = _begun.pop()
        except IndexError:
            return None
        if process.poll() is None:
            return process
        _end(process)


def _begin() -> subprocess.Popen[bytes]:
    command, environment = process_of(__name__, answer_all.__name__)
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment | ALONE
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    with process:
        process.kill()


def read_answer(file: IO[bytes]) -> CleanLines | None:
    """Read what `write_answer` wrote.

    Raises:
        ValueError: when that is cut short.
    """
    import pyarrow as pa

    told = json.loads(file.readline())
    if told is None:
        return None
    with pa.ipc.open_stream(pa.PythonFile(file, "r")) as stream:
        table = stream.read_all()
    texts = table.num_columns - 2
    if table.num_rows + sum(told["dropped"].values()) != told["lines"]:
        raise ValueError("cut short")
    hashes = np.stack([table.column(texts + half).to_numpy() for half in range(2)])
    return CleanLines(table.select(range(texts)), hashes, told["dropped"], told["lines"])


def write_answer(file: IO[bytes], cleaned: CleanLines | None) -> None:
    """Write counts, then a table with the halves of the hashes as further columns."""
    import pyarrow as pa

    told = cleaned and {"lines": cleaned.lines, "dropped": cleaned.dropped}
    file.write(json.dumps(told).encode() + b"\n")
    if cleaned is not None:
        table: pa.Table = cleaned.table
        for half in cleaned.hashes:
            table = table.append_column("", pa.array(half))
        with pa.ipc.new_stream(pa.PythonFile(file, "w"), table.schema) as stream:
            stream.write_table(table)
    file.flush()


def answer_all() -> None:
    """Answer on the standard output until there are no more questions on the standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all of its processes
    asked, told = sys.stdin.buffer, sys.stdout.buffer
    with suppress(OSError):  # a user who has asked for too much already
        fcntl.fcntl(told.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    with suppress(BrokenPipeError):  # whoever asked has ended
        task = Task.model_validate_json(asked.readline())
        cleaner = Cleaner(task.config, task.wanted)
        told.write(json.dumps(imported_code()).encode() + b"\n")
        for line in asked:
            write_answer(told, cleaner.clean(Stretch(*json.loads(line))))
