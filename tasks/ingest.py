"""Rows of files to clean, distinct products in Arrow.

    {"uid": "7", "title": "Pan &amp; Lid", "content": "Cast iron.", ...}  ->  ("7", "Pan & Lid", "Cast iron.")

Blocks are parsed and cleaned by as many threads as there are cores and put back into their order (tasks/reading,
tasks/tables/streams.py). Every line is kept, dropped for a counted reason, or rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tasks.caching.files import file_digest
from tasks.caching.stage import stage
from tasks.caching.store import publish
from tasks.config import IngestConfig
from tasks.reading.cleaning import clean, drop_empty, hash_rows, hash_texts
from tasks.reading.columns import Wanted, product_schema
from tasks.reading.conversations import conversation_schema
from tasks.reading.counts import LineCounts, check_kept, check_rejected
from tasks.reading.distinct import Distinct, Hashes
from tasks.reading.files.blocks import Block, columns_to_read, parse_block, read_blocks, resolve_kind
from tasks.reading.rows import Reject
from tasks.refs import InputError, Products, Source
from tasks.tables.arrow import is_conversations, kept_rows, write_table
from tasks.tables.progress import metered
from tasks.tables.streams import fixed_batches, in_order

if TYPE_CHECKING:
    import pyarrow as pa


class Piece(NamedTuple):
    """A block, and where it comes from."""

    file: str
    block: Block
    done: float
    """Share of all input that has been read."""


class Cleaned(NamedTuple):
    """A piece, parsed and cleaned."""

    file: str
    done: float
    table: pa.Table
    hashes: Hashes
    lines: int
    dropped: Counter[str]
    rejects: list[Reject]


def read_pieces(source: Source, config: IngestConfig, wanted: Wanted) -> Generator[Piece]:
    """The blocks of all files, in order."""
    total, before = max(sum(file.size_bytes for file in source.files), 1), 0
    for file in source.files:
        path = Path(file.url)
        for block, share in read_blocks(path, config, wanted):
            yield Piece(path.name, block, (before + share * file.size_bytes) / total)
        before += file.size_bytes
        if file_digest(path) != file.digest:
            raise InputError(f"{path.name}: changed while it was read; expected a file that stays as it is. Run again.")


def clean_piece(piece: Piece, config: IngestConfig, wanted: Wanted) -> Cleaned:
    """Parse and clean a block; duplicates are for later, they need the order."""
    import polars as pl

    rows = parse_block(piece.block, piece.file, config, wanted)
    if is_conversations(rows.table.schema):
        dropped = rows.dropped + Counter({"blank line": rows.blank})
        return Cleaned(piece.file, piece.done, rows.table, hash_rows(rows.table), rows.lines, dropped, rows.rejects)
    frame, dropped = drop_empty(clean(pl.DataFrame(rows.table), config), config)
    dropped["blank line"] = rows.blank
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(rows.table.schema)
    return Cleaned(piece.file, piece.done, table, hash_texts(frame), rows.lines, Counter(dropped), rows.rejects)


def kept_tables(pieces: Iterable[Cleaned], config: IngestConfig, counts: LineCounts, seen: Distinct) -> Iterator[pa.Table]:
    """The rows to keep, in order; everything else is counted."""
    with metered("ingest", "lines") as count:
        for piece in pieces:
            new = seen.add(piece.hashes) if config.drop_duplicates else np.ones(piece.table.num_rows, np.bool_)
            counts.lines += piece.lines
            counts.dropped += piece.dropped + Counter(duplicate=int((~new).sum()))
            for reject in piece.rejects:
                counts.reject(piece.file, reject)
            yield kept_rows(piece.table, new)
            count(counts.lines, piece.done)


@stage(version=1)
def ingest(source: Source, config: IngestConfig, extra_columns: tuple[str, ...] = ()) -> Products:
    """Read, check, clean and de-duplicate the rows; `extra_columns` are kept beside uid, title and content."""
    config = resolve_kind([Path(file.url) for file in source.files], config)
    wanted = columns_to_read(config, extra_columns)
    schema = product_schema(extra_columns) if config.kind == "products" else conversation_schema()
    need_bytes = sum(file.size_bytes for file in source.files) // 2
    with publish("products", need_bytes=need_bytes) as draft:
        with ExitStack() as stack:
            counts = LineCounts(config, stack)
            pieces = stack.enter_context(closing(read_pieces(source, config, wanted)))
            cleaned = stack.enter_context(closing(in_order(partial(clean_piece, config=config, wanted=wanted), pieces)))
            tables = kept_tables(cleaned, config, counts, Distinct(draft.path))
            draft.rows = write_table(draft / "products.arrow", schema, fixed_batches(tables))
        rejects = counts.rejects
        if not source.is_shard:
            check_rejected([rejects] if rejects else [], counts.lines, config)
            check_kept(draft.rows, counts.lines, counts.dropped)
    return Products(data=draft.artifact, rejects=rejects, lines=counts.lines, dropped=dict(sorted((+counts.dropped).items())))
