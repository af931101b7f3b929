"""Delimited text, Parquet and Arrow IPC to record batches of the wanted columns, by pyarrow; and those to product tables.

A row of delimited text with another number of fields than the header is rejected; so is a row of any of them whose text is no
UTF-8. Rows are numbered from 1, in delimited text by the header.
"""

from __future__ import annotations

import codecs
import json
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from tasks.reading.columns import Wanted, to_text, with_uids
from tasks.reading.conversations import Chooser, Conversation, conversation_table
from tasks.reading.files.formats import Dialect, FileFormat
from tasks.reading.files.packing import ByteStream
from tasks.reading.rows import ParsedBlock, Reject
from tasks.refs import InputError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 4096
BUFFER_BYTES = 2**20
PIECE_BYTES = 2**18
"""Text is decoded so much at a time: as Python's it may be four times its bytes."""
BLOCKS_AHEAD = 4
"""Of delimited text, read before they are asked for; Arrow needs the next one to end a block at a row's end."""
HELD_SECONDS = 0.05

NO_TEXT = "\ufffe"
"""Stands for a byte that is no text until the row is read: pyarrow can tell of a ragged row only if all of it is UTF-8. Unicode
keeps this code point free of any character."""

Choose = Callable[[list[str]], list[str]]
"""From the columns that are there to those to read; refuses a file that lacks one."""


@dataclass
class RowBlock:
    """Some rows of a table, with the file's own columns."""

    batch: pa.RecordBatch
    first_row: int
    rejects: list[Reject] = field(default_factory=list[Reject])
    """Rows that are in no batch."""


