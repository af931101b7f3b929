r"""The format of a file's content: told by how it begins, and only where that says nothing by its name.

PAR1...                       Parquet
ARROW1..., \xff\xff\xff\xff  Arrow IPC, as a file or as a stream
{"..., an empty file          JSON lines
[{..., []                     a JSON array of objects
text named .csv or .tsv       delimited; so is other text whose lines have equally many fields
text named .json, .jsonl      JSON lines whose first line is bad
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from tasks.config import CsvConfig
from tasks.refs import InputError

BOM = codecs.BOM_UTF8
WIDE = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""{byte order mark: the encoding that reads it}."""
UNREAD = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"7z\xbc\xaf": "7z",
    b"\x1f\x8b": "gzip within an archive",
    b"\x28\xb5\x2f\xfd": "zstd within an archive",
    b"ORC": "ORC",
    b"Obj\x01": "Avro",
    b"SQLite format 3": "SQLite",
    b"\x89HDF": "HDF5",
    b"%PDF": "PDF",
    b"\x80\x04": "pickle",
    b"\x80\x05": "pickle",
}
"""{beginning of content that is not read: its format}."""
KNOWN = (
    "JSON lines, a JSON array, CSV, TSV, Parquet, Arrow IPC or a directory of the library datasets, plain or as .gz, .zst or .zip"
)
DELIMITERS = (",", ";", "\t", "|")
OBJECT = re.compile(rb'\{\s*(["}]|\Z)')
ARRAY = re.compile(rb"\[\s*([{\]]|\Z)")
LINES_NAME = re.compile(r"\.(jsonl?|ndjson)$", re.IGNORECASE)
TABLE_NAME = re.compile(r"\.(csv|tsv|tab)$", re.IGNORECASE)
SNIFFED_LINES = 50
WHITE = b" \t\r\n"


class FileFormat(StrEnum):
    """How rows are written in a file; the value is its name for people."""

    LINES = "JSON lines"
    ARRAY = "a JSON array"
    DELIMITED = "delimited text"
    PARQUET = "Parquet"
    ARROW_FILE = "an Arrow IPC file"
    ARROW_STREAM = "an Arrow IPC stream"


class Dialect(NamedTuple):
    """How delimited text is written."""

    delimiter: str
    quote: str | None
    encoding: str


def find_format(head: bytes, name: str) -> FileFormat:
    """The format of what begins so, in a file of this name.

    >>> find_format(b'PAR1...', "trn.json"), find_format(b'[{"uid": "7"}]', "trn.json")
    (<FileFormat.PARQUET: 'Parquet'>, <FileFormat.ARRAY: 'a JSON array'>)

    Raises:
        InputError: when it is none that is read, naming those that are.
    """
    for magic, found in (
        (b"PAR1", FileFormat.PARQUET),
        (b"ARROW1", FileFormat.ARROW_FILE),
        (b"\xff" * 4, FileFormat.ARROW_STREAM),
    ):
        if head.startswith(magic):
            return found
    if unread := next((format_name for magic, format_name in UNREAD.items() if head.startswith(magic)), None):
        raise _unknown(name, unread)
    text = head.removeprefix(BOM).lstrip(WHITE)
    if OBJECT.match(text) or not text:
        return FileFormat.LINES
    if ARRAY.match(text):
        return FileFormat.ARRAY
    wide = next((encoding for mark, encoding in WIDE.items() if head.startswith(mark)), None)
    if TABLE_NAME.search(name) or (wide is None and not LINES_NAME.search(name) and _is_table(head)):
        return FileFormat.DELIMITED
    if LINES_NAME.search(name) and wide is None:
        return FileFormat.LINES
    raise _unknown(name, "UTF-16" if wide else "unknown format")


def _unknown(name: str, found: str) -> InputError:
    return InputError(f"{name}: {found}: got a file in that format; expected {KNOWN}. Convert it first.")


def _is_table(head: bytes) -> bool:
    """Whether every line of a text has as many fields as the first, and that more than one."""
    try:
        text = head[: head.rfind(b"\n") + 1 or len(head)].decode()
    except UnicodeDecodeError:
        return False
    return "\0" not in text and any(_regularity(text, delimiter, '"') == 1 for delimiter in DELIMITERS)


def find_dialect(head: bytes, name: str, config: CsvConfig) -> Dialect:
    r"""How a delimited text is written: as the settings say, else as it looks.

    >>> find_dialect("Código;Nome\\n7;Pão".encode(), "produtos.csv", CsvConfig())
    Dialect(delimiter=';', quote='"', encoding='utf-8')
    """
    found = next((encoding for mark, encoding in WIDE.items() if head.startswith(mark)), "utf-8")
    encoding = config.encoding or found
    text = head.removeprefix(BOM).decode(encoding, errors="replace").lstrip("\ufeff")
    if config.delimiter is not None:
        return Dialect(config.delimiter, config.quote, encoding)
    if name.lower().endswith((".tsv", ".tab")):
        return Dialect("\t", config.quote, encoding)
    return Dialect(max(DELIMITERS, key=lambda delimiter: _regularity(text, delimiter, config.quote)), config.quote, encoding)


def _regularity(text: str, delimiter: str, quote: str | None) -> float:
    """The share of the first lines with as many fields as the header; 0 where that has one."""
    rows = [row for row in _rows(text.splitlines(keepends=True)[:SNIFFED_LINES], delimiter, quote) if row]
    return sum(len(row) == len(rows[0]) for row in rows) / len(rows) if rows and len(rows[0]) > 1 else 0.0


def _rows(lines: Iterable[str], delimiter: str, quote: str | None) -> Iterable[list[str]]:
    return csv.reader(lines, delimiter=delimiter, quotechar=quote, quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE)


def read_header(head: bytes, dialect: Dialect) -> list[str]:
    """The column names of a delimited text."""
    text = head.removeprefix(BOM).decode(dialect.encoding, errors="replace").lstrip("\ufeff")
    return next((row for row in _rows(text.splitlines(keepends=True), dialect.delimiter, dialect.quote) if row), [])
