"""A line means what the strict reader says; the fast reader says the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.reading.columns import digest_row
from tasks.reading.rows import LineBlock, ParsedBlock, read_block, read_strict
from tests.support import reference
from tests.support.fuzz import MUTATIONS, good_line, mutated_lines

MOST = 2**20
GOOD = b'{"uid": "7", "title": "Pan", "content": "Iron."}'


def rows(read: ParsedBlock) -> list[tuple[str, ...]]:
    return [tuple(row.values()) for row in read.table.to_pylist()]


def told(read: ParsedBlock) -> tuple[Any, ...]:
    return rows(read), read.lines, read.blank, [tuple(reject) for reject in read.rejects]


def reason(line: bytes) -> str:
    [reject] = read_block(LineBlock(line, 1), MOST).rejects
    return reject.reason


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (GOOD, ("7", "Pan", "Iron.")),
        (b"  " + GOOD + b" \r", ("7", "Pan", "Iron.")),
        (b'{"content": "c", "x": [[{"uid": 1}]], "uid": "u", "title": "t"}', ("u", "t", "c")),
        (b'{"uid": "u", "title": "a", "content": "c", "title": "b"}', ("u", "b", "c")),
        (b'{"uid": "u", "title": "", "content": "\\u00e9\\n\\ud83d\\ude00", "x": NaN}', ("u", "", "é\n😀")),
        (b'{"uid": "u", "title": "t", "content": "c", "x": -Inf}', ("u", "t", "c")),
        (b'{"uid": 7, "title": 12.50, "content": true}', ("7", "12.5", "true")),
        (b'{"uid": "u", "title": null, "content": NaN}', ("u", "", "")),
        (b'{"uid": "u", "title": "t", "content": "c", "x": ' + b"9" * 9999 + b"}", ("u", "t", "c")),
        (b'{"uid": "u", "title": "t", "content": "c", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", ("u", "t", "c")),
    ],
    ids=["plain", "spaces and CR", "further keys", "key twice", "escapes", "infinity", "numbers", "nulls", "huge", "deep"],
)  # fmt: skip
def test_line_is_a_product(line: bytes, row: tuple[str, str, str]) -> None:
    assert rows(read_block(LineBlock(line, 1), MOST)) == rows(read_strict(LineBlock(line, 1), MOST)) == [row]


@pytest.mark.parametrize("ended", [True, False])
def test_nul_is_no_end_wherever_it_stands(ended: bool) -> None:
    line = GOOD.replace(b"}", b', "x": [1, 2.5, -3e4, {"y": null}]}')
    data = b"\n".join([line] * 2) + b"\n" * ended
    for at in range(len(data) + 1):
        for nul in (b"\0", b"\0}", b"}\0"):
            put = data[:at] + nul + data[at:]
            assert told(read_block(LineBlock(put, 1), MOST)) == told(read_strict(LineBlock(put, 1), MOST))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"uid": "7", "content": "c"}', 'missing "title"; expected uid, title, content'),
        (b'{"uid": "7", "title": "t", "content": ["c"]}', '"content" is a list; expected text'),
        (b'{"uid": "7", "title": "t", "content": {}}', '"content" is an object; expected text'),
        (b'{"uid": "7", "title": "\\ud800", "content": ""}', '"title" holds half a surrogate pair; expected Unicode text'),
        (b'{"uid": "7", "title": "\xff"}', "invalid UTF-8 at byte 24; expected UTF-8"),
        (
            b'{"uid": "7", ',
            "malformed JSON at character 14: Expecting property name enclosed in double quotes; expected one object a line",
        ),
        (GOOD + GOOD, "malformed JSON at character 49: Extra data; expected one object a line"),
        (
            b"\xef\xbb\xbf" + GOOD,
            "malformed JSON at character 1: Unexpected UTF-8 BOM (decode using utf-8-sig); expected one object a line",
        ),
        (b"[1]", "a list; expected one object a line"),
        (b'"text"', "a string; expected one object a line"),
        (b"[" * 10**5, "malformed JSON; expected one object a line"),
    ],
)  # fmt: skip
def test_reject_says_what_is_wrong(line: bytes, expected: str) -> None:
    assert reason(line) == expected


def test_line_over_the_limit_is_rejected_and_its_neighbours_kept() -> None:
    block = LineBlock(GOOD + b"\n" + GOOD.replace(b"Iron.", b"i" * 1024) + b"\n" + GOOD, 5)
    read = read_block(block, 1000)
    assert len(rows(read)) == 2
    assert [(reject.line, reject.reason) for reject in read.rejects] == [
        (6, "line of 1,067 bytes; expected at most max_line_bytes=1,000")
    ]
    assert len(read.rejects[0].raw) == 1000


def test_rows_without_uid_are_known_by_their_content() -> None:
    block = LineBlock(
        b'{"title": "a", "content": "b"}\n\n{"title": "c", "content": "d", "uid": null}\n'
        b'{"uid": "", "title": "a", "content": "b"}',
        3,
    )
    first, second = digest_row(["a", "b"]), digest_row(["c", "d"])
    assert rows(read_block(block, MOST)) == [(first, "a", "b"), (second, "c", "d"), (first, "a", "b")]
    good = LineBlock(b'{"title": "a", "content": "b"}\n{"title": "c", "content": "d", "uid": "7"}', 3)
    assert rows(read_block(good, MOST)) == rows(read_strict(good, MOST)) == [(first, "a", "b"), ("7", "c", "d")]


def test_columns_of_any_name_are_read_and_further_ones_kept() -> None:
    wanted = {"uid": "asin", "title": "nome", "content": "descri\u00e7\u00e3o", "marca": "marca"}
    lines = [
        '{"asin": "7", "nome": "P\u00e3o", "descri\u00e7\u00e3o": "De trigo.", "uid": "x", "marca": "Aurora"}',
        '{"asin": "8", "nome": "Ch\u00e1", "descri\u00e7\u00e3o": ""}',
    ]
    block = LineBlock("\n".join(lines).encode(), 1)
    assert rows(read_block(block, MOST, wanted)) == [("7", "P\u00e3o", "De trigo.", "Aurora"), ("8", "Ch\u00e1", "", "")]
    assert rows(read_strict(block, MOST, wanted)) == rows(read_block(block, MOST, wanted))


def test_empty_block_has_no_lines() -> None:
    assert told(read_block(LineBlock(b"", 1), MOST)) == ([], 0, 0, [])


def test_fast_reader_reads_what_is_well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("tasks.reading.rows.read_strict")
    assert rows(read_block(LineBlock(GOOD + b"\r\n" + GOOD + b"\n", 1), MOST)) == [("7", "Pan", "Iron.")] * 2


@given(
    st.lists(st.tuples(st.sampled_from([None, *MUTATIONS]), st.randoms(use_true_random=False)), max_size=4),
    st.booleans(),
)
def test_both_readers_agree_on_any_block(changes: list[tuple[str | None, Any]], ended: bool) -> None:
    good = [good_line(rng, number) for number, (_, rng) in enumerate(changes)]
    lines = [MUTATIONS[name](rng, line) if name else line for (name, rng), line in zip(changes, good, strict=True)]
    block = LineBlock(b"\n".join(lines) + b"\n" * (ended and bool(lines)), 10)
    assert told(read_block(block, 5000)) == told(read_strict(block, 5000))


@given(
    st.dictionaries(
        st.sampled_from(["uid", "title", "content", "x"]), st.text() | st.integers() | st.none() | st.lists(st.floats())
    )
)
def test_both_readers_agree_on_any_object(row: dict[str, Any]) -> None:
    block = LineBlock(json.dumps(row).encode(), 1)
    assert told(read_block(block, MOST)) == told(read_strict(block, MOST))


def test_single_mutated_lines_are_read_as_the_standard_library_reads_them() -> None:
    for line in mutated_lines(4000, seed=5):
        for part in line.split(b"\n"):
            read = read_block(LineBlock(part + b"\n", 1), MOST)
            expected = reference.ingest([part], MOST)
            assert (len(read.rejects), read.blank) == (len(expected.rejected), expected.dropped["blank line"]), part
            assert rows(read) == ([] if expected.rejected or read.blank else [reference.parse(part)]), part
