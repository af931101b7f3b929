"""Each cleaning rule equals its standard-library definition, and touches nothing else."""

from __future__ import annotations

import html
import sys

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.config import IngestConfig
from tasks.reading import cleaning as module
from tasks.reading.cleaning import clean, decode_c1, decode_references, drop_empty, hash_texts
from tests.support.reference import CP1252

PIECES = (
    "&", "#", "x", ";", "amp", "AMP", "not", "notit", "lt", "8217", "x2019", "0", "110000", "xD800", "128", " ", "é", "&&",
    "&amp;", "&#147;",
)  # fmt: skip
REFERENCES = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=20)


def series(texts: list[str]) -> pl.Series:
    return pl.Series("title", texts, dtype=pl.String)


@given(st.lists(REFERENCES, max_size=6))
def test_references_are_decoded_as_html_unescape_does(texts: list[str]) -> None:
    assert decode_references(series(texts)).to_list() == [html.unescape(text) for text in texts]


@given(st.lists(REFERENCES, max_size=6))
def test_many_different_references_are_decoded_alike(texts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MANY_REFERENCES", 1)
        assert decode_references(series(texts)).to_list() == [html.unescape(text) for text in texts]


@given(st.lists(st.text(st.characters(max_codepoint=0x2FF, exclude_categories=["Cs"]), max_size=8), max_size=5))
def test_c1_code_points_become_windows_1252(texts: list[str]) -> None:
    assert decode_c1(series(texts)).to_list() == [text.translate(CP1252) for text in texts]


def test_rules_are_switches() -> None:
    frame = pl.DataFrame({"uid": ["1"], "title": ["R&amp;D"], "content": ["\x93a\x94 &lt;"]})
    off = IngestConfig(decode_entities=False, decode_c1=False)
    assert clean(frame, off).equals(frame)
    assert clean(frame, IngestConfig(decode_c1=False)).row(0) == ("1", "R&D", "\x93a\x94 <")
    assert clean(frame, IngestConfig(decode_entities=False)).row(0) == ("1", "R&amp;D", "“a” &lt;")


def test_decoding_goes_one_level_deep() -> None:
    assert decode_references(series(["&amp;lt;", "&amp;amp;amp;"])).to_list() == ["&lt;", "&amp;amp;"]


@pytest.mark.parametrize("column", ["title", "content"])
def test_text_of_white_space_alone_is_empty(column: str) -> None:
    blanks = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
    texts = [*blanks, "".join(blanks), "", "a", " \u200b", "\0"]
    frame = pl.DataFrame({"title": ["t"] * len(texts), "content": ["c"] * len(texts)}).with_columns(pl.Series(column, texts))
    kept, dropped = drop_empty(frame, IngestConfig())
    assert kept[column].to_list() == [text for text in texts if text.strip()]
    assert dropped[f"empty {column}"] == len(blanks) + 2
    assert drop_empty(frame, IngestConfig(drop_empty_title=False, drop_empty_content=False)) == (frame, {})


@given(st.lists(st.tuples(st.text(max_size=2), st.text(max_size=2)), max_size=8))
def test_equal_rows_and_only_those_have_equal_hashes(rows: list[tuple[str, str]]) -> None:
    frame = pl.DataFrame(rows, schema={"title": pl.String, "content": pl.String}, orient="row")
    hashes = hash_texts(frame)
    assert hashes.shape == (2, len(rows))
    assert len(np.unique(hashes, axis=1).T) == len(set(rows))
