"""JSON lines to product tables: a vectorised reader for well-formed blocks, a strict one for all others.

`read_strict` defines what a line means; `read_block` gives the same result, and gives it ten times faster for a block in
which every line is well-formed. A line is RFC 8259 JSON in UTF-8: an object that holds uid, title and content as strings.

    blank line (space, tab, CR)        counted, not rejected
    CR before LF, spaces around {}     accepted
    further keys                       ignored, whatever they hold and however deep
    a key given twice                  the last one counts; malformed on a line that is too deep for Python's parser
    NaN, Inf, Infinity in further keys accepted, as Python writes them
    control characters in strings      malformed
    half a surrogate pair              rejected in the three fields
    uid absent or null                 the line's number, in a file that has no uids at all; else rejected
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    import pyarrow as pa

FIELDS = ("uid", "title", "content")
BLANK = b" \t\r"
INFINITY = re.compile("-?Inf")
"""A spelling that Arrow's parser takes and Python's does not."""
KINDS = {bool: "a boolean", dict: "an object", list: "a list", float: "a number", type(None): "null"}


class LineBlock(NamedTuple):
    """Whole lines of one file."""

    data: bytes
    first_line: int
    """Number of the first line, from 1."""
    uid_prefix: str | None = None
    """Set for a file without uids: its rows get this and their line number."""
    line_bytes: int = 0
    """Set when `data` is only the start of one line that is this long."""


class Reject(NamedTuple):
    """A line set aside."""

    line: int
    reason: str
    raw: bytes


@dataclass
class ParsedBlock:
    """The content of a block; every line is a row of the table, a reject or blank."""

    table: pa.Table
    """uid, title, content: string, without nulls, in the order of the lines."""
    lines: int
    blank: int = 0
    rejects: list[Reject] = field(default_factory=list[Reject])


def product_schema() -> pa.Schema:
    """uid, title, content: string."""
    import pyarrow as pa

    return pa.schema([(name, pa.string()) for name in FIELDS])


def read_block(block: LineBlock, max_line_bytes: int) -> ParsedBlock:
    """The block's rows, by the fast reader where it is certain to agree with the strict one."""
    return _read_fast(block, max_line_bytes) or read_strict(block, max_line_bytes)


def read_strict(block: LineBlock, max_line_bytes: int) -> ParsedBlock:
    """The block's rows, line by line."""
    rows, blank, rejects, lines = list[tuple[str, str, str]](), 0, list[Reject](), 0
    for lines, raw in enumerate(_split(block), start=1):
        number, size = block.first_line + lines - 1, block.line_bytes or len(raw)
        try:
            if size > max_line_bytes:
                raise ValueError(f"line of {size:,} bytes; expected at most max_line_bytes={max_line_bytes:,}")
            if raw.strip(BLANK):
                rows.append(_product(raw, None if block.uid_prefix is None else f"{block.uid_prefix}{number}"))
            else:
                blank += 1
        except ValueError as error:
            rejects.append(Reject(number, str(error), raw[:max_line_bytes]))
    return ParsedBlock(_table(rows), lines, blank, rejects)


def _split(block: LineBlock) -> Iterator[bytes]:
    lines = block.data.split(b"\n")
    return iter(lines[:-1] if not lines[-1] and not block.line_bytes else lines)


def _product(raw: bytes, uid: str | None) -> tuple[str, str, str]:
    """The three fields of a line.

    >>> _product(b'{"uid": "7", "title": "Pan", "content": ""}', None)
    ('7', 'Pan', '')

    Raises:
        ValueError: saying what is wrong with the line.
    """
    value = _object(raw)
    if uid is not None and value.get("uid") is None:
        value["uid"] = uid
    for name in FIELDS:
        if name not in value:
            raise ValueError(f'missing "{name}"; expected uid, title, content')
        text = value[name]
        if not isinstance(text, str):
            raise ValueError(f'"{name}" is {KINDS[type(text)]}; expected a string')
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f'"{name}" holds half a surrogate pair; expected Unicode text')
    return cast("tuple[str, str, str]", tuple(value[name] for name in FIELDS))


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode(), parse_int=_number, parse_float=_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start + 1}; expected UTF-8") from None
    except json.JSONDecodeError as error:
        if INFINITY.match(error.doc, error.pos):
            return _arrow_object(raw)
        raise ValueError(f"malformed JSON at character {error.pos + 1}: {error.msg}; expected one object a line") from None
    except RecursionError:  # deeper than Python's stack; Arrow's parser needs none
        return _arrow_object(raw)
    if not isinstance(value, dict):
        raise ValueError(f"{KINDS.get(type(value), 'a string')}; expected one object a line")
    return cast("dict[str, Any]", value)


def _number(_text: str) -> float:
    return 0.0


def _arrow_object(raw: bytes) -> dict[str, Any]:
    """The three fields of a line, by the fast reader's parser alone."""
    import pyarrow as pa

    try:
        [value] = _parse(raw).to_pylist()
    except (pa.ArrowInvalid, ValueError):
        raise ValueError("malformed JSON; expected one object a line") from None
    return {name: text for name, text in value.items() if text is not None}


def _table(rows: list[tuple[str, str, str]]) -> pa.Table:
    import pyarrow as pa

    columns = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table([pa.array(column, pa.string()) for column in columns], schema=product_schema())


def _read_fast(block: LineBlock, max_line_bytes: int) -> ParsedBlock | None:
    """The block's rows; None when a line is, or may be, anything but one well-formed product."""
    import pyarrow as pa

    lines = _object_lines(block, max_line_bytes)
    if lines is None:
        return None
    try:
        table = _parse(block.data)
        if table.num_rows != lines:
            return None
        if block.uid_prefix is not None:
            table = _numbered(table, block.uid_prefix, block.first_line)
        table.validate(full=True)
    except pa.ArrowInvalid:
        return None
    return None if any(column.null_count for column in table.columns) else ParsedBlock(table, lines)


def _object_lines(block: LineBlock, max_line_bytes: int) -> int | None:
    """How many lines the block has, if all start with { and end with }, in UTF-8, without NUL, none too long.

    A line break can't lie within a JSON string, and } before it with { after it lies between two top-level values. So as
    many values as lines means one value on each line. The parser takes NUL for the end.
    """
    import numpy as np
    import pyarrow as pa

    data = block.data
    text = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(text == ord("\n"))
    if block.line_bytes or not len(text) or b"\0" in data:
        return None
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


def _parse(data: bytes) -> pa.Table:
    import pyarrow as pa
    from pyarrow import json as arrow_json

    return arrow_json.read_json(
        pa.BufferReader(data),
        read_options=arrow_json.ReadOptions(use_threads=False, block_size=len(data) + 1),
        parse_options=arrow_json.ParseOptions(explicit_schema=product_schema(), unexpected_field_behavior="ignore"),
    )


def _numbered(table: pa.Table, prefix: str, first_line: int) -> pa.Table:
    """The table with the line's number for every uid that is null."""
    import pyarrow as pa
    from pyarrow import compute

    numbers = pa.array(range(first_line, first_line + table.num_rows)).cast(pa.string())
    uids = compute.call_function("binary_join_element_wise", [pa.scalar(prefix), numbers, ""])
    return table.set_column(0, "uid", compute.call_function("coalesce", [table["uid"], uids]))
