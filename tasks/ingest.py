"""Rows of files to clean, distinct products in Arrow.

    {"uid": "7", "title": "Pan &amp; Lid", "content": "Cast iron.", ...}  ->  ("7", "Pan & Lid", "Cast iron.")

Blocks are parsed and cleaned by as many threads as there are cores, those of a large file of JSON lines by other processes too
(tasks/reading/files/apart.py), and put back into their order (tasks/tables/streams.py). Every line is kept, dropped for a
counted reason, or rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tasks.caching.files import ASIDE_BYTES, file_digest
from tasks.caching.stage import stage
from tasks.caching.store import publish
from tasks.config import IngestConfig
from tasks.reading.cleaning import clean_rows, hash_rows
from tasks.reading.columns import Wanted, product_schema
from tasks.reading.conversations import conversation_schema
from tasks.reading.counts import LineCounts, check_kept, check_rejected
from tasks.reading.distinct import Distinct, Hashes
from tasks.reading.files.apart import MOST_PROCESSES, Crew, crew_of
from tasks.reading.files.blocks import (
    Block,
    columns_to_read,
    has_stretches,
    parse_block,
    read_blocks,
    read_stretches,
    resolve_kind,
)
from tasks.reading.files.stretches import Stretch, read_stretch
from tasks.reading.rows import Reject
from tasks.refs import InputError, Products, Source
from tasks.tables.arrow import is_conversations, kept_rows, write_table
from tasks.tables.progress import metered
from tasks.tables.streams import cores, fixed_batches, in_order

if TYPE_CHECKING:
    import pyarrow as pa


class Place(NamedTuple):
    """Where a block comes from."""

    number: int
    """Of the file, among those of the source."""
    file: str
    done: float
    """Share of all input that has been read, the block included."""


class Piece(NamedTuple):
    """A block, or a stretch that whoever parses it reads, and where it comes from."""

    place: Place
    block: Block | Stretch


class Cleaned(NamedTuple):
    """A piece, parsed and cleaned."""

    place: Place
    table: pa.Table
    hashes: Hashes
    lines: int
    dropped: Counter[str]
    rejects: list[Reject]
    is_stretch: bool
    """Whether the lines to reject are numbered from the piece's first, and not from the file's."""


def read_pieces(source: Source, config: IngestConfig, wanted: Wanted, *, is_apart: bool) -> Generator[Piece]:
    """The blocks of all files, in order; stretches of a file that has them, where pieces are parsed apart."""
    total, before = max(sum(file.size_bytes for file in source.files), 1), 0
    for number, file in enumerate(source.files):
        path = Path(file.url)
        read = read_stretches if is_apart and has_stretches(path, config) else read_blocks
        for block, share in read(path, config, wanted):
            yield Piece(Place(number, path.name, (before + share * file.size_bytes) / total), block)
        before += file.size_bytes


def check_unchanged(source: Source) -> None:
    """Hold the files, read to their ends, against their digests.

    Raises:
        InputError: for one that has changed.
    """
    for path, digest in ((Path(file.url), file.digest) for file in source.files):
        if file_digest(path) != digest:
            raise InputError(f"{path.name}: changed while it was read; expected a file that stays as it is. Run again.")


def clean_piece(piece: Piece, config: IngestConfig, wanted: Wanted, crew: Crew | None) -> Cleaned:
    """Parse and clean a block; duplicates are for later, they need the order."""
    if isinstance(piece.block, Stretch):
        if crew and (done := crew.clean(piece.block)):
            return Cleaned(piece.place, done.table, done.hashes, done.lines, Counter(done.dropped), [], is_stretch=True)
        return _clean_block(piece.place, read_stretch(piece.block), config, wanted)._replace(is_stretch=True)
    return _clean_block(piece.place, piece.block, config, wanted)


def _clean_block(place: Place, block: Block, config: IngestConfig, wanted: Wanted) -> Cleaned:
    import polars as pl

    rows = parse_block(block, place.file, config, wanted)
    dropped = rows.dropped + Counter({"blank line": rows.blank})
    if is_conversations(rows.table.schema):
        return Cleaned(place, rows.table, hash_rows(rows.table), rows.lines, dropped, rows.rejects, is_stretch=False)
    clean = clean_rows(pl.DataFrame(rows.table), config)
    dropped += Counter(clean.dropped)
    return Cleaned(place, clean.table, clean.hashes, rows.lines, dropped, rows.rejects, is_stretch=False)


def kept_tables(pieces: Iterable[Cleaned], config: IngestConfig, counts: LineCounts, seen: Distinct) -> Iterator[pa.Table]:
    """The rows to keep, in order; everything else is counted."""
    in_file = Counter[int]()
    with metered("ingest", "lines") as count:
        for piece in pieces:
            new = seen.add(piece.hashes) if config.drop_duplicates else np.ones(piece.table.num_rows, np.bool_)
            counts.dropped += piece.dropped + Counter(duplicate=int((~new).sum()))
            before = in_file[piece.place.number] if piece.is_stretch else 0
            for reject in piece.rejects:
                counts.reject(piece.place.file, reject._replace(line=before + reject.line))
            in_file[piece.place.number] += piece.lines
            counts.lines += piece.lines
            yield kept_rows(piece.table, new)
            count(counts.lines, piece.place.done)


def processes_beside(files: Iterable[Path], config: IngestConfig) -> int:
    """How many processes shall parse beside this one: none for input that they would take longer to start than to parse."""
    if config.kind != "products":
        return 0
    size = sum(path.stat().st_size for path in files if has_stretches(path, config))
    return min(cores() - 1, MOST_PROCESSES) if size >= ASIDE_BYTES else 0


@stage(version=1)
def ingest(source: Source, config: IngestConfig, extra_columns: tuple[str, ...] = ()) -> Products:
    """Read, check, clean and de-duplicate the rows; `extra_columns` are kept beside uid, title and content."""
    files = [Path(file.url) for file in source.files]
    config = resolve_kind(files, config)
    wanted = columns_to_read(config, extra_columns)
    schema = product_schema(extra_columns) if config.kind == "products" else conversation_schema()
    need_bytes = sum(file.size_bytes for file in source.files) // 2
    with publish("products", need_bytes=need_bytes) as draft:
        with ExitStack() as stack:
            counts = LineCounts(config, stack)
            others = processes_beside(files, config)
            crew = stack.enter_context(crew_of(others, config, wanted)) if others else None
            pieces = stack.enter_context(closing(read_pieces(source, config, wanted, is_apart=others > 0)))
            work = partial(clean_piece, config=config, wanted=wanted, crew=crew)
            cleaned = in_order(work, pieces, threads=others + 1, waiting=1) if others else in_order(work, pieces)
            stack.enter_context(closing(cleaned))
            tables = kept_tables(cleaned, config, counts, Distinct(draft.path))
            draft.rows = write_table(draft / "products.arrow", schema, fixed_batches(tables))
        check_unchanged(source)
        rejects = counts.rejects
        if not source.is_shard:
            check_rejected([rejects] if rejects else [], counts.lines, config)
            check_kept(draft.rows, counts.lines, counts.dropped)
    return Products(data=draft.artifact, rejects=rejects, lines=counts.lines, dropped=dict(sorted((+counts.dropped).items())))
