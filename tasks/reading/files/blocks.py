"""Files to blocks of rows, whatever their format: whole lines of JSON, or record batches of the wanted columns.

A JSON array is cut into its objects, each made a line. Whatever the file's size, only some blocks of it are in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from tasks.config import IngestConfig
from tasks.reading.columns import Wanted, check_columns, wanted_columns
from tasks.reading.conversations import Chooser, conversation_columns, find_kind, parse_lines
from tasks.reading.files.formats import BOM, Dialect, FileFormat, find_dialect, find_format, read_header
from tasks.reading.files.json_array import array_values, cut_array
from tasks.reading.files.packing import Allowance, ByteStream, Content, Rejoined, damage_named, seekable, unpacked
from tasks.reading.files.stretches import Stretch, cut_stretches
from tasks.reading.files.tabular import (
    RowBlock,
    cut_arrow_file,
    cut_arrow_stream,
    cut_delimited,
    cut_parquet,
    table_columns,
    table_conversations,
    table_rows,
)
from tasks.reading.rows import LineBlock, ParsedBlock, line_breaks, read_block, read_object
from tasks.refs import InputError

HEAD_BYTES = 2**16
ROW_SHARE = 4
"""A row of delimited text may be this part of max_line_bytes: a whole block of them is parsed at a time."""

Block = LineBlock | RowBlock


class Look(NamedTuple):
    """A file as its beginning shows it."""

    format: FileFormat
    columns: tuple[str, ...]
    """Empty where no row can be read."""
    dialect: Dialect | None = None
    """Of delimited text."""
    is_packed: bool = False


def look(path: Path, config: IngestConfig) -> Look:
    """A file's format and columns; no more than its beginning, or its own table of contents, is read.

    Raises:
        InputError: when it is damaged, no archive of one data file, or in a format that is not read.
    """
    with path.open("rb") as raw, damage_named(path), unpacked(raw, path, config.max_inflation) as content:
        head = content.stream.read(HEAD_BYTES)
        found = find_format(head, content.name)
        dialect = find_dialect(head, content.name, config.csv) if found is FileFormat.DELIMITED else None
        return Look(found, tuple(_columns(found, head, content, raw, config)), dialect, content.packed)


def _columns(found: FileFormat, head: bytes, content: Content, raw: IO[bytes], config: IngestConfig) -> list[str]:
    rejoined = content._replace(stream=Rejoined(head, content.stream))
    if found is FileFormat.DELIMITED:
        return read_header(head, find_dialect(head, content.name, config.csv))
    if found is FileFormat.ARROW_STREAM:
        return table_columns(rejoined.stream, found)
    if found in (FileFormat.PARQUET, FileFormat.ARROW_FILE):
        with seekable(rejoined, raw) as file:
            return table_columns(file, found)
    return _keys(head if found is FileFormat.LINES else b"\n".join(_first_objects(head, config.max_line_bytes)))


def _keys(head: bytes) -> list[str]:
    """The keys of the whole lines of JSON among the first bytes, in their order."""
    keys = dict[str, None]()
    for line in head.removeprefix(BOM).split(b"\n"):
        try:
            keys |= dict.fromkeys(read_object(line, {}))
        except ValueError:
            continue
    return list(keys)


def _first_objects(head: bytes, max_line_bytes: int) -> Iterator[bytes]:
    try:
        yield from array_values(Rejoined(head), HEAD_BYTES, max_line_bytes)
    except InputError:  # cut off where the beginning ends, or bad: reading will tell
        return


def check_files(files: Iterable[Path], config: IngestConfig, extra: Sequence[str]) -> None:
    """Look at every file: its format is one that is read, and it has the wanted columns.

    Raises:
        InputError: as `read_blocks`, for the first file that has not.
    """
    wanted = columns_to_read(config, extra)
    for path in files:
        if columns := look(path, config).columns:
            check_columns(path.name, columns, wanted, config)


def read_blocks(path: Path, config: IngestConfig, wanted: Wanted) -> Iterator[tuple[Block, float]]:
    """The file's rows in blocks, each with the share of the file that has been read.

    Raises:
        InputError: when the file is damaged, in an unknown format, without a wanted column, no archive of one data file, or a
            decompression bomb.
    """
    size = max(path.stat().st_size, 1)
    with path.open("rb") as raw, damage_named(path), unpacked(raw, path, config.max_inflation) as content:
        head = content.stream.read(HEAD_BYTES)
        found = find_format(head, content.name)
        rejoined = content._replace(stream=Rejoined(head, content.stream))
        for block in _cut(found, head, rejoined, raw, path, config, wanted):
            yield block, min(raw.tell() / size, 1.0)


def has_stretches(path: Path, config: IngestConfig) -> bool:
    """Whether a file is lines of JSON just as they lie there, so that any part of it can be read by itself."""
    seen = look(path, config)
    return seen.format is FileFormat.LINES and not seen.is_packed


def read_stretches(path: Path, config: IngestConfig, wanted: Wanted) -> Iterator[tuple[Stretch, float]]:
    """As read_blocks, of a file that has stretches; none of them is read yet, and their lines are not counted."""
    if columns := look(path, config).columns:
        check_columns(path.name, columns, wanted, config)
    with path.open("rb") as file:
        size = max(os.fstat(file.fileno()).st_size, 1)
        for stretch in cut_stretches(file, path, config.block_bytes, config.max_line_bytes):
            yield stretch, min((stretch.start + stretch.size) / size, 1.0)


def _cut(
    found: FileFormat, head: bytes, content: Content, raw: IO[bytes], path: Path, config: IngestConfig, wanted: Wanted
) -> Iterator[Block]:
    if found is FileFormat.LINES or found is FileFormat.ARRAY:
        if keys := _columns(found, head, content, raw, config):
            check_columns(path.name, keys, wanted, config)
        cut = cut_lines if found is FileFormat.LINES else cut_array
        yield from cut(content.stream, config.block_bytes, config.max_line_bytes)
        return
    allowance = Allowance(path, config.max_inflation)
    for block in _cut_table(found, head, content, raw, path, config, wanted):
        allowance.spend(block.batch.nbytes)
        yield block


def _cut_table(
    found: FileFormat, head: bytes, content: Content, raw: IO[bytes], path: Path, config: IngestConfig, wanted: Wanted
) -> Iterator[RowBlock]:
    def chosen(there: list[str]) -> list[str]:
        check_columns(path.name, there, wanted, config)
        return [name for name in dict.fromkeys(wanted.values()) if name in there]

    if found is FileFormat.DELIMITED:
        dialect = find_dialect(head, content.name, config.csv)
        columns = chosen(read_header(head, dialect))
        yield from cut_delimited(content.stream, path.name, dialect, columns, config.max_line_bytes // ROW_SHARE)
    elif found is FileFormat.ARROW_STREAM:
        yield from cut_arrow_stream(content.stream, chosen)
    else:
        with seekable(content, raw) as file:
            yield from (cut_parquet if found is FileFormat.PARQUET else cut_arrow_file)(file, chosen)


def resolve_kind(files: Sequence[Path], config: IngestConfig) -> IngestConfig:
    """The settings with the kind of rows that the first file's columns show; an explicit one stays.

    Raises:
        InputError: as `look`.
    """
    if config.kind != "auto":
        return config
    columns = look(files[0], config).columns if files else ()
    return config.model_copy(update={"kind": find_kind(columns, config)})


def columns_to_read(config: IngestConfig, extra: Sequence[str]) -> Wanted:
    """{our column: the file's} of the kind that the settings name."""
    if config.kind in ("auto", "products"):
        return wanted_columns(config, extra)
    return conversation_columns(config.kind, config)


def parse_block(block: Block, file: str, config: IngestConfig, wanted: Wanted) -> ParsedBlock:
    """The block's rows as the wanted columns, or as conversations."""
    if config.kind not in ("auto", "products"):
        choose = Chooser(config.kind, file, config)
        if isinstance(block, LineBlock):
            return parse_lines(block, choose, config)
        return table_conversations(block, file, wanted, choose)
    if isinstance(block, LineBlock):
        return read_block(block, config.max_line_bytes, wanted)
    return table_rows(block, file, wanted)


def cut_lines(stream: ByteStream, block_bytes: int, max_line_bytes: int) -> Iterator[LineBlock]:
    """Blocks that end with a line; a line longer than both limits is cut short and alone in its block."""
    pending = bytearray(stream.read(HEAD_BYTES).removeprefix(BOM))
    line = 1
    while chunk := stream.read(max(block_bytes - len(pending), HEAD_BYTES)):
        cut = chunk.rfind(b"\n") + 1
        if cut:
            data = b"".join((pending, memoryview(chunk)[:cut]))
            ends = line_breaks(data)
            yield LineBlock(data, line, ends=ends)
            line += len(ends)
            pending = bytearray(chunk[cut:])
        else:
            pending += chunk
        start = pending.rfind(b"\n") + 1
        if len(pending) - start > max_line_bytes:
            if start:
                yield LineBlock(bytes(pending[:start]), line)
                line += pending.count(b"\n")
            rest, length = _skip_line(stream, len(pending) - start)
            yield LineBlock(bytes(pending[start : start + max_line_bytes]), line, length)
            pending, line = bytearray(rest), line + 1
    if pending:
        yield LineBlock(bytes(pending), line)


def _skip_line(stream: ByteStream, length: int) -> tuple[bytes, int]:
    """Read beyond the present line: the bytes after it, and the line's length."""
    while chunk := stream.read(HEAD_BYTES):
        end = chunk.find(b"\n")
        if end >= 0:
            return chunk[end + 1 :], length + end
        length += len(chunk)
    return b"", length