def table_columns(file: ByteStream, found: FileFormat) -> list[str]:
    """The columns of a Parquet file, an Arrow file or an Arrow stream."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    match found:
        case FileFormat.PARQUET:
            return list(pq.read_schema(file).names)
        case FileFormat.ARROW_FILE:
            return list(pa.ipc.open_file(pa.PythonFile(file, "r")).schema.names)
        case _:
            return list(pa.ipc.open_stream(pa.PythonFile(file, "r")).schema.names)


def cut_parquet(file: IO[bytes], choose: Choose) -> Iterator[RowBlock]:
    """The row groups of a Parquet file, piece by piece."""
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
    columns = choose(list(parquet.schema_arrow.names))
    yield from _numbered(parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False), columns)


def cut_arrow_file(file: IO[bytes], choose: Choose) -> Iterator[RowBlock]:
    """The record batches of an Arrow IPC file."""
    import pyarrow as pa

    reader = pa.ipc.open_file(pa.PythonFile(file, "r"))
    columns = choose(list(reader.schema.names))
    yield from _numbered((reader.get_batch(number) for number in range(reader.num_record_batches)), columns)


def cut_arrow_stream(stream: ByteStream, choose: Choose) -> Iterator[RowBlock]:
    """The record batches of an Arrow IPC stream, such as a file of the library datasets."""
    import pyarrow as pa

    reader = pa.ipc.open_stream(pa.PythonFile(stream, "r"))
    yield from _numbered(reader, choose(list(reader.schema.names)))


def _numbered(batches: Iterator[pa.RecordBatch], columns: list[str]) -> Iterator[RowBlock]:
    first = 1
    for whole in batches:
        chosen = whole.select(columns)
        for start in range(0, whole.num_rows, BATCH_ROWS):
            batch = _without_dictionaries(chosen.slice(start, BATCH_ROWS))
            yield RowBlock(batch, first)
            first += batch.num_rows


def _without_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with each value in its place, so that its size is what it holds."""
    import pyarrow as pa

    batch.validate(full=True)
    columns = [column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


class Transcoded:
    """A stream of text in any encoding as UTF-8; each byte that is no text as NO_TEXT."""

    closed = False

    def __init__(self, stream: ByteStream, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(errors="ufffe")
        self._ready = bytearray()
        self._ended = False

    def read(self, size: int = -1, /) -> bytes:
        """So many bytes, fewer only at the end; all where the size is negative."""
        while not self._ended and (size < 0 or len(self._ready) < size):
            data = self._stream.read(PIECE_BYTES)
            self._ended = not data
            self._ready += self._decoder.decode(data, final=self._ended).encode()
        end = len(self._ready) if size < 0 else size
        data = bytes(self._ready[:end])
        del self._ready[:end]
        return data


class Paced:
    """A stream that a thread of Arrow's reads: held at BLOCKS_AHEAD, for by itself it reads 32 blocks before they are asked for.

    Source: arrow/util/async_generator.h of Arrow 26, kDefaultBackgroundMaxQ.
    """

    closed = False

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._change = threading.Condition()
        self._ahead = 0
        self._is_awaited = True

    def read(self, size: int = -1, /) -> bytes:
        """So many bytes, fewer only at the end, once it is time."""
        with self._change:
            while self._ahead >= BLOCKS_AHEAD:
                if not self._change.wait(HELD_SECONDS) and self._is_awaited:  # by one who gets no batch of what was read
                    break
            self._ahead += 1
        return self._stream.read(size)

    def taken(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The batches that are made of the stream, one a block."""
        try:
            for batch in batches:
                self._await(False)
                yield batch
                self._await(True)
        finally:
            self._await(True)

    def _await(self, is_awaited: bool) -> None:
        with self._change:
            self._is_awaited = is_awaited
            self._ahead -= not is_awaited
            self._change.notify_all()


def _mark(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return NO_TEXT, error.start + 1


codecs.register_error("ufffe", _mark)


def _bytes_again(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with a byte that is no text where NO_TEXT stands."""
    import pyarrow as pa
    import pyarrow.compute as pc

    mark = NO_TEXT.encode()
    columns = [
        pc.replace_substring(column, mark, b"\xff") if pc.any(pc.match_substring(column, mark)).as_py() else column
        for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def cut_delimited(stream: ByteStream, name: str, dialect: Dialect, columns: list[str], max_row_bytes: int) -> Generator[RowBlock]:
    """The rows of a delimited text, its fields as bytes.

    Raises:
        InputError: for a row that is too long.
    """
    import pyarrow as pa
    from pyarrow import csv

    rejects, row = list[Reject](), 2

    def set_aside(bad: Any) -> str:
        what = f"{bad.actual_columns} fields; expected {bad.expected_columns}, as in the header"
        rejects.append(Reject(bad.number or 0, what, bad.text.encode(), "row"))
        return "skip"

    parse = csv.ParseOptions(
        delimiter=dialect.delimiter,
        quote_char=dialect.quote or False,
        newlines_in_values=dialect.quote is not None,
        invalid_row_handler=set_aside,
    )
    read = csv.ReadOptions(use_threads=False, block_size=max_row_bytes)
    convert = csv.ConvertOptions(
        include_columns=columns, column_types=dict.fromkeys(columns, pa.binary()), strings_can_be_null=False
    )
    try:
        paced = Paced(Transcoded(stream, dialect.encoding))
        with csv.open_csv(paced, read_options=read, parse_options=parse, convert_options=convert) as reader:
            for batch in paced.taken(reader):
                for start in range(0, max(batch.num_rows, 1), BATCH_ROWS):
                    piece = _bytes_again(batch.slice(start, BATCH_ROWS))
                    yield RowBlock(piece, row, rejects[:])
                    row += piece.num_rows + len(rejects)
                    rejects.clear()
            if rejects:
                yield RowBlock(pa.RecordBatch.from_pylist([], schema=reader.schema), row, rejects)
    except pa.ArrowInvalid as error:
        if "Empty CSV file" in str(error):
            return
        raise InputError(
            f"{name}: from row {row} on: got {error}; expected rows of at most {max_row_bytes:,} bytes, a quarter of "
            "max_line_bytes, each quote closed. Mend the file; set ingest.csv.quote=null if its quotes are text."
        ) from None


def table_rows(block: RowBlock, file: str, wanted: Wanted) -> ParsedBlock:
    """The rows as the wanted columns, in text; those whose bytes are no text are rejected.

    Raises:
        InputError: for a column that has no text.
    """
    import pyarrow as pa

    there, count = set(block.batch.schema.names), block.batch.num_rows
    texts = {name: to_text(block.batch[name], f"{file}: {name}") for name in dict.fromkeys(wanted.values()) if name in there}
    empty = pa.array([""] * count, pa.string()) if there < set(wanted.values()) else None
    table = pa.table({ours: texts[theirs][0] if theirs in texts else empty for ours, theirs in wanted.items()})
    rejects = list(block.rejects)
    bad = {name: whole for name, (_, whole) in texts.items() if whole is not None}
    if bad:
        whole = np.all([np.asarray(flags) for flags in bad.values()], axis=0)
        rejects += [_reject(block, row, bad) for row in np.flatnonzero(~whole).tolist()]
        table = table.filter(pa.array(whole))
    rejects.sort(key=lambda reject: reject.line)
    return ParsedBlock(with_uids(table), count + len(block.rejects), 0, rejects)


def table_conversations(block: RowBlock, file: str, wanted: Wanted, choose: Chooser) -> ParsedBlock:
    """The rows as conversations: lists and objects as they are, all else as text.

    Raises:
        InputError: for a column that has no text, or a row that the settings do not want left out.
    """
    columns: dict[str, list[Any]] = {}
    rejects, rows = list(block.rejects), list[Conversation]()
    for name in (name for name in dict.fromkeys(wanted.values()) if name in block.batch.schema.names):
        column = block.batch[name]
        columns[name] = column.to_pylist() if _is_nested(column.type) else _texts(column, f"{file}: {name}")
    for row, values in enumerate(zip(*columns.values(), strict=True)):
        number = block.first_row + row
        try:
            made = choose(dict(zip(columns, values, strict=True)), f"row {number}")
            rows += [made] if made else []
        except ValueError as error:
            rejects.append(Reject(number, str(error), repr(values).encode(), "row"))
    rejects.sort(key=lambda reject: reject.line)
    lines = block.batch.num_rows + len(block.rejects)
    return ParsedBlock(conversation_table(iter(rows)), lines, 0, rejects, choose.dropped)


def _is_nested(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_nested(kind)


def _texts(column: pa.Array, where: str) -> list[str | None]:
    """Texts, None for null and for bytes that are none."""
    texts, whole = to_text(column, where)
    there = [value.is_valid for value in column] if whole is None else whole.to_pylist()
    return [text if kept else None for text, kept in zip(texts.to_pylist(), there, strict=True)]


def _reject(block: RowBlock, row: int, bad: dict[str, Any]) -> Reject:
    name = next(name for name, whole in bad.items() if not whole[row].as_py())
    raw = {name: repr(value) for name, value in block.batch.slice(row, 1).to_pylist()[0].items()}
    return Reject(
        block.first_row + row,
        f'"{name}" is no UTF-8; expected text, in delimited text by ingest.csv.encoding',
        json.dumps(raw).encode(),
        "row",
    )
