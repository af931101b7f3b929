"""Stretches are all of a file but what no line holds, wherever they are cut."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.reading.files import stretches
from tasks.reading.files.stretches import cut_stretches, read_stretch
from tasks.reading.rows import LineBlock, Reject, sort_lines

LINES = st.lists(st.sampled_from([b"", b"a", b"bc\r", b"d" * 9, b"e" * 30, b"f" * 31, b"g" * 70]), max_size=9)


def kept(blocks: list[LineBlock], most: int) -> tuple[list[bytes], list[Reject], int, int]:
    """All lines as they are read of blocks, numbered through, with the rejected and the blank ones."""
    rows, rejects, lines, blank = list[bytes](), list[Reject](), 0, 0
    for block in blocks:
        found, parsed = sort_lines(block, most, lambda raw, _: raw)
        rows += found
        rejects += [reject._replace(line=lines + reject.line) for reject in parsed.rejects]
        lines, blank = lines + parsed.lines, blank + parsed.blank
    return rows, rejects, lines, blank


@given(LINES, st.booleans(), st.sampled_from([b"", b"\xef\xbb\xbf"]), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
def test_stretches_are_the_lines_of_the_file(
    lines: list[bytes], ended: bool, bom: bytes, block_bytes: int, most: int, piece_bytes: int
) -> None:
    data = b"\n".join(lines) + b"\n" * ended
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stretches, "PIECE_BYTES", piece_bytes)
        path = Path(folder, "trn.json")
        path.write_bytes(bom + data)
        with path.open("rb") as file:
            cut = list(cut_stretches(file, path, block_bytes, most))
        assert kept([read_stretch(stretch) for stretch in cut], most) == kept([LineBlock(data, 1)] if data else [], most)
        assert all(stretch.size <= 2 * block_bytes + most + 1 for stretch in cut)


@pytest.mark.parametrize("end", [b"", b"\nab", b"\nab\n"])
def test_lines_are_long_beyond_the_limit_wherever_they_are_cut(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "trn.json"
    for size in range(4, 9):
        data = b"ab\nab\n" + b"d" * size + end
        path.write_bytes(data)
        for block_bytes, most in product(range(1, 8), (5, 6)):
            with path.open("rb") as file:
                blocks = [read_stretch(stretch) for stretch in cut_stretches(file, path, block_bytes, most)]
            assert kept(blocks, most) == kept([LineBlock(data, 1)], most)


def test_a_long_line_is_cut_short_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(b"ab\n" + b"c" * 100 + b"\nde")
    with path.open("rb") as file:
        cut = list(cut_stretches(file, path, 2, 10))
    assert [read_stretch(stretch) for stretch in cut] == [
        LineBlock(b"ab\n", 1),
        LineBlock(b"c" * 10, 1, line_bytes=100),
        LineBlock(b"de", 1),
    ]
