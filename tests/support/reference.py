"""What ingest must give, written down as plainly as possible: one line at a time, with the standard library."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import pyarrow as pa

FIELDS = ("uid", "title", "content")
CP1252 = {code: bytes([code]).decode("cp1252") for code in range(0x80, 0xA0) if code not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)}
DEEP = re.compile(rb"(\[{500,})(\]{500,})")
INFINITY = re.compile(rb": ?-?Inf(?=[,}])")


class Number(str):
    """As it is written."""


class Expected(NamedTuple):
    rows: list[tuple[str, str, str]]
    rejected: list[int]
    """Line numbers, from 1."""
    dropped: Counter[str]
    lines: int


def parse(raw: bytes) -> tuple[str, str, str]:
    """A line's fields; ValueError for a bad line. Too deep for Python's parser is not bad, nor is Arrow's Inf elsewhere."""
    shallow = DEEP.sub(lambda run: b"0" if len(run[1]) == len(run[2]) else run[0][:1], INFINITY.sub(b": []", raw))
    value: Any = json.loads(shallow.decode("utf-8"), parse_int=Number, parse_float=Number)
    if not isinstance(value, dict):
        raise ValueError("no object")
    if not {"title", "content"} <= set(value):
        raise ValueError("no title or no content")
    uid, title, content = (text(value.get(name)) for name in FIELDS)
    return uid or hashlib.sha256(json.dumps([title, content], ensure_ascii=False).encode()).hexdigest()[:16], title, content


def text(value: Any) -> str:
    """A value's text; ValueError where it has none."""
    if value is None or value != value:
        return ""
    if isinstance(value, (list, dict)):
        raise ValueError("no text")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(value)  # an infinity
    if isinstance(value, Number) and not value.lstrip("-").isdigit():
        return str(pa.scalar(float(value)).cast(pa.string()))
    value.encode("utf-8")  # refuses half a surrogate pair
    return str(value)


def ingest(lines: Iterable[bytes], max_line_bytes: int) -> Expected:
    """All rules of the default recipe."""
    rows, rejected, dropped, seen, count = list[tuple[str, str, str]](), list[int](), Counter[str](), set[tuple[str, str]](), 0
    for count, raw in enumerate(lines, start=1):
        if not raw.strip(b" \t\r"):
            dropped["blank line"] += 1
            continue
        try:
            if len(raw) > max_line_bytes:
                raise ValueError("too long")
            uid, title, content = parse(raw)
        except ValueError:
            rejected.append(count)
            continue
        title, content = (html.unescape(text).translate(CP1252) for text in (title, content))
        if not title.strip():
            dropped["empty title"] += 1
        elif not content.strip():
            dropped["empty content"] += 1
        elif (title, content) in seen:
            dropped["duplicate"] += 1
        else:
            seen.add((title, content))
            rows.append((uid, title, content))
    return Expected(rows, rejected, dropped, count)
