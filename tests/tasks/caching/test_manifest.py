"""A manifest describes a directory to the byte, and shows what has become of it."""

from __future__ import annotations

import errno
import hashlib
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tasks.caching import files
from tasks.caching.files import followed
from tasks.caching.manifest import MANIFEST, Damage, find_damage, write_manifest

TEXT = """{
 "files": {
  "nested/b.txt": {
   "sha256": "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603",
   "size": 2
  },
  "z.txt": {
   "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
   "size": 0
  }
 },
 "kind": "products"
}"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "written"
    (path / "nested").mkdir(parents=True)
    (path / "nested" / "b.txt").write_text("ab")
    (path / "z.txt").touch()
    return path


def test_its_bytes_are_these(written: Path) -> None:
    manifest = write_manifest(written, "products")
    assert (written / MANIFEST).read_text() == TEXT
    assert manifest.digest == hashlib.sha256(TEXT.encode()).hexdigest()
    assert manifest.size_bytes == 2
    assert sorted(path.name for path in written.iterdir()) == [MANIFEST, "nested", "z.txt"]


def test_written_again_it_is_the_same(written: Path) -> None:
    assert write_manifest(written, "products") == write_manifest(written, "products")


def test_what_is_as_written_has_no_damage(written: Path) -> None:
    digest = write_manifest(written, "products").digest
    assert find_damage(written) is None
    assert find_damage(written, expected=digest) is None
    assert find_damage(written, expected="0" * 64) == Damage("corrupt", MANIFEST)


def test_sizes_alone_are_compared_without_reading(written: Path) -> None:
    write_manifest(written, "products")
    (written / "nested" / "b.txt").write_text("xy")
    assert find_damage(written, digests=False) is None
    assert find_damage(written) == Damage("corrupt", "nested/b.txt")
    (written / "nested" / "b.txt").write_text("x")
    assert find_damage(written, digests=False) == Damage("corrupt", "nested/b.txt")


def test_what_is_missing_is_named(written: Path) -> None:
    assert find_damage(written) == Damage("missing", MANIFEST)
    write_manifest(written, "products")
    (written / "z.txt").unlink()
    assert find_damage(written) == Damage("missing", "z.txt")


@pytest.mark.parametrize("name", ["stray.bin", "nested/stray", ".hidden", "more/manifest.json", "link", "folder"])
@pytest.mark.parametrize("digests", [True, False])
def test_what_is_more_than_was_written_is_named(written: Path, name: str, digests: bool) -> None:
    write_manifest(written, "products")
    stray = written / name
    stray.parent.mkdir(exist_ok=True)
    if name in ("link", "folder"):
        stray.symlink_to({"link": "nowhere", "folder": "nested"}[name])
    else:
        stray.touch()
    assert find_damage(written, digests=digests) == Damage("stray", name)


@pytest.mark.parametrize("text", ["", "{", TEXT[:-20], "[]", '{"kind": "a"}', '{"kind": "a", "files": {"z.txt": [0, "e3"]}}'])
def test_a_manifest_that_is_none_is_corrupt(written: Path, text: str) -> None:
    (written / MANIFEST).write_text(text)
    assert find_damage(written) == Damage("corrupt", MANIFEST)


def test_no_flipped_bit_of_a_manifest_goes_unseen_or_raises(written: Path) -> None:
    digest = write_manifest(written, "products").digest
    whole, generator = (written / MANIFEST).read_bytes(), random.Random(7)
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        (written / MANIFEST).write_bytes(flipped)
        assert find_damage(written, expected=digest) is not None
        find_damage(written)


def test_file_digested_as_it_is_written_counts_as_it_is_in_the_end(tmp_path: Path) -> None:
    kept, changed = tmp_path / "kept", tmp_path / "changed"
    for file in (kept, changed):
        with followed(file), file.open("wb") as stream:
            stream.write(b"a" * 3_000_000)
            stream.flush()
            stream.write(b"b")
    changed.write_bytes(b"b" + b"a" * 3_000_000)
    listed = write_manifest(tmp_path, "products").files
    assert {name: entry.sha256 for name, entry in listed.items()} == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (kept, changed)
    }


def test_error_of_the_disk_while_a_file_is_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("tasks.caching.files.SYNC_SECONDS", 0)
    monkeypatch.setattr("os.fdatasync", fail)
    with pytest.raises(OSError, match="Input/output"), followed(tmp_path / "file"):
        time.sleep(0.1)


def test_interrupted_while_its_threads_begin_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(ThreadPoolExecutor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if fn is files._sync_along:
                raise KeyboardInterrupt
            return super().submit(fn, *args, **kwargs)

    def follow() -> None:
        with suppress(KeyboardInterrupt), followed(tmp_path / "file"):
            pass

    monkeypatch.setattr(files, "ThreadPoolExecutor", Interrupted)
    following = Thread(target=follow, daemon=True)
    following.start()
    following.join(30)
    assert not following.is_alive()
