"""`amazon-ft bench data`: from product lines to token ids, our stages against the document's own code.

Both run as whole processes, in turn, on the same generated file (products.py), for one turn and for three turns a
conversation. A run counts from the start of its process to its end; ours begins with an empty AMAZON_FT_HOME.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from flows.bench.processes import module, run_process
from flows.bench.products import product_file, table_file
from flows.choices import Written
from tasks.caching.versions import package_versions
from tasks.refs import InputError, home
from tasks.tables.streams import cores

CONVERSATIONS = 100_000
"""As in the document."""
ROWS_A_CONVERSATION = 2.2
"""A smaller file has fewer conversations: rows without a title or content, and those for evaluation, leave so many."""
AS_WRITTEN = 3
"""Turns a conversation in the document."""
LIBRARIES = ("datasets", "numpy", "polars", "pyarrow", "tokenizers", "transformers", "unsloth")


@dataclass(frozen=True)
class Bench:
    """A measurement's input: product lines, tokenizer, recipe."""

    source: Path
    rows: int
    tokenizer: Path
    recipe: str

    @property
    def conversations(self) -> int:
        """How many are made of the rows."""
        return min(CONVERSATIONS, int(self.rows / ROWS_A_CONVERSATION))

    def command(self, side: str, turns: int, scratch: Path) -> list[str]:
        """The process that is measured."""
        arguments = (self.source, self.tokenizer, turns, self.conversations)
        if side == "ours":
            return module("flows.bench.ours", self.recipe, *arguments)
        return module("flows.bench.document", *arguments, scratch / "datasets")


@dataclass(frozen=True)
class Measured:
    """One whole process."""

    side: str
    """`ours` or `document`."""
    turns: int
    seconds: float
    cpu_seconds: float
    """Of all cores."""
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    steps: dict[str, float]
    """Seconds of each stage or step."""
    load: float
    """Processes that ran or waited to, mean of the minute before."""


def bench_data(
    rows: int,
    tokenizer: Path,
    recipe: str,
    *,
    sides: tuple[str, ...],
    turns: tuple[int, ...],
    repeats: int,
    console: Console,
    written: Written = Written.JSON_LINES,
) -> dict[str, Any]:
    """Measure and print; all numbers, with machine and versions.

    Raises:
        InputError: when the document's code is asked for and Unsloth is not installed, or another format than it reads.
    """
    if "document" in sides and written is not Written.JSON_LINES:
        raise InputError(f"bench data: --format {written}: got --against document; expected json, which is all that it reads.")
    if "document" in sides and find_spec("unsloth") is None:
        raise InputError("bench data: --against document: got no package unsloth; expected it. pip install unsloth unsloth_zoo")
    lines = product_file(rows, home() / "bench")
    source = lines if written is Written.JSON_LINES else table_file(lines, written.value)
    bench = Bench(source, rows, tokenizer.absolute(), recipe)
    measured = list[Measured]()
    for count, side in ((count, side) for count in turns for _ in range(repeats) for side in sides):
        measured.append(measure_data_side(bench, side, count))
        console.print(_line(measured[-1]), highlight=False)
    size = bench.source.stat().st_size
    console.print(data_table(measured, rows, size))
    return {
        "rows": rows,
        "conversations": bench.conversations,
        "format": written.value,
        "source_bytes": size,
        "recipe": recipe,
        "machine": machine(),
        "versions": dict.fromkeys(LIBRARIES, "not installed") | package_versions(LIBRARIES),
        "runs": [asdict(entry) for entry in measured],
        "ratio": data_speedups(measured),
        "ratio_to_document_as_written": data_speedups(measured, AS_WRITTEN),
    }


def measure_data_side(bench: Bench, side: str, turns: int) -> Measured:
    """One process, in a directory of its own that goes with it."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=bench.source.parent) as name:
        scratch = Path(name)
        cost = run_process(bench.command(side, turns, scratch), scratch, os.environ | {"AMAZON_FT_HOME": str(scratch / "home")})
    steps = json.loads(cost.output.splitlines()[-1])
    seconds = (round(cost.seconds, 2), round(cost.cpu_seconds, 2))
    return Measured(side, turns, *seconds, cost.peak_rss_bytes, cost.peak_anonymous_bytes, steps, round(load, 1))


def data_speedups(measured: list[Measured], document_turns: int | None = None) -> dict[str, float]:
    """{turns: how many times as fast as the document's code}, of the medians.

    The document's code makes conversations of as many turns as ours, or always of `document_turns`.

    >>> runs = [Measured("ours", 1, 2.0, 0, 0, 0, {}, 0), Measured("document", 1, 9.0, 0, 0, 0, {}, 0)]
    >>> data_speedups(runs), data_speedups(runs, 3)
    ({'1': 4.5}, {})
    """
    found = dict[str, float]()
    for turns in sorted({entry.turns for entry in measured}):
        ours, document = _seconds(measured, "ours", turns), _seconds(measured, "document", document_turns or turns)
        if ours and document:
            found[str(turns)] = round(statistics.median(document) / statistics.median(ours), 2)
    return found


def _seconds(measured: list[Measured], side: str, turns: int) -> list[float]:
    return [entry.seconds for entry in measured if (entry.side, entry.turns) == (side, turns)]


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system and Python of this machine."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    return {
        "processor": model or platform.machine(),
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _line(entry: Measured) -> str:
    steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in entry.steps.items())
    took = f"{entry.seconds:.1f} s, {entry.cpu_seconds:.1f} s of all cores"
    return f"{entry.side}, {entry.turns} turn{'s' * (entry.turns > 1)}: {took} ({steps})"


def data_table(measured: list[Measured], rows: int, size: int) -> Table:
    """A row for each side and number of turns: seconds, speed, memory, and how many times as fast as the document."""
    compared = {"document / ours": data_speedups(measured), "as written / ours": data_speedups(measured, AS_WRITTEN)}
    shown = {name: found for name, found in compared.items() if found}
    table = Table("", "turns", "s", "rows/s", "MB/s", "RSS", "anonymous", *shown, box=None, pad_edge=False, collapse_padding=True)
    for side, turns in dict.fromkeys((entry.side, entry.turns) for entry in measured):
        entries = [entry for entry in measured if (entry.side, entry.turns) == (side, turns)]
        seconds = statistics.median(_seconds(measured, side, turns))
        peaks = (max(entry.peak_rss_bytes for entry in entries), max(entry.peak_anonymous_bytes for entry in entries))
        speed = (f"{seconds:.1f}", f"{rows / seconds:,.0f}", f"{size / seconds / 1e6:.0f}")
        times = (str(found[str(turns)]) if side == "ours" else "" for found in shown.values())
        table.add_row(side, str(turns), *speed, *(f"{peak / 1e9:.2f} GB" for peak in peaks), *times)
    return table
