"""Input files to blocks of whole lines: plain, gzip, Zstandard, or a zip that holds any of these.

What a file is shows in its first bytes, not in its name. Nothing is unpacked to disk, and at most a block and one line are
in memory. A file that unpacks to more than `max_inflation` times its size is refused: it is a decompression bomb.
"""

from __future__ import annotations

import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Protocol, cast

from tasks.config import IngestConfig
from tasks.reading.rows import LineBlock
from tasks.refs import InputError

BOM = b"\xef\xbb\xbf"
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
"""A zstd file may begin with a frame of something else. Source: RFC 8878, 3.1.2."""
UNREAD = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"7z\xbc\xaf": "7z",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    **{magic: f"{codec} within an archive" for magic, codec in MAGIC.items()},
}
"""{beginning of content that is no JSON lines: its format}."""
ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
"""Of an archive with members, and without."""
DATA_NAME = re.compile(r"\.jsonl?(\.gz|\.zst)?$", re.IGNORECASE)
MEMBER = re.compile(r"trn\.json(\.gz|\.zst)?$", re.IGNORECASE)
"""The distributed LF-Amazon-1.3M.raw.zip holds the training data under this name, beside the test data."""
HEAD_BYTES = 2**16
FREE_BYTES = 64 * 2**20
"""So much may come out of any file, however small."""
UID = re.compile(rb'"uid"\s*:')


class ByteStream(Protocol):
    """Bytes that blocks are read from."""

    def read(self, size: int, /) -> bytes:
        """So many bytes, fewer at the end."""
        ...


class Limited:
    """A stream that refuses to yield much more than its file's size."""

    def __init__(self, stream: ByteStream, path: Path, max_inflation: int) -> None:
        self._stream, self._name = stream, path.name
        self._left = self._most = FREE_BYTES + path.stat().st_size * max_inflation

    def read(self, size: int = -1, /) -> bytes:
        """So many bytes, fewer at the end.

        Raises:
            InputError: when the sum is beyond the limit.
        """
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise InputError(
                f"{self._name}: a decompression bomb: got more than {self._most:,} bytes; expected less. "
                "Raise ingest.max_inflation if the file is what it should be."
            )
        return data

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def read_blocks(path: Path, name: str, config: IngestConfig) -> Iterator[tuple[LineBlock, float]]:
    """The file's lines in blocks, each with the share of the file that has been read.

    In a file without uids, a row's is this name of the file and the line's number.

    Raises:
        InputError: when the file is damaged, in another format, no archive of one data file, or a decompression bomb.
    """
    size = max(path.stat().st_size, 1)
    with path.open("rb") as raw, _damage_named(path), _unpacked(raw, path, config.max_inflation) as stream:
        for number, block in enumerate(cut_blocks(stream, f"{name}:", config.block_bytes, config.max_line_bytes)):
            if number == 0:
                _refuse_format(block.data, path)
            yield block, min(raw.tell() / size, 1.0)


def cut_blocks(stream: ByteStream, uid_prefix: str, block_bytes: int, max_line_bytes: int) -> Iterator[LineBlock]:
    """Blocks that end with a line; a line longer than both limits is cut short and alone in its block."""
    pending = bytearray(stream.read(HEAD_BYTES).removeprefix(BOM))
    prefix, line = None if UID.search(pending) else uid_prefix, 1
    while chunk := stream.read(max(block_bytes - len(pending), HEAD_BYTES)):
        cut = chunk.rfind(b"\n") + 1
        if cut:
            yield LineBlock(b"".join((pending, memoryview(chunk)[:cut])), line, prefix)
            line += pending.count(b"\n") + chunk.count(b"\n", 0, cut)
            pending = bytearray(chunk[cut:])
        else:
            pending += chunk
        start = pending.rfind(b"\n") + 1
        if len(pending) - start > max_line_bytes:
            if start:
                yield LineBlock(bytes(pending[:start]), line, prefix)
                line += pending.count(b"\n")
            rest, length = _skip_line(stream, len(pending) - start)
            yield LineBlock(bytes(pending[start : start + max_line_bytes]), line, prefix, length)
            pending, line = bytearray(rest), line + 1
    if pending:
        yield LineBlock(bytes(pending), line, prefix)


def _skip_line(stream: ByteStream, length: int) -> tuple[bytes, int]:
    """Read beyond the present line: the bytes after it, and the line's length."""
    while chunk := stream.read(HEAD_BYTES):
        end = chunk.find(b"\n")
        if end >= 0:
            return chunk[end + 1 :], length + end
        length += len(chunk)
    return b"", length


@contextmanager
def _unpacked(raw: IO[bytes], path: Path, max_inflation: int) -> Generator[ByteStream]:
    head = raw.read(4)
    raw.seek(0)
    if head not in ZIP_MAGIC:
        with _decompressed(raw, path, max_inflation) as stream:
            yield stream
        return
    with (
        zipfile.ZipFile(raw) as archive,
        archive.open(_member(archive, path)) as member,
        _decompressed(member, path, max_inflation) as stream,
    ):
        yield stream


@contextmanager
def _decompressed(packed: IO[bytes], path: Path, max_inflation: int) -> Generator[ByteStream]:
    import pyarrow as pa

    buffered = io.BufferedReader(cast("io.RawIOBase", packed)) if isinstance(packed, zipfile.ZipExtFile) else packed
    head = cast("io.BufferedReader", buffered).peek(4)[:4]
    if head.startswith(ZIP_MAGIC):
        raise InputError(f"{path.name}: a zip within a zip; expected JSON lines, .gz or .zst in it. Unpack the outer one first.")
    codec = "zstd" if SKIPPABLE.match(head) else next((codec for magic, codec in MAGIC.items() if head.startswith(magic)), None)
    limited = Limited(cast("ByteStream", buffered), path, max_inflation)
    if codec is None:
        yield limited
        return
    with pa.CompressedInputStream(pa.PythonFile(limited, "r"), codec) as stream:
        yield Limited(stream, path, max_inflation)


def _refuse_format(content: bytes, path: Path) -> None:
    if found := next((name for magic, name in UNREAD.items() if content.startswith(magic)), None):
        raise InputError(
            f"{path.name}: {found}: got a file in that format; expected JSON lines in UTF-8, plain or as .gz, .zst or .zip. "
            "Convert it first."
        )


def _member(archive: zipfile.ZipFile, path: Path) -> str:
    """The archive's training data: trn.json, or its only data file.

    Raises:
        InputError: naming what is there instead, or a name that leads out of the archive.
    """
    names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    outside = [name for name in names if name.startswith("/") or ".." in PurePosixPath(name.replace("\\", "/")).parts]
    if outside:
        raise InputError(f"{path.name}: got a member named {outside[0]!r}; expected names within the archive. Do not trust it.")
    data = [name for name in names if DATA_NAME.search(name) and not name.startswith("__MACOSX/")]
    found = [name for name in data if MEMBER.fullmatch(PurePosixPath(name).name)] or data
    if len(found) != 1:
        shown = ", ".join((found or names)[:5]) or "nothing"
        raise InputError(
            f"{path.name}: got {shown}; expected one trn.json, trn.json.gz or other .json(l) file in it. "
            "Unpack it and name the file to read in ingest.sources."
        )
    return found[0]


@contextmanager
def _damage_named(path: Path) -> Generator[None]:
    import pyarrow as pa

    try:
        yield
    except (
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        NotImplementedError,
        RuntimeError,
        pa.ArrowInvalid,
        OSError,
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{path.name}: damaged: got {error}; expected a whole archive. Fetch the file again.") from error
