"""Locks that the kernel frees when their holder dies, however it dies (flock, by way of filelock)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout, UnixFileLock, lock_descriptor

from tasks.refs import home


@contextmanager
def locked(path: Path, *, remove: bool = False, wait_seconds: float = -1) -> Generator[None]:
    """Hold a lock file for the block, after waiting for its holder; without end, unless told.

    `remove` deletes the file at the end, while it is still held: whoever waited for it then looks for a new one.

    Raises:
        Timeout: when another holds it for longer than `wait_seconds`.
    """
    with UnixFileLock(path, wait_seconds, fallback_to_soft=False):
        try:
            yield
        finally:
            if remove:
                path.unlink(missing_ok=True)


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock file; makes none."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:  # another's, or on a disk that may only be read: looking is enough
        handle = os.open(path, os.O_RDONLY)
    try:
        return not lock_descriptor(handle, blocking=False)
    finally:
        os.close(handle)


@contextmanager
def mutex() -> Generator[None]:
    """The root's short critical section: noting what a run uses, and sweeping what nothing uses."""
    with locked(home() / "mutex.lock"):
        yield


@contextmanager
def work_directory(key: str, waiting: Callable[[str], None] = lambda _: None) -> Generator[Path]:
    """The directory of a long stage's checkpoints, work/KEY, held by this process alone through work/KEY.lock.

    When another process holds it, `waiting(holder)` is called once with its description, and the call waits.
    """
    path = home() / "work" / key[:32]
    lock = path.with_suffix(".lock")
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock, remove=True, wait_seconds=0))
        except Timeout:
            waiting(_holder_of(lock))
            held.enter_context(locked(lock, remove=True))
        lock.write_text(f"process {os.getpid()} on {os.uname().nodename} since {time.strftime('%H:%M:%S')}")
        path.mkdir(exist_ok=True)
        yield path


def _holder_of(lock: Path) -> str:
    """The text in the lock file, unless its holder has yet to write it or has just gone."""
    try:
        return lock.read_text(errors="replace") or "another process"
    except FileNotFoundError:
        return "another process"
