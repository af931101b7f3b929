r"""Columns of any file as the text columns of a product, and the text that each kind of value becomes.

    text                     as it is
    whole number             its digits                            7, -3
    number with a fraction   the shortest that reads back so       12.5, 0.1, 1e+20; a whole one without .0
    decimal                  its digits                            12.50
    true, false              true, false
    date, time of a day      ISO 8601                              2024-05-01, 12:30:00
    moment                   ISO 8601, no zeros behind the seconds 2024-05-01T12:30:00, ...00.25, ...00+0000
    null, NaN                the empty text
    bytes                    the UTF-8 that they are, else the row is rejected
    list, object, span       refused by name

A row without a uid, or with an empty one, is known by a digest of its texts: packing a file anew renames nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from tasks.config import IngestConfig
from tasks.refs import InputError

if TYPE_CHECKING:
    import pyarrow as pa

FIELDS = ("uid", "title", "content")
NEEDED = ("title", "content")
"""Of each file; a file without a column of uids gets digests."""
UID_DIGITS = 16

Wanted = Mapping[str, str]
"""{our column: the file's}, uid, title and content first."""
AS_WRITTEN: Wanted = {name: name for name in FIELDS}


def wanted_columns(config: IngestConfig, extra: Sequence[str]) -> Wanted:
    """The columns to read; `extra` ones keep their names.

    >>> wanted_columns(IngestConfig(columns={"title": "nome"}), ["marca"])
    {'uid': 'uid', 'title': 'nome', 'content': 'content', 'marca': 'marca'}
    """
    named = config.columns
    return {"uid": named.uid or "uid", "title": named.title, "content": named.content} | {name: name for name in extra}


def product_schema(extra: Sequence[str] = ()) -> pa.Schema:
    """uid, title, content, and the extra columns: string."""
    import pyarrow as pa

    return pa.schema([(name, pa.string()) for name in (*FIELDS, *extra)])


def check_columns(file: str, there: Sequence[str], wanted: Wanted, config: IngestConfig) -> None:
    """Refuse a file that lacks a column, or has it twice.

    Raises:
        InputError: naming the columns that are there.
    """
    optional = ("uid",) if config.kind in ("auto", "products") else ("uid", "system", "input")
    needed = {ours: theirs for ours, theirs in wanted.items() if ours not in optional or (ours == "uid" and config.columns.uid)}
    for ours, theirs in needed.items():
        if there.count(theirs) == 1:
            continue
        shown = ", ".join(there[:30]) or "none"
        if ours in FIELDS:
            way = f"Set ingest.columns.{ours} to one of these."
        elif config.kind not in ("auto", "products"):
            way = f"ingest.kind={config.kind} needs it: set another kind, or auto."
        else:
            way = f"sharegpt.merged_prompt names it: write one of these as {{{ours}}}."
        if len(there) == 1 or "\ufffd" in shown:
            way += " If they look wrong, set ingest.csv.encoding or ingest.csv.delimiter."
        what = "is there twice" if theirs in there else "is not there"
        raise InputError(f"{file}: column {theirs!r} {what}: got columns {shown}; expected one for {ours}. {way}")


def to_text(column: pa.Array, file: str) -> tuple[pa.Array, pa.Array | None]:
    """A column's values as text without nulls, and, where some bytes are no UTF-8, which values are text.

    Raises:
        InputError: for a column of lists, objects or whatever has no text.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return to_text(column.storage, file)
    if pa.types.is_floating(kind):
        column = pc.if_else(pc.is_nan(column), None, column)
    elif pa.types.is_timestamp(kind):
        column = _moments(column)
    elif pa.types.is_time(kind):
        column = pc.replace_substring_regex(column.cast(pa.string()), r"\.0+$|(\.\d*[1-9])0+$", r"\1")
    elif _is_bytes(kind):
        return _decoded(column.cast(pa.large_binary()))
    elif not (
        pa.types.is_null(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_date(kind)
    ):
        raise InputError(
            f"{file}: a column of {kind} has no text: expected text, numbers, dates or truth values. "
            "Name another column in ingest.columns, or write it as text first."
        )
    return pc.fill_null(column.cast(pa.string()), ""), None


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    views = (pa.string_view(), pa.binary_view())
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or kind in views
    )


def _moments(column: pa.Array) -> pa.Array:
    import pyarrow.compute as pc

    written = "%Y-%m-%dT%H:%M:%S" + ("%z" if column.type.tz else "")
    return pc.replace_substring_regex(pc.strftime(column, written), r"\.0+($|[+-])|(\.\d*[1-9])0+($|[+-])", r"\2\1\3")


def _decoded(column: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = pc.fill_null(column, b"")
    try:
        return column.cast(pa.large_string()).cast(pa.string()), None
    except pa.ArrowInvalid:
        whole = pa.array([_is_text(value) for value in column.to_pylist()])
        return pc.if_else(whole, column, b"").cast(pa.large_string()).cast(pa.string()), whole


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def with_uids(table: pa.Table) -> pa.Table:
    """The table with a digest of a row's other columns for every uid that is null or empty.

    >>> import pyarrow as pa
    >>> table = pa.table({"uid": ["7", None], "title": ["Pan", "Pan"], "content": ["Iron.", "Iron."]})
    >>> with_uids(table)["uid"].to_pylist()
    ['7', '428179b11e71663d']
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    given = pc.fill_null(pc.greater(pc.binary_length(table["uid"]), 0), False)
    if not table.num_rows or pc.all(given).as_py():
        return table
    rows = zip(*(table[name].to_pylist() for name in table.column_names if name != "uid"), strict=True)
    digests = pa.array([digest_row(row) for row in rows])
    return table.set_column(0, "uid", pc.if_else(given, table["uid"], digests))


def digest_row(texts: Iterable[Any]) -> str:
    """16 hex digits of the SHA-256 of a row's texts."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()[:UID_DIGITS]


def number_text(written: str) -> str:
    """The text of a JSON number: whole ones keep their digits, others are written as Arrow writes them.

    >>> number_text("007"), number_text("12.50"), number_text("1e2")
    ('007', '12.5', '100')
    """
    import pyarrow as pa

    if written.lstrip("-").isdigit():
        return written
    return cast("str", pa.array([float(written)]).cast(pa.string())[0].as_py())
