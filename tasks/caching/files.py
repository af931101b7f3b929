"""Files: their digests, writing them in one step, and a full disk told as such."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import IO
from uuid import uuid4

from tasks.refs import NoSpaceError, home

RACY_SECONDS = 0.1
"""A file changed this recently may change again within one tick of the clock, so its digest is not memoised."""
FOLLOW_SECONDS, SYNC_SECONDS = 0.02, 0.2
"""Between two looks at a file that grows, and between two times that the disk is given it."""
_followed: dict[str, str] = {}
"""Digests of files that were digested as they were written, by their identities then."""
PIECE_BYTES = 2**20
"""Read at a time to be digested; of smaller ones the threads' turns take longer than their reading."""
ASIDE_BYTES = 2**26
"""A smaller file is digested before a process has started."""
ASIDE = """
import hashlib, mmap, os, sys
for handle in map(int, sys.argv[1:]):
    digest, size = hashlib.sha256(), os.fstat(handle).st_size
    for at in range(0, size, 2**26):
        with mmap.mmap(handle, min(2**26, size - at), access=mmap.ACCESS_READ, offset=at) as piece:
            digest.update(piece)
    print(digest.hexdigest())
"""
"""Maps files, which read_digest does not: one that is cut short meanwhile ends that process, and no other."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits; memoised on (device, inode, size, mtime, ctime), so a kept mtime hides no edit.

    What is written through a memory map moves the times at the first write after the page was synced, so the file is synced
    before. On a file system without a disk (tmpfs) such a write moves none, and stays unseen.
    """
    if known := _recall(_identity(path.stat())):
        return known
    with path.open("rb") as file:
        before = _synced(file)
        digest = read_digest(file)
    _remember_settled(path, before, digest)
    return digest


@contextmanager
def digested_aside(paths: Iterable[Path]) -> Generator[bool]:
    """Digest large files in another process while the block keeps this one busy; file_digest knows their digests then.

    Yields whether there is anything to digest. Digests come to nothing where files can't be read or change meanwhile.
    """
    with ExitStack() as stack:
        files = dict[Path, IO[bytes]]()
        for path in paths:
            with suppress(OSError):
                stat = path.stat()
                if stat.st_size >= ASIDE_BYTES and _recall(_identity(stat)) is None:
                    files[path] = stack.enter_context(path.open("rb"))
        if not files:
            yield False
            return
        before, handles = [_synced(file) for file in files.values()], [file.fileno() for file in files.values()]
        command = [sys.executable, "-I", "-S", "-c", ASIDE, *map(str, handles)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, pass_fds=handles
        ) as process:  # silent, for a terminal's Ctrl-C reaches it too
            try:
                yield True
                digests = process.communicate()[0].split()
            finally:
                process.kill()
    for path, stat, digest in zip(files, before, digests, strict=False):  # fewer, if it was killed
        with suppress(OSError):  # gone
            _remember_settled(path, stat, digest)


def _synced(file: IO[bytes]) -> os.stat_result:
    """Give the disk what was written to a file; how it is then."""
    with suppress(OSError):  # a file system that knows no sync
        os.fsync(file.fileno())
    return os.fstat(file.fileno())


def read_digest(file: IO[bytes]) -> str:
    """SHA-256 of what is left to read of a file, 64 hex digits; the next piece is read while one is digested."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(file.read, PIECE_BYTES)
        while piece := ahead.result():
            ahead = reader.submit(file.read, PIECE_BYTES)
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def followed(path: Path) -> Generator[None]:
    """Digest and sync a file while the block writes it from front to end; `written_digest` then has little left to wait for."""
    path.touch()
    ended = Event()
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(2) as pool:
        try:  # a signal may come while the threads begin, which would wait for the end, and the pool for them
            digested, synced = pool.submit(_digest_along, file, ended), pool.submit(_sync_along, file, ended)
            yield
        finally:
            ended.set()
        synced.result()  # an error of the disk is told once
        _followed[_identity(os.fstat(file.fileno()))] = digested.result()


def _digest_along(file: IO[bytes], ended: Event) -> str:
    """SHA-256 of a file that grows until an event, 64 hex digits."""
    digest, last = hashlib.sha256(), False
    while not last:
        last = ended.wait(FOLLOW_SECONDS)
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _sync_along(file: IO[bytes], ended: Event) -> None:
    """Sync a file that grows until an event, now and then."""
    while not ended.wait(SYNC_SECONDS):
        os.fdatasync(file.fileno())


def written_digest(path: Path) -> str:
    """Sync a file to disk; its SHA-256, 64 hex digits, which may be known of when it was written."""
    with path.open("rb") as file, ThreadPoolExecutor(1) as pool:
        synced = pool.submit(os.fsync, file.fileno())
        digest = _followed.pop(_identity(os.fstat(file.fileno())), None) or read_digest(file)
        synced.result()
    return digest


def _identity(stat: os.stat_result) -> str:
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _recall(identity: str) -> str | None:
    """A memoised digest; a memo that is damaged is begun anew, one that can't be had is done without."""
    try:
        with _memo() as memo:
            row = memo.execute("select digest from digests where identity = ?", (identity,)).fetchone()
    except sqlite3.OperationalError:  # no room, or a root that may only be read
        return None
    except sqlite3.DatabaseError:
        memo_file().unlink(missing_ok=True)
        return None
    return str(row[0]) if row else None


def _remember_settled(path: Path, before: os.stat_result, digest: str) -> None:
    """Memoise a file's digest, if the file has not changed since it was begun, nor just before."""
    after = path.stat()
    settled = time.time() - max(after.st_mtime, after.st_ctime) > RACY_SECONDS
    if settled and _identity(after) == _identity(before):
        with suppress(sqlite3.DatabaseError), _memo() as memo:
            memo.execute("insert or replace into digests values (?, ?)", (_identity(before), digest))


def memo_file() -> Path:
    """Digests by identity of files; may be deleted at any time."""
    return home() / "digests.sqlite"


@contextmanager
def _memo() -> Generator[sqlite3.Connection]:
    with suppress(OSError):
        home().mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(memo_file(), timeout=30)
    try:
        with connection:
            connection.execute("create table if not exists digests (identity text primary key, digest text not null)")
            yield connection
    finally:
        connection.close()


def directory_digest(path: Path, names: Iterable[str]) -> str:
    """SHA-256 over (name, digest) of the named files of a directory; what a model or tokenizer directory counts as."""
    return text_digest(json.dumps([[name, file_digest(path / name)] for name in sorted(names)]))


def text_digest(text: str) -> str:
    """SHA-256 of a text, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file's content in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        write_synced(draft, data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the disk has a directory's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def space_checked(path: Path, need_bytes: int = 0) -> Generator[None]:
    """Turn a full disk into a NoSpaceError that names the path and the bytes needed and free."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < need_bytes:
        raise NoSpaceError(_no_space(path, need_bytes, free))
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoSpaceError(_no_space(Path(error.filename or path), need_bytes or free + 1, free)) from error


def _no_space(path: Path, need_bytes: int, free_bytes: int) -> str:
    return (
        f"{path}: no space left on the device: needs at least {need_bytes:,} bytes, {free_bytes:,} were free. "
        f"Free some space (amazon-ft cache gc) or move AMAZON_FT_HOME ({home()}) and run again; finished stages are kept."
    )
