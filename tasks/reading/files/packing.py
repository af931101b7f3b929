"""Files as streams of their content: plain, gzip, Zstandard, or a zip that holds any of these.

How a file is packed shows in its first bytes, not in its name. A stream is unpacked as it is read, and at most a piece of it is
in memory. A file that unpacks to more than `max_inflation` times its size is refused: it is a decompression bomb.
"""

from __future__ import annotations

import io
import lzma
import re
import shutil
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import IO, NamedTuple, Protocol, cast

from tasks.refs import InputError, home

MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
"""A zstd file may begin with a frame of something else. Source: RFC 8878, 3.1.2."""
ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
"""Of an archive with members, and without."""
PACKED = re.compile(r"\.(gz|zst)$", re.IGNORECASE)
DATA_NAME = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|arrows?|feather)(\.gz|\.zst)?$", re.IGNORECASE)
MEMBER = re.compile(r"trn\.json(\.gz|\.zst)?$", re.IGNORECASE)
"""The distributed LF-Amazon-1.3M.raw.zip holds the training data under this name, beside the test data."""
FREE_BYTES = 64 * 2**20
"""So much may come out of any file, however small."""


class ByteStream(Protocol):
    """Bytes that blocks are read from."""

    def read(self, size: int, /) -> bytes:
        """So many bytes, fewer at the end."""
        ...


class Content(NamedTuple):
    """A file once it is unpacked."""

    stream: ByteStream
    name: str
    """Without the endings of packing; that of the member, in an archive."""
    packed: bool


class Allowance:
    """Counts what comes out of a file, and refuses much more than its size."""

    def __init__(self, path: Path, max_inflation: int) -> None:
        self._name = path.name
        self._left = self._most = FREE_BYTES + path.stat().st_size * max_inflation

    def spend(self, size: int) -> None:
        """Take so many bytes of it.

        Raises:
            InputError: when the sum is beyond the limit.
        """
        self._left -= size
        if self._left < 0:
            raise InputError(
                f"{self._name}: a decompression bomb: got more than {self._most:,} bytes; expected less. "
                "Raise ingest.max_inflation if the file is what it should be."
            )


class Limited:
    """A stream that refuses to yield much more than its file's size."""

    def __init__(self, stream: ByteStream, path: Path, max_inflation: int) -> None:
        self._stream = stream
        self._allowance = Allowance(path, max_inflation)

    def read(self, size: int = -1, /) -> bytes:
        """So many bytes, fewer at the end.

        Raises:
            InputError: when the sum is beyond the limit.
        """
        data = self._stream.read(size)
        self._allowance.spend(len(data))
        return data

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


class Rejoined:
    """A stream whose beginning has been read already, as if it had not; without the rest of it, that beginning alone."""

    closed = False

    def __init__(self, head: bytes, stream: ByteStream | None = None) -> None:
        self._head = head
        self._stream = stream or io.BytesIO()

    def read(self, size: int = -1, /) -> bytes:
        """So many bytes, fewer only at the end; all where the size is negative."""
        head, self._head = (self._head, b"") if size < 0 else (self._head[:size], self._head[size:])
        parts, left = [head], size - len(head)
        while (size < 0 or left > 0) and (more := self._stream.read(left if size > 0 else -1)):
            parts.append(more)
            left -= len(more)
        return b"".join(filter(None, parts))  # of a single one no copy is made


@contextmanager
def unpacked(raw: IO[bytes], path: Path, max_inflation: int) -> Generator[Content]:
    """The content of an open file.

    Raises:
        InputError: when it is no archive of one data file.
    """
    head = raw.read(4)
    raw.seek(0)
    if head not in ZIP_MAGIC:
        with _decompressed(raw, path, max_inflation) as (stream, packed):
            yield Content(stream, PACKED.sub("", path.name), packed)
        return
    with zipfile.ZipFile(raw) as archive:
        name = _member(archive, path)
        with archive.open(name) as member, _decompressed(member, path, max_inflation) as (stream, _):
            yield Content(stream, PACKED.sub("", PurePosixPath(name).name), packed=True)


@contextmanager
def _decompressed(packed: IO[bytes], path: Path, max_inflation: int) -> Generator[tuple[ByteStream, bool]]:
    import pyarrow as pa

    buffered = io.BufferedReader(cast("io.RawIOBase", packed)) if isinstance(packed, zipfile.ZipExtFile) else packed
    head = cast("io.BufferedReader", buffered).peek(4)[:4]
    if head.startswith(ZIP_MAGIC):
        raise InputError(f"{path.name}: a zip within a zip; expected a data file, .gz or .zst in it. Unpack the outer one first.")
    codec = "zstd" if SKIPPABLE.match(head) else next((codec for magic, codec in MAGIC.items() if head.startswith(magic)), None)
    limited = Limited(cast("ByteStream", buffered), path, max_inflation)
    if codec is None:
        yield limited, False
        return
    with pa.CompressedInputStream(pa.PythonFile(limited, "r"), codec) as stream:
        yield Limited(stream, path, max_inflation), True


@contextmanager
def seekable(content: Content, raw: IO[bytes]) -> Generator[IO[bytes]]:
    """The content as a file to jump about in: the file itself, else a nameless copy that goes with the process."""
    if not content.packed:
        raw.seek(0)
        yield raw
        return
    (home() / "drafts").mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=home() / "drafts") as copy:
        shutil.copyfileobj(cast("IO[bytes]", content.stream), copy, 2**20)
        copy.seek(0)
        yield copy


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
            f"{path.name}: got {shown}; expected one trn.json, trn.json.gz or other data file in it. "
            "Unpack it and name the file to read in ingest.sources."
        )
    return found[0]


@contextmanager
def damage_named(path: Path) -> Generator[None]:
    """Tell a library's errors on a damaged file as what they are."""
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
        pa.ArrowException,
        OSError,
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{path.name}: damaged: got {error}; expected a whole file. Fetch the file again.") from error
