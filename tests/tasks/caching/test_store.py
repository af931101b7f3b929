"""Artifacts are published whole or not at all, verified to the byte, and survive whatever kills their writers."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.caching import locks, runs, store
from tasks.caching.context import open_run
from tasks.caching.manifest import MANIFEST
from tasks.caching.store import Missing
from tasks.config import Verify
from tasks.refs import Artifact, InputError, NoSpaceError


def published(text: str = "abc", kind: str = "products") -> Artifact:
    with store.publish(kind) as draft:
        (draft / "rows.txt").write_text(text)
        (draft / "nested").mkdir()
        (draft / "nested" / "more.txt").write_text(text * 2)
        draft.rows = 3
    return draft.artifact


def drafts(home: Path) -> list[Path]:
    return list((home / "drafts").glob("*"))


def test_equal_bytes_give_the_same_artifact(home: Path) -> None:
    assert published() == published()
    assert published() != published("abd")
    assert not drafts(home)


def test_artifact_lies_under_the_present_root(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = published()
    home.rename(tmp_path / "moved")
    monkeypatch.setenv("AMAZON_FT_HOME", str(tmp_path / "moved"))
    store.verify(artifact)
    assert artifact.path.is_relative_to(tmp_path / "moved")


def test_error_while_writing_leaves_nothing(home: Path) -> None:
    with pytest.raises(ValueError, match="half way"), store.publish("products") as draft:
        (draft / "rows.txt").write_text("half")
        raise ValueError("half way")
    assert not drafts(home)
    assert not (home / "artifacts").exists()


def test_damaged_artifact_is_replaced_by_publishing_it_again() -> None:
    artifact = published()
    (artifact / "rows.txt").write_text("xyz")
    assert published() == artifact
    store.verify(artifact)


def test_missing_file_is_named() -> None:
    artifact = published()
    (artifact / "rows.txt").unlink()
    with pytest.raises(Missing, match=rf"^output missing: artifacts/products/{artifact.digest[:32]}/rows\.txt$"):
        store.verify(artifact)


def test_missing_directory_is_named() -> None:
    with pytest.raises(Missing, match=r"^output missing: artifacts/products/0000/manifest\.json$"):
        store.verify(Artifact(kind="products", digest="0000"))


@pytest.mark.parametrize("how", ["full", "size"])
def test_stray_file_is_found_and_goes_when_the_artifact_is_published_again(how: Verify) -> None:
    artifact = published()
    store.verify(artifact, how)
    (artifact / "adapter_model.bin").write_text("stray")
    with pytest.raises(Missing, match=rf"^output stray: artifacts/products/{artifact.digest[:32]}/adapter_model\.bin$"):
        store.verify(artifact, how)
    assert published() == artifact
    store.verify(artifact, how)


@pytest.mark.parametrize("file", ["rows.txt", "nested/more.txt", MANIFEST])
def test_truncated_file_is_found(file: str) -> None:
    artifact = published()
    os.truncate(artifact / file, 1)
    with pytest.raises(Missing, match="output corrupt"):
        store.verify(artifact)


def test_any_flipped_byte_is_found_even_with_the_old_mtime() -> None:
    artifact = published("some longer text to flip a byte of")
    generator = random.Random(7)
    files = [file for file in artifact.path.rglob("*") if file.is_file()]
    store.verify(artifact)
    for _ in range(60):
        flip_and_find(artifact, generator.choice(files), generator)


def flip_and_find(artifact: Artifact, file: Path, generator: random.Random) -> None:
    before, stat = file.read_bytes(), file.stat()
    where = generator.randrange(len(before))
    flipped = bytearray(before)
    flipped[where] ^= generator.randrange(1, 256)
    file.write_bytes(flipped)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(Missing):
        store.verify(artifact)
    file.write_bytes(before)


def test_size_check_reads_no_bytes() -> None:
    artifact = published("abc")
    (artifact / "rows.txt").write_text("abd")
    store.verify(artifact, "size")
    with pytest.raises(Missing, match="output corrupt"):
        store.verify(artifact, "full")


def test_too_little_space_is_said_before_writing(home: Path) -> None:
    with pytest.raises(NoSpaceError, match=r"needs at least 1,000,000,000,000,000 bytes, [\d,]+ were free\. Free some space"):
        with store.publish("products", need_bytes=10**15):
            pytest.fail("was entered")
    assert not drafts(home)


def test_full_disk_is_an_error_with_the_path(home: Path) -> None:
    with pytest.raises(NoSpaceError, match=r"rows\.arrow: no space left on the device: needs at least [\d,]+ bytes"):
        with store.publish("products", need_bytes=10) as draft:
            raise OSError(errno.ENOSPC, "No space left on device", str(draft / "rows.arrow"))
    assert not drafts(home)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("mounting a small file system needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_full_file_system_leaves_no_half_artifact(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMAZON_FT_HOME", str(small_disk / "home"))
    with pytest.raises(NoSpaceError), store.publish("products") as draft:
        (draft / "rows.txt").write_bytes(bytes(2 * 2**20))
    assert not drafts(small_disk / "home")
    assert published("fits").rows == 3


WRITER = """
import sys, time
from tasks.caching import files, locks, runs, store
with store.publish("products") as draft:
    (draft / "rows.txt").write_text("half")
    print("wrote", flush=True)
    time.sleep(900)
"""


def test_killed_writer_leaves_only_an_unlocked_draft(home: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    lock = next(path for path in drafts(home) if path.suffix == ".lock")
    assert locks.is_locked(lock)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not locks.is_locked(lock)
    assert not (home / "artifacts").exists()


HOLDER = """
import time
from tasks.caching import files, locks, runs, store
with locks.work_directory("k" * 64) as path:
    print(path, flush=True)
    time.sleep(900)
"""


def test_a_root_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMAZON_FT_HOME", "/proc/amazon-ft")
    with pytest.raises(InputError, match=r"^AMAZON_FT_HOME: /proc/amazon-ft: .*; expected a directory to write to"):
        with open_run("demo", {}):
            pass


def test_second_trainer_waits_and_names_the_holder_and_no_lock_outlives_sigkill(home: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    holders: list[str] = []

    def waiting(holder: str) -> None:
        holders.append(holder)
        process.send_signal(signal.SIGKILL)

    with locks.work_directory("k" * 64, waiting) as path:
        assert path == home / "work" / ("k" * 32)
    process.wait()
    process.stdout.close()
    assert holders == [holders[0]]
    assert f"process {process.pid} on" in holders[0]


def test_run_record_notes_what_the_run_relies_on() -> None:
    with open_run("demo", {"seed": 1}) as run:
        artifact = published()
        assert locks.is_locked(run.file.with_suffix(".lock"))
    kept = runs.past_runs()[0]
    assert kept["artifacts"] == [f"products/{artifact.digest[:32]}"]
    assert kept["finished"] is True
    assert not locks.is_locked(run.file.with_suffix(".lock"))


def test_torn_run_record_is_left_out(home: Path) -> None:
    with open_run("demo", {}):
        pass
    (home / "runs" / "torn.json").write_text('{"recipe": "de')
    assert [run["recipe"] for run in runs.past_runs()] == ["demo"]
