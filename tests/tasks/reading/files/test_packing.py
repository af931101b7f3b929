"""Files of any wrapping come apart into blocks of whole lines."""

from __future__ import annotations

import gzip
import io
import zipfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tasks.config import IngestConfig
from tasks.reading.columns import AS_WRITTEN
from tasks.reading.files.blocks import cut_lines, read_blocks
from tasks.reading.files.formats import KNOWN
from tasks.reading.rows import LineBlock
from tasks.refs import InputError

CONFIG = IngestConfig(block_bytes=2**16)
LINES = b"".join(b'{"uid": "%d", "title": "t", "content": "%s"}\n' % (number, b"x" * (number % 90)) for number in range(4000))


def read(path: Path, config: IngestConfig = CONFIG) -> bytes:
    return b"".join(block.data for block, _ in read_blocks(path, config, AS_WRITTEN) if isinstance(block, LineBlock))


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as refused:
        read(path)
    return str(refused.value)


def test_wrapping_shows_in_the_content_not_in_the_name(tmp_path: Path) -> None:
    packed = {
        "plain": LINES,
        "bom": b"\xef\xbb\xbf" + LINES,
        "gz": gzip.compress(LINES),
        "two gz": gzip.compress(LINES[:5000]) + gzip.compress(LINES[5000:]),
        "zst": zstandard.compress(LINES),
        "two zst": zstandard.compress(LINES[:5000]) + zstandard.compress(LINES[5000:]),
    }
    for name, data in packed.items():
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == LINES, name


@pytest.mark.parametrize("name", ["trn.json", "LF-Amazon-1.3M.raw/trn.json.gz", "trn.json.zst"])
def test_archive_yields_its_training_data(tmp_path: Path, name: str) -> None:
    data = {"gz": gzip.compress, "st": zstandard.compress}.get(name[-2:], bytes)(LINES)
    path = zipped(tmp_path / "raw.zip", {"a/tst.json.gz": b"other", name: data, "lbl.json": b"labels", "__MACOSX/trn.json": b""})
    assert read(path) == LINES


def test_archive_of_one_data_file_yields_it(tmp_path: Path) -> None:
    assert read(zipped(tmp_path / "raw.zip", {"readme.txt": b"hello", "products.jsonl": LINES})) == LINES


def test_archive_without_one_data_file_is_refused(tmp_path: Path) -> None:
    assert refusal(zipped(tmp_path / "raw.zip", {"a.json": LINES, "b.json": LINES})) == (
        "raw.zip: got a.json, b.json; expected one trn.json, trn.json.gz or other data file in it. "
        "Unpack it and name the file to read in ingest.sources."
    )
    assert refusal(zipped(tmp_path / "empty.zip", {})).startswith("empty.zip: ")


@pytest.mark.parametrize("name", ["../trn.json", "/etc/trn.json", "a/../../trn.json", "..\\trn.json"])
def test_archive_with_a_path_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    assert refusal(zipped(tmp_path / "raw.zip", {name: LINES})) == (
        f"raw.zip: got a member named {name!r}; expected names within the archive. Do not trust it."
    )


def test_zip_within_a_zip_is_refused(tmp_path: Path) -> None:
    inner = zipped(tmp_path / "inner.zip", {"trn.json": LINES}).read_bytes()
    assert "a zip within a zip" in refusal(zipped(tmp_path / "raw.zip", {"trn.json": inner}))


