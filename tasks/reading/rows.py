"""JSON lines to product tables: a vectorised reader for well-formed blocks, a strict one for all others.

`read_strict` defines what a line means; `read_block` gives the same result, and gives it ten times faster for a block in
which every line is well-formed. A line is RFC 8259 JSON in UTF-8: an object that holds the wanted columns, as text or what
becomes text (columns.py).

    blank line (space, tab, CR)        counted, not rejected
    CR before LF, spaces around {}     accepted
    further keys                       ignored, whatever they hold and however deep
    a key given twice                  the last one counts; malformed on a line that is too deep for Python's parser
    NaN, Inf, Infinity in further keys accepted, as Python writes them
    control characters in strings      malformed
    half a surrogate pair              rejected in the wanted columns
    title or content absent            rejected; null is the empty text
    uid absent, null or empty          a digest of the row's texts
    number, true, false                as text; malformed on a line that is too deep for Python's parser
    list or object in a wanted column  rejected
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from tasks.reading.columns import AS_WRITTEN, NEEDED, Wanted, number_text, product_schema, with_uids

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

BLANK = b" \t\r"
INFINITY = re.compile("-?Inf")
"""A spelling that Arrow's parser takes and Python's does not."""


class Number(str):
    """A JSON number as it is written."""

    __slots__ = ()


KINDS: dict[type, str] = {
    bool: "a boolean",
    dict: "an object",
    list: "a list",
    Number: "a number",
    float: "a number",
    type(None): "null",
}


class LineBlock(NamedTuple):
    """Whole lines of one file."""

    data: bytes
    first_line: int
    """Number of the first line, from 1."""
    line_bytes: int = 0
    """Set when `data` is only the start of one line that is this long."""
    unit: str = "line"
    """The word for what is numbered."""
    ends: NDArray[np.integer] | None = None
    """Where the line breaks are, if that is known."""


class Reject(NamedTuple):
    """A line, or a row of another format, set aside."""

    line: int
    reason: str
    raw: bytes
    unit: str = "line"


@dataclass
class ParsedBlock:
    """The content of a block; every line is a row of the table, a reject or blank."""

    table: pa.Table
    """The wanted columns: string, without nulls, in the order of the lines."""
    lines: int
    blank: int = 0
    rejects: list[Reject] = field(default_factory=list[Reject])
    dropped: Counter[str] = field(default_factory=Counter[str])
    """Rows left out, by reason."""


def read_block(block: LineBlock, max_line_bytes: int, wanted: Wanted = AS_WRITTEN) -> ParsedBlock:
    """The block's rows, by the fast reader where it is certain to agree with the strict one."""
    return _read_fast(block, max_line_bytes, wanted) or read_strict(block, max_line_bytes, wanted)


def read_strict(block: LineBlock, max_line_bytes: int, wanted: Wanted = AS_WRITTEN) -> ParsedBlock:
    """The block's rows, line by line."""
    rows, parsed = sort_lines(block, max_line_bytes, lambda raw, _: _product(raw, wanted))
    parsed.table = _table(rows, wanted)
    return parsed


def sort_lines(block: LineBlock, max_line_bytes: int, make: Callable[[bytes, int], T]) -> tuple[list[T], ParsedBlock]:
    """Return what is made of each line and its number, and all that is no row, with no table yet.

    `make` raises ValueError for a line to reject.
    """
    rows, blank, rejects, lines = list[T](), 0, list[Reject](), 0
    for lines, raw in enumerate(_split(block), start=1):
        number, size = block.first_line + lines - 1, block.line_bytes or len(raw)
        try:
            if size > max_line_bytes:
                raise ValueError(f"line of {size:,} bytes; expected at most max_line_bytes={max_line_bytes:,}")
            if raw.strip(BLANK):
                rows.append(make(raw, number))
            else:
                blank += 1
        except ValueError as error:
            rejects.append(Reject(number, str(error), raw[:max_line_bytes], block.unit))
    return rows, ParsedBlock(product_schema().empty_table(), lines, blank, rejects)


def _split(block: LineBlock) -> Iterator[bytes]:
    lines = block.data.split(b"\n")
    return iter(lines[:-1] if not lines[-1] and not block.line_bytes else lines)


def _product(raw: bytes, wanted: Wanted) -> tuple[str, ...]:
    """The wanted columns of a line.

    >>> _product(b'{"uid": "7", "title": "Pan", "content": "", "kg": 1.50}', AS_WRITTEN | {"kg": "kg"})
    ('7', 'Pan', '', '1.5')

    Raises:
        ValueError: saying what is wrong with the line.
    """
    value = read_object(raw, wanted)
    if missing := next((wanted[name] for name in NEEDED if wanted[name] not in value), None):
        raise ValueError(f'missing "{missing}"; expected {", ".join(wanted.values())}')
    return tuple(json_text(name, value.get(name)) for name in wanted.values())


