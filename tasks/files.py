"""Files: their digests, writing them in one step, and a full disk told as such."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from tasks.refs import NoSpaceError, home

RACY_SECONDS = 0.1
"""A file changed this recently may change again within one tick of the clock, so its digest is not memoised."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits; memoised on (device, inode, size, mtime, ctime), so a kept mtime hides no edit."""
    stat = path.stat()
    identity = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    with _memo() as memo:
        row = memo.execute("select digest from digests where identity = ?", (identity,)).fetchone()
    if row:
        return str(row[0])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    after = path.stat()
    settled = time.time() - max(after.st_mtime, after.st_ctime) > RACY_SECONDS
    if settled and (after.st_mtime_ns, after.st_ctime_ns, after.st_size) == (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size):
        with _memo() as memo:
            memo.execute("insert or replace into digests values (?, ?)", (identity, digest))
    return digest


@contextmanager
def _memo() -> Generator[sqlite3.Connection]:
    home().mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(home() / "digests.sqlite", timeout=30)
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


__all__ = ["directory_digest", "file_digest", "space_checked", "sync_directory", "text_digest", "write_atomic", "write_synced"]