@pytest.mark.parametrize("kind", ["gz", "zst", "zip"])
def test_damaged_file_is_named(tmp_path: Path, kind: str) -> None:
    packed = {
        "gz": gzip.compress(LINES),
        "zst": zstandard.compress(LINES),
        "zip": zipped(tmp_path / "whole", {"trn.json": LINES}).read_bytes(),
    }[kind]
    for number, damaged in enumerate((packed[:-40], packed[: len(packed) // 2] + b"\x55" * 60 + packed[len(packed) // 2 + 60 :])):
        path = tmp_path / f"{number}.{kind}"
        path.write_bytes(damaged)
        assert refusal(path).startswith(f"{path.name}: damaged: got ")
        assert refusal(path).endswith("expected a whole file. Fetch the file again.")


@pytest.mark.parametrize(
    ("head", "name"), [(b"BZh91AY", "bzip2"), (b"\xfd7zXZ\x00", "xz"), ('{"title": "a"}'.encode("utf-16"), "UTF-16")]
)
@pytest.mark.parametrize("within", [False, True])
def test_another_format_is_named(tmp_path: Path, head: bytes, name: str, within: bool) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(gzip.compress(head + LINES) if within else head + LINES)
    assert refusal(path) == (f"trn.json: {name}: got a file in that format; expected {KNOWN}. Convert it first.")


def test_gzip_within_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trn.json.gz"
    path.write_bytes(gzip.compress(gzip.compress(LINES)))
    assert refusal(path).startswith("trn.json: gzip within an archive: got ")


def test_zstd_may_begin_with_a_frame_to_skip(tmp_path: Path) -> None:
    path = tmp_path / "trn.json.zst"
    path.write_bytes(b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip" + zstandard.compress(LINES))
    assert read(path) == LINES


def test_damaged_lzma_member_is_named(tmp_path: Path) -> None:
    path = tmp_path / "raw.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("trn.json", LINES)
    data = bytearray(path.read_bytes())
    data[60:90] = b"\x55" * 30
    path.write_bytes(data)
    assert refusal(path).startswith("raw.zip: damaged: got ")


def bomb(kind: str, tmp_path: Path) -> Path:
    """400 MB of zeros in less than half a megabyte."""
    zeros = (bytes(2**20) for _ in range(400))
    path = tmp_path / f"bomb.json.{kind}"
    if kind == "gz":
        with gzip.open(path, "wb", compresslevel=9) as file:
            file.writelines(zeros)
    elif kind == "zst":
        path.write_bytes(zstandard.ZstdCompressor().compress(bytes(400 * 2**20)))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("trn.json", "w") as file:
            file.writelines(zeros)
    return path


@pytest.mark.parametrize("kind", ["gz", "zst", "zip"])
@pytest.mark.timeout(120)
def test_decompression_bomb_is_refused(tmp_path: Path, kind: str) -> None:
    path = bomb(kind, tmp_path)
    most = 64 * 2**20 + path.stat().st_size * 200
    assert refusal(path) == (
        f"{path.name}: a decompression bomb: got more than {most:,} bytes; expected less. "
        "Raise ingest.max_inflation if the file is what it should be."
    )


def test_bomb_of_bombs_is_refused(tmp_path: Path) -> None:
    inner = bomb("gz", tmp_path).read_bytes()
    assert "a decompression bomb" in refusal(zipped(tmp_path / "raw.zip", {"trn.json.gz": inner}))


def blocks(data: bytes, block_bytes: int, max_line_bytes: int) -> list[LineBlock]:
    return list(cut_lines(io.BytesIO(data), block_bytes, max_line_bytes))


@given(st.lists(st.binary(max_size=90), max_size=12), st.integers(1, 99))
def test_blocks_hold_every_line_once_under_its_number(parts: list[bytes], block_bytes: int) -> None:
    data, found = b"\n".join(parts), dict[int, bytes]()
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.reading.files.blocks.HEAD_BYTES", 16)
        for block in blocks(data, block_bytes, max_line_bytes=40):
            if block.line_bytes:
                assert (block.data, block.line_bytes) == (lines[block.first_line - 1][:40], len(lines[block.first_line - 1]))
                found[block.first_line] = lines[block.first_line - 1]
                continue
            for number, line in enumerate(block.data.removesuffix(b"\n").split(b"\n"), start=block.first_line):
                assert number not in found
                found[number] = line
    assert [found.get(number, b"") for number in range(1, len(lines) + 1)] == lines
