"""A file's digest is that of its bytes as they are, however it came to be known."""

from __future__ import annotations

import hashlib
import mmap
import os
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

from tasks.caching import files


def settle(path: Path) -> None:
    """Make a file old enough for its digest to be memoised."""
    old = time.time() - 10
    os.utime(path, (old, old))
    time.sleep(files.RACY_SECONDS * 1.5)


def test_digest_is_memoised_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "trn.json"
    file.write_text("one")
    settle(file)
    first = files.file_digest(file)
    monkeypatch.setattr(files, "read_digest", lambda *_: pytest.fail("was read again"))
    assert files.file_digest(file) == first


def test_edit_with_a_kept_mtime_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "trn.json"
    file.write_text("one")
    settle(file)
    stat, first = file.stat(), files.file_digest(file)
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files.file_digest(file) != first


def test_write_through_a_mapping_that_was_dirty_before_is_seen(tmp_path: Path) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=True).stdout.strip()
    if kind == "tmpfs":
        pytest.skip("a file system without a disk notes no time of what is written through a mapping")
    file = tmp_path / "trn.json"
    file.write_bytes(bytes(8192))
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped:
        mapped[0] = 1
        settle(file)
        first = files.file_digest(file)
        mapped[1] = 1
        assert files.file_digest(file) != first


def test_the_memo_of_digests_is_done_without_where_it_is_damaged_or_cannot_be_written(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data"
    file.write_text("abc")
    os.utime(file, (1, 1))
    first = files.file_digest(file)
    files.memo_file().write_text("no database at all, and long enough to be looked at" * 20)
    assert files.file_digest(file) == first
    assert files.file_digest(file) == first
    monkeypatch.setattr(files.sqlite3, "connect", lambda *_, **__: (_ for _ in ()).throw(sqlite3.OperationalError("read-only")))
    assert files.file_digest(file) == first


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that count as large."""
    monkeypatch.setattr(files, "ASIDE_BYTES", 1)
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text(path.name)
        settle(path)
    return paths


def test_another_process_digests_large_files_meanwhile(large: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with files.digested_aside(large) as begun:
        assert begun
    monkeypatch.setattr(files, "read_digest", lambda *_: pytest.fail("was read again"))
    assert [files.file_digest(path) for path in large] == [hashlib.sha256(path.name.encode()).hexdigest() for path in large]
    with files.digested_aside(large) as begun:
        assert not begun


def test_no_process_is_started_for_small_files_or_such_as_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.subprocess, "Popen", lambda *_, **__: pytest.fail("was started"))
    (tmp_path / "small").write_text("a")
    with files.digested_aside([tmp_path / "small", tmp_path / "none"]) as begun:
        assert not begun


def test_a_file_that_changes_meanwhile_is_digested_again(large: list[Path]) -> None:
    with files.digested_aside(large):
        large[0].write_text("other")
        large[1].unlink()
    settle(large[0])
    assert files.file_digest(large[0]) == hashlib.sha256(b"other").hexdigest()


@pytest.mark.parametrize("aside", ["raise SystemExit(1)", "import os; os.kill(os.getpid(), 9)"])
def test_what_the_other_process_leaves_undone_is_done_here(
    large: list[Path], monkeypatch: pytest.MonkeyPatch, aside: str
) -> None:
    monkeypatch.setattr(files, "ASIDE", aside)
    with files.digested_aside(large):
        pass
    assert files.file_digest(large[0]) == hashlib.sha256(large[0].name.encode()).hexdigest()


def test_the_other_process_ends_with_a_block_that_fails(large: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ASIDE", "import time; time.sleep(900)")
    with pytest.raises(KeyError), files.digested_aside(large):
        raise KeyError
