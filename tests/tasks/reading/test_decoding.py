"""The decoder says what the strict reader says, or nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.reading.columns import AS_WRITTEN, Wanted, digest_row
from tasks.reading.decoding import LineDecoder
from tasks.reading.rows import LineBlock, read_strict
from tests.support.fuzz import MUTATIONS, good_line, mutated_lines

MOST = 2**20
GOOD = b'{"uid": "7", "title": "Pan", "content": "Iron."}'
DECODER = LineDecoder(AS_WRITTEN)


def check(data: bytes, wanted: Wanted = AS_WRITTEN, most: int = MOST) -> list[tuple[str, ...]] | None:
    """The decoded rows, which are all that the strict reader finds; or None."""
    decoder = DECODER if wanted is AS_WRITTEN else LineDecoder(wanted)
    frame = decoder.read(LineBlock(data, 1), most)
    if frame is None:
        return None
    strict = read_strict(LineBlock(data, 1), most, wanted)
    assert (strict.rejects, strict.blank, strict.lines) == ([], 0, frame.height)
    assert frame.columns == strict.table.column_names
    assert frame.rows() == [tuple(row.values()) for row in strict.table.to_pylist()]
    return frame.rows()


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (GOOD, ("7", "Pan", "Iron.")),
        (GOOD + b"\r", ("7", "Pan", "Iron.")),
        (b'{"content": "c", "x": [[{"uid": 1}], -0.5e-7, true, null], "uid": "u", "title": "t"}', ("u", "t", "c")),
        (b'{"uid": "u", "title": "a", "content": "c", "title": "b"}', ("u", "b", "c")),
        (b'{"uid": "u", "title": "a", "content": "c", "t\\u0069tle": "b"}', ("u", "b", "c")),
        (b'{"uid": "u", "title": null, "content": "\\u00e9\\n\\ud83d\\ude00"}', ("u", "", "é\n😀")),
        (b'{"uid": "u", "title": "\x7f\\u0000", "content": ""}', ("u", "\x7f\0", "")),
        (b'{"title": "a", "content": "b"}', (digest_row(["a", "b"]), "a", "b")),
        (b'{"uid": null, "title": "a", "content": "b"}', (digest_row(["a", "b"]), "a", "b")),
        (b'{"uid": "", "title": "a", "content": "b"}', (digest_row(["a", "b"]), "a", "b")),
    ],
)  # fmt: skip
def test_a_well_formed_line_is_decoded(line: bytes, row: tuple[str, str, str]) -> None:
    for data in (line, line + b"\n", line + b"\n" + line):
        assert check(data) == [row] * (1 + data.count(line + b"\n" + line))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        GOOD + GOOD + b"\n\n",
        GOOD + b" " + GOOD + b"\n \n",
        GOOD + b"\n\n" + GOOD,
        b'{"title": "a", "content":\n"b"}' + GOOD,
        b'{"title": "a", "content":\n"b"}\n' + GOOD + GOOD,
        b"[%s]" % GOOD,
        b'{"uid": "7", "title": "a"}',
        b'{"uid": 7, "title": "a", "content": "b"}',
        b'{"uid": "7", "title": true, "content": "b"}',
        b'{"uid": "7", "title": ["a"], "content": "b"}',
        b'{"uid": "7", "title": "\\ud800", "content": "b"}',
        b'{"uid": "7", "title": "\\udc00", "content": "b"}',
        b'{"uid": "7", "title": "\xff", "content": "b"}',
        b'{"uid": "7", "title": "a", "content": "b", "x": "\xff"}',
        b'{"uid": "7", "title": "a", "content": "b", "\xff": 1}',
        b'{"uid": "7", "title": "a", "content": "b", "x": NaN}',
        b'{"uid": "7", "title": "a", "content": "b", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
        b"\xef\xbb\xbf" + GOOD,
    ],
)  # fmt: skip
def test_any_other_block_is_not(data: bytes) -> None:
    assert check(data) is None


def test_a_line_over_the_limit_is_not() -> None:
    assert check(GOOD + b"\n" + GOOD, most=len(GOOD)) == [("7", "Pan", "Iron.")] * 2
    assert check(GOOD + b"\n" + GOOD, most=len(GOOD) - 1) is None


def test_columns_of_any_name_are_decoded() -> None:
    line = '{"a b": "7", "título": "Chá", "": "x", "column_0": "y", "uid": 1}'.encode()
    wanted = {"uid": "a b", "title": "título", "content": "título", "": "", "column_0": "column_0", "none": "none"}
    assert check(line, wanted) == [("7", "Chá", "Chá", "x", "y", "")]
    assert check(b'{"uid": "7", "a\\"b": "t", "content": "c"}', {**AS_WRITTEN, "title": 'a"b'}) is None


@given(
    st.lists(st.tuples(st.sampled_from([None, *MUTATIONS]), st.randoms(use_true_random=False)), max_size=4),
    st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    st.booleans(),
)
def test_any_block_is_decoded_as_the_strict_reader_reads_it(
    changes: list[tuple[str | None, Any]], end: bytes, ended: bool
) -> None:
    good = [good_line(rng, number) for number, (_, rng) in enumerate(changes)]
    lines = [MUTATIONS[name](rng, line) if name else line for (name, rng), line in zip(changes, good, strict=True)]
    check(end.join(lines) + end * (ended and bool(lines)), most=5000)


@given(
    st.dictionaries(
        st.sampled_from(["uid", "title", "content", "x"]), st.text() | st.integers() | st.none() | st.lists(st.floats())
    )
)
def test_any_object_is_decoded_as_the_strict_reader_reads_it(row: dict[str, Any]) -> None:
    check(json.dumps(row).encode())


def test_single_mutated_lines_are_decoded_as_the_strict_reader_reads_them() -> None:
    decoded = [check(line) for line in mutated_lines(4000, seed=6)]
    assert 400 < sum(rows is not None for rows in decoded) < 3600
