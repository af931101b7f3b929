"""Locks that the kernel frees when their holder dies, however it dies (flock)."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from tasks.refs import home


@contextmanager
def flock(path: Path, *, remove: bool = False) -> Generator[int]:
    """Hold a new lock file for the block; `remove` deletes it afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        if remove:
            path.unlink(missing_ok=True)
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock file."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


@contextmanager
def mutex() -> Generator[None]:
    """The root's short critical section: noting what a run uses, and sweeping what nothing uses."""
    with flock(home() / "mutex.lock"):
        yield


@contextmanager
def work_directory(key: str, waiting: Callable[[str], None] | None = None) -> Generator[Path]:
    """The directory of a long stage's checkpoints, held by this process alone.

    When another process holds it, `waiting(holder)` is called once with its description, and the call waits.
    """
    path = home() / "work" / key[:32]
    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                waiting(os.pread(handle, 200, 0).decode(errors="replace") or "another process")
            fcntl.flock(handle, fcntl.LOCK_EX)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename} since {time.strftime('%H:%M:%S')}".encode(), 0)
        yield path
    finally:
        os.close(handle)


__all__ = ["flock", "is_locked", "mutex", "work_directory"]
