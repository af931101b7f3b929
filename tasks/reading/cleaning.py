"""Cleaning rules for product texts, each a function over a whole column; only rows that a rule concerns pay for it."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tasks.config import IngestConfig
from tasks.reading.columns import FIELDS, product_schema
from tasks.reading.distinct import Hashes
from tasks.tables.arrow import is_conversations

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

REFERENCE = r"&(?:#[0-9]+;?|#[xX][0-9a-fA-F]+;?|[^\t\n\f <&#;]{1,32};?)"
"""The references that html.unescape looks at. Source: html._charref, Python 3.11."""
MANY_REFERENCES = 4096
"""A block with more different ones is no ordinary text and is decoded row by row."""
UNDEFINED_1252 = (0x81, 0x8D, 0x8F, 0x90, 0x9D)
WINDOWS_1252 = {chr(code): bytes([code]).decode("cp1252") for code in range(0x80, 0xA0) if code not in UNDEFINED_1252}
C1_LEAD = b"\xc2"
"""First byte of U+0080 to U+00BF in UTF-8; looking for it is ten times as fast as looking for C1."""
C1 = "[\x80-\x9f]"
INK = r"[^\s\x1c-\x1f]"
"""Anything but white space, as Python's str.isspace has it."""
MIX = np.uint64(0x9E3779B97F4A7C15)


class CleanRows(NamedTuple):
    """Rows to keep unless they are duplicates."""

    table: pa.Table
    hashes: Hashes
    dropped: dict[str, int]
    """Rows left out, by reason."""


def clean_rows(frame: pl.DataFrame, config: IngestConfig) -> CleanRows:
    """Clean products and drop those that are empty."""
    import polars as pl

    frame, dropped = drop_empty(clean(frame, config), config)
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(product_schema(frame.columns[len(FIELDS) :]))
    return CleanRows(table, hash_texts(frame), dropped)


def clean(frame: pl.DataFrame, config: IngestConfig) -> pl.DataFrame:
    r"""The frame with the chosen rules applied to every column but the uids.

    >>> import polars as pl
    >>> clean(pl.DataFrame({"title": ["R&amp;D"], "content": ["\x93Judith Kerr&#8217;s\x94"]}), IngestConfig()).row(0)
    ('R&D', '“Judith Kerr’s”')
    """
    for name in (name for name in frame.columns if name != "uid"):
        texts = frame[name]
        if config.decode_entities:
            texts = decode_references(texts)
        if config.decode_c1:
            texts = decode_c1(texts)
        frame = frame.with_columns(texts)
    return frame


def decode_references(texts: pl.Series) -> pl.Series:
    """`html.unescape` of every text, as one pass over the references that occur.

    At one place the longest of the references that occur anywhere is the one that `html.unescape` finds there: a longer
    one that starts alike would have been found instead.
    """
    import polars as pl

    held = texts.str.contains("&", literal=True)
    if not held.any():
        return texts
    concerned = texts.filter(held)
    found: list[str] = concerned.str.extract_all(REFERENCE).explode().drop_nulls().unique().to_list()
    if len(found) > MANY_REFERENCES:
        return _put(texts, held, pl.Series([html.unescape(text) for text in concerned], dtype=pl.String))
    table = {text: html.unescape(text) for text in sorted(found, key=lambda text: (-len(text), text))}
    return _put(texts, held, _replaced(concerned, {text: to for text, to in table.items() if text != to}))


def decode_c1(texts: pl.Series) -> pl.Series:
    """Code points U+0080 to U+009F as the Windows-1252 characters that they were meant to be, where there is one."""
    import polars as pl

    held = texts.cast(pl.Binary).bin.contains(C1_LEAD)
    concerned = texts.filter(held)
    return _put(texts, held, _replaced(concerned, WINDOWS_1252)) if concerned.str.contains(C1).any() else texts


def drop_empty(frame: pl.DataFrame, config: IngestConfig) -> tuple[pl.DataFrame, dict[str, int]]:
    """The rows whose title and content hold more than white space, and how many were dropped for want of which."""
    dropped: dict[str, int] = {}
    for name, wanted in (("title", config.drop_empty_title), ("content", config.drop_empty_content)):
        if wanted:
            kept = frame.filter(frame[name].str.contains(INK))
            dropped[f"empty {name}"] = frame.height - kept.height
            frame = kept
    return frame, dropped


def hash_texts(frame: pl.DataFrame) -> Hashes:
    """128 bits for each row's texts; equal with one version of polars only."""
    first, *others = (frame[name] for name in frame.columns if name != "uid")
    halves: list[Hashes] = []
    for seed in (1, 3):
        half = first.hash(seed).to_numpy()
        for column in others:
            half = half * MIX + column.hash(seed + 1).to_numpy()
        halves.append(half)
    return np.stack(halves)


def hash_rows(table: pa.Table) -> Hashes:
    """As `hash_texts`, of products or of conversations."""
    import polars as pl

    if not is_conversations(table.schema):
        return hash_texts(pl.DataFrame(table))
    rows = zip(*(table[name].to_pylist() for name in ("system", "prompts", "answers")), strict=True)
    return hash_texts(pl.DataFrame({"text": [json.dumps(row) for row in rows]}, schema={"text": pl.String}))


def _replaced(texts: pl.Series, table: Mapping[str, str]) -> pl.Series:
    return texts.str.replace_many(list(table), list(table.values()), leftmost=True) if table else texts


def _put(texts: pl.Series, held: pl.Series, new: pl.Series) -> pl.Series:
    """The texts with those that are held replaced by the new ones, in order."""
    return texts.clone().scatter(held.arg_true(), new)