def json_text(name: str, value: object) -> str:
    """A JSON value's text, as tasks/reading/columns.py has it.

    Raises:
        ValueError: for a list or an object, and for text that is no Unicode.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (Number, int, float)):
        return number_text(str(value))
    if not isinstance(value, str):
        raise ValueError(f'"{name}" is {KINDS.get(type(value), type(value).__name__)}; expected text')
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f'"{name}" holds half a surrogate pair; expected Unicode text')
    return value


def read_object(raw: bytes, wanted: Wanted) -> dict[str, Any]:
    """A line's object, its numbers as they are written; of one too deep for Python's parser only the wanted columns.

    Raises:
        ValueError: saying what is wrong with the line.
    """
    try:
        value = json.loads(raw.decode(), parse_int=Number, parse_float=Number)
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start + 1}; expected UTF-8") from None
    except json.JSONDecodeError as error:
        if INFINITY.match(error.doc, error.pos):
            return _arrow_object(raw, wanted)
        raise ValueError(f"malformed JSON at character {error.pos + 1}: {error.msg}; expected one object a line") from None
    except RecursionError:  # deeper than Python's stack; Arrow's parser needs none
        return _arrow_object(raw, wanted)
    if not isinstance(value, dict):
        raise ValueError(f"{KINDS.get(type(value), 'a string')}; expected one object a line")
    return cast("dict[str, Any]", value)


def _arrow_object(raw: bytes, wanted: Wanted) -> dict[str, Any]:
    """The wanted columns of a line, by the fast reader's parser alone."""
    import pyarrow as pa

    try:
        [value] = _parse(raw, wanted).to_pylist()
    except (pa.ArrowInvalid, ValueError):
        raise ValueError("malformed JSON; expected one object a line") from None
    return {name: text for name, text in value.items() if text is not None}


def _table(rows: list[tuple[str, ...]], wanted: Wanted) -> pa.Table:
    import pyarrow as pa

    columns = zip(*rows, strict=True) if rows else ((),) * len(wanted)
    return with_uids(pa.table([pa.array(column, pa.string()) for column in columns], names=list(wanted)))


def _read_fast(block: LineBlock, max_line_bytes: int, wanted: Wanted) -> ParsedBlock | None:
    """The block's rows; None when a line is, or may be, anything but one well-formed product."""
    import pyarrow as pa

    lines = object_lines(block, max_line_bytes)
    if lines is None:
        return None
    try:
        parsed = _parse(block.data, wanted)
        if parsed.num_rows != lines or any(parsed[wanted[name]].null_count for name in NEEDED):
            return None
        table = pa.table([parsed[theirs] for theirs in wanted.values()], names=list(wanted))
        table.validate(full=True)
    except pa.ArrowInvalid:
        return None
    return ParsedBlock(with_uids(_without_nulls(table)), lines)


def _without_nulls(table: pa.Table) -> pa.Table:
    import pyarrow.compute as pc

    for index, name in enumerate(table.column_names):
        if name != "uid" and table[name].null_count:
            table = table.set_column(index, name, pc.fill_null(table[name], ""))
    return table


def object_lines(block: LineBlock, max_line_bytes: int) -> int | None:
    """How many lines the block has, if all start with { and end with }, in UTF-8, none too long.

    A line break can't lie within a JSON string, and } before it with { after it lies between two top-level values. So as
    many values as lines means one value on each line.
    """
    import pyarrow as pa

    data = block.data
    text = np.frombuffer(data, np.uint8)
    if block.line_bytes or not len(text):
        return None
    ends = line_breaks(data) if block.ends is None else block.ends
    if text[-1] != ord("\n"):
        ends = np.append(ends, len(text))
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > max_line_bytes or (ends - starts).min() < 2:
        return None
    last = ends - 1 - (text[ends - 1] == ord("\r"))
    if (text[starts] != ord("{")).any() or (text[last] != ord("}")).any():
        return None
    whole = pa.Array.from_buffers(pa.large_string(), 1, [None, pa.py_buffer(np.array([0, len(data)])), pa.py_buffer(data)])
    try:
        whole.validate(full=True)
    except pa.ArrowInvalid:
        return None
    return len(ends)


def line_breaks(data: bytes) -> NDArray[np.integer]:
    """Where the line breaks of a block are; unlike bytes' own methods it holds no other thread up."""
    return np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))


def _parse(data: bytes, wanted: Wanted) -> pa.Table:
    import pyarrow as pa
    from pyarrow import json as arrow_json

    schema = pa.schema([(name, pa.string()) for name in dict.fromkeys(wanted.values())])
    return arrow_json.read_json(
        pa.BufferReader(data),
        read_options=arrow_json.ReadOptions(use_threads=False, block_size=len(data) + 1),
        parse_options=arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
