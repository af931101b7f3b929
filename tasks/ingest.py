"""JSON lines to clean, distinct products in Arrow.

    {"uid": "7", "title": "Pan &amp; Lid", "content": "Cast iron.", ...}  ->  ("7", "Pan & Lid", "Cast iron.")

Blocks are parsed and cleaned by as many threads as there are cores and put back into their order (tasks/read.py, lines.py,
clean.py, stream.py, distinct.py). Every line is kept, dropped for a counted reason, or rejected.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from tasks.clean import clean, drop_empty, hash_texts
from tasks.config import IngestConfig
from tasks.distinct import Distinct, Hashes
from tasks.files import file_digest
from tasks.lines import Block, Reject, product_schema, read_block
from tasks.locate import locate_source
from tasks.progress import metered
from tasks.read import read_blocks
from tasks.refs import InputError, Products, Source
from tasks.stage import stage
from tasks.store import Draft, publish
from tasks.stream import fixed_batches, in_order
from tasks.tables import write_table

if TYPE_CHECKING:
    import pyarrow as pa

EXAMPLES = 3
"""So many bad lines are named when there are too many of them."""


class Piece(NamedTuple):
    """A block, and where it comes from."""

    file: str
    block: Block
    done: float
    """Share of all input that has been read."""


class Cleaned(NamedTuple):
    """What is left of a piece."""

    file: str
    done: float
    table: pa.Table
    hashes: Hashes
    lines: int
    dropped: Counter[str]
    rejects: list[Reject]


@dataclass
class Tally:
    """What became of the lines so far; rejects go to a file that is made for the first of them."""

    config: IngestConfig
    stack: ExitStack
    lines: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])
    rejected: int = 0
    examples: list[str] = field(default_factory=list[str])
    draft: Draft | None = None
    file: IO[str] | None = None

    def reject(self, file: str, reject: Reject) -> None:
        """Set a line aside.

        Raises:
            InputError: under the policy `fail`.
        """
        what = f"{file} line {reject.line}: {reject.reason}"
        if self.config.on_bad_row == "fail":
            raise InputError(f"{what}. Set ingest.on_bad_row=quarantine to set such rows aside.")
        if self.draft is None or self.file is None:
            self.draft = self.stack.enter_context(publish("rejects"))
            self.file = self.stack.enter_context((self.draft / "rejects.jsonl").open("w", encoding="utf-8"))
        self.rejected = self.draft.rows = self.rejected + 1
        self.examples += [what] if len(self.examples) < EXAMPLES else []
        json.dump(
            {"file": file, "line": reject.line, "reason": reject.reason} | _as_json(reject.raw), self.file, ensure_ascii=False
        )
        self.file.write("\n")

    def check(self, kept: int) -> None:
        """Make sure that enough is left.

        Raises:
            InputError: when too many lines were rejected, or nothing is left.
        """
        if self.rejected > self.config.max_bad_share * self.lines:
            raise InputError(
                f"ingest: bad lines: got {self.rejected:,} of {self.lines:,}; expected at most max_bad_share="
                f"{self.config.max_bad_share:.2%}. First: {'; '.join(self.examples)}. "
                "Mend the file or raise ingest.max_bad_share."
            )
        if not kept:
            why = ", ".join(f"{count:,} {reason}" for reason, count in sorted((+self.dropped).items())) or "nothing dropped"
            raise InputError(
                f"ingest: products: got 0 of {self.lines:,} lines ({why}); expected at least 1. Check ingest.sources."
            )


def read_pieces(source: Source, config: IngestConfig) -> Generator[Piece]:
    """The blocks of all files, in order."""
    total, before = max(sum(file.size_bytes for file in source.files), 1), 0
    for index, file in enumerate(source.files, start=1):
        path = Path(file.url)
        for block, share in read_blocks(path, index, config):
            yield Piece(path.name, block, (before + share * file.size_bytes) / total)
        before += file.size_bytes
        if file_digest(path) != file.digest:
            raise InputError(f"{path.name}: changed while it was read; expected a file that stays as it is. Run again.")


def clean_piece(piece: Piece, config: IngestConfig) -> Cleaned:
    """Parse and clean a block; duplicates are for later, they need the order."""
    import polars as pl

    rows = read_block(piece.block, config.max_line_bytes)
    frame, dropped = drop_empty(clean(pl.DataFrame(rows.table), config), config)
    dropped["blank line"] = rows.blank
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(product_schema())
    return Cleaned(piece.file, piece.done, table, hash_texts(frame), rows.lines, Counter(dropped), rows.rejects)


def distinct_tables(pieces: Iterable[Cleaned], config: IngestConfig, tally: Tally, seen: Distinct) -> Iterator[pa.Table]:
    """The rows to keep, in order; everything else goes to the tally."""
    with metered("ingest", "lines") as tell:
        for piece in pieces:
            new = seen.add(piece.hashes) if config.drop_duplicates else np.ones(piece.table.num_rows, np.bool_)
            tally.lines += piece.lines
            tally.dropped += piece.dropped + Counter(duplicate=int((~new).sum()))
            for reject in piece.rejects:
                tally.reject(piece.file, reject)
            yield piece.table if new.all() else piece.table.filter(new)
            tell(tally.lines, piece.done)


def _as_json(raw: bytes) -> dict[str, str]:
    """A line as it was: as text where it is text, else in base 64."""
    try:
        return {"raw": raw.decode()}
    except UnicodeDecodeError:
        return {"raw_base64": b64encode(raw).decode()}


@stage(version=1)
def ingest(source: Source, config: IngestConfig) -> Products:
    """Read, check, clean and de-duplicate the product lines."""
    need_bytes = sum(file.size_bytes for file in source.files) // 2
    with publish("products", need_bytes=need_bytes) as draft, ExitStack() as stack:
        tally = Tally(config, stack)
        pieces = stack.enter_context(closing(read_pieces(source, config)))
        cleaned = stack.enter_context(closing(in_order(partial(clean_piece, config=config), pieces)))
        tables = distinct_tables(cleaned, config, tally, Distinct(draft.path))
        draft.rows = write_table(draft / "products.arrow", product_schema(), fixed_batches(tables))
        tally.check(draft.rows)
    rejects = tally.draft.artifact if tally.draft else None
    return Products(data=draft.artifact, rejects=rejects, lines=tally.lines, dropped=dict(sorted((+tally.dropped).items())))


__all__ = ["ingest", "locate_source"]
