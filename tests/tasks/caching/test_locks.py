"""A lock has one holder, among threads as among processes, whatever becomes of its file."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.caching import locks
from tests.support.checkout import PROJECT

HOLDER = """
import sys, time
from pathlib import Path
from tasks.caching.locks import locked
with locked(Path(sys.argv[1]), remove=True):
    print("held", flush=True)
    time.sleep(900)
"""


class Crowd:
    """Threads that hold a lock in turns, and how many of them did at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inside = self.most = 0

    def hold(self) -> None:
        for _ in range(5):
            with locks.locked(self.path, remove=True):
                self.inside += 1
                self.most = max(self.most, self.inside)
                time.sleep(0.005)
                self.inside -= 1

    def run(self) -> None:
        threads = [threading.Thread(target=self.hold) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def test_a_lock_whose_file_is_removed_lets_in_one_holder_at_a_time(tmp_path: Path) -> None:
    crowd = Crowd(tmp_path / "served" / "ab.lock")
    crowd.run()
    assert crowd.most == 1
    assert not crowd.path.exists()


def test_who_waited_for_a_removed_file_holds_the_one_that_others_see(tmp_path: Path) -> None:
    path, entered, leave = tmp_path / "ab.lock", threading.Event(), threading.Event()

    def wait() -> None:
        with locks.locked(path, remove=True):
            entered.set()
            leave.wait(60)

    waiting = threading.Thread(target=wait)
    with locks.locked(path, remove=True):
        waiting.start()
        time.sleep(0.3)
    assert entered.wait(60)
    assert locks.is_locked(path)
    leave.set()
    waiting.join()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ab.lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            with pytest.raises(locks.Timeout), locks.locked(path, wait_seconds=0):
                pytest.fail("two held it")
        finally:
            holder.kill()
    with locks.locked(path, wait_seconds=0):
        assert locks.is_locked(path)
    assert not locks.is_locked(path)


def test_asking_makes_no_file(tmp_path: Path) -> None:
    assert not locks.is_locked(tmp_path / "ab.lock")
    assert list(tmp_path.iterdir()) == []


def test_an_error_within_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), locks.locked(tmp_path / "ab.lock", remove=True):
        raise ValueError("broken")
    assert list(tmp_path.iterdir()) == []


def test_a_work_directory_is_named_by_its_key_and_its_lock_tells_of_the_holder(home: Path) -> None:
    with locks.work_directory("k" * 64) as path:
        assert path == home / "work" / ("k" * 32)
        assert path.with_suffix(".lock").read_text().startswith(f"process {os.getpid()} on {os.uname().nodename} since ")
    assert list((home / "work").iterdir()) == [path]


def test_a_holder_that_has_yet_to_say_who_it_is_is_another_process(home: Path) -> None:
    told: list[str] = []
    lock, leave = home / "work" / f"{'k' * 32}.lock", threading.Event()

    def hold() -> None:
        with locks.locked(lock):
            leave.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    while not locks.is_locked(lock):
        time.sleep(0.01)

    def waiting(text: str) -> None:
        told.append(text)
        leave.set()

    with locks.work_directory("k" * 64, waiting):
        assert told == ["another process"]
    holder.join()


def test_a_lock_that_may_only_be_read_can_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = tmp_path / "x.lock", os.open

    def open_to_read(file: Path, flags: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(file)
        return opened(file, flags)

    with locks.locked(path):
        monkeypatch.setattr(os, "open", open_to_read)
        assert locks.is_locked(path)
        monkeypatch.undo()
    monkeypatch.setattr(os, "open", open_to_read)
    assert not locks.is_locked(path)
