"""Files under AMAZON_FT_HOME: publishing, digests, verification, locks, records, runs.

    artifacts/KIND/DIGEST/   published directories, named by content, never changed; manifest.json names every file
    records/KEY              what a stage with that key returned (written by Prefect as the task's result)
    drafts/                  directories being written; each is locked by its writer
    work/KEY/                a training's checkpoints, locked by the run that trains
    runs/ID.json             what each run used, locked while it runs
    digests.sqlite           memo of file digests
    models/RECIPE/NAME       links to saved models

Every write goes to a draft, is synced, and is renamed into place; locks are `flock`s, which the kernel frees when their
holder dies, however it dies.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from tasks.refs import Artifact, NoSpaceError, home

MANIFEST = "manifest.json"
RACY_SECONDS = 0.1
"""A file changed this recently may change again within one tick of the clock, so its digest is not memoised."""

Verify = Literal["full", "size"]


class Missing(Exception):  # noqa: N818  # an outcome, not an error
    """An artifact or record can't be served; the message says why."""


# Digests


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
    return _text_digest(json.dumps([[name, file_digest(path / name)] for name in sorted(names)]))


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# Publishing


@dataclass
class Draft:
    """A directory that becomes an artifact when its `publish` block ends without an error."""

    path: Path
    rows: int = 0
    _published: Artifact | None = field(default=None, repr=False)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def artifact(self) -> Artifact:
        """The reference; after the block."""
        assert self._published is not None, "read Draft.artifact after the publish block"
        return self._published


@contextmanager
def publish(kind: str, *, need_bytes: int = 0) -> Generator[Draft]:
    """Write files into a draft and publish them atomically under their content digest.

        with publish("products") as draft:
            write(draft / "products.arrow")
            draft.rows = 3
        return draft.artifact

    An error leaves nothing behind. An artifact that is already there and intact is kept.

    Raises:
        NoSpaceError: when the disk has less than `need_bytes` free, or fills up while writing.
    """
    path = home() / "drafts" / f"{kind}-{uuid4().hex}"
    with space_checked(path, need_bytes):
        path.mkdir(parents=True)
        with _flock(path.with_suffix(".lock"), remove=True):
            try:
                draft = Draft(path)
                yield draft
                draft._published = _seal(draft, kind)  # pyright: ignore[reportPrivateUsage]
            finally:
                shutil.rmtree(path, ignore_errors=True)


def _seal(draft: Draft, kind: str) -> Artifact:
    files = _listing(draft.path)
    manifest = json.dumps({"kind": kind, "files": files}, indent=1, sort_keys=True)
    _write_synced(draft / MANIFEST, manifest.encode())
    artifact = Artifact(
        kind=kind, digest=_text_digest(manifest), rows=draft.rows, size_bytes=sum(int(entry["size"]) for entry in files.values())
    )
    use(artifact)
    with suppress(Missing):
        verify(artifact)
        return artifact
    artifact.path.parent.mkdir(parents=True, exist_ok=True)
    if artifact.path.exists():
        artifact.path.replace(draft.path.with_suffix(".damaged"))
        shutil.rmtree(draft.path.with_suffix(".damaged"), ignore_errors=True)
    try:
        draft.path.replace(artifact.path)
    except OSError as error:  # another run published the same bytes in between
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    _sync_directory(artifact.path.parent)
    return artifact


def _listing(path: Path) -> dict[str, dict[str, Any]]:
    """{relative name: size, sha256} of every file below, each synced to disk."""
    files: dict[str, dict[str, Any]] = {}
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            files[str(file.relative_to(path))] = {
                "size": file.stat().st_size,
                "sha256": hashlib.file_digest(handle, "sha256").hexdigest(),
            }
    return files


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file's content in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        _write_synced(draft, data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
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


# Verification


def verify(artifact: Artifact, how: Verify = "full") -> None:
    """Check that an artifact is there with the bytes it was published with.

    Raises:
        Missing: naming the file that is missing or damaged.
    """
    manifest = artifact.path / MANIFEST
    try:
        text = manifest.read_bytes()
    except OSError:
        raise Missing(f"output missing: {_relative(artifact.path)}") from None
    if hashlib.sha256(text).hexdigest() != artifact.digest:
        raise Missing(f"output corrupt: {_relative(manifest)}")
    for name, entry in json.loads(text)["files"].items():
        _verify_file(artifact.path / name, entry, how)


def _verify_file(file: Path, entry: dict[str, Any], how: Verify) -> None:
    try:
        size = file.stat().st_size
        intact = size == entry["size"] and (how == "size" or file_digest(file) == entry["sha256"])
    except OSError:
        raise Missing(f"output missing: {_relative(file)}") from None
    if not intact:
        raise Missing(f"output corrupt: {_relative(file)}")


def _relative(path: Path) -> str:
    return str(path.relative_to(home()))


# Locks


@contextmanager
def _flock(path: Path, *, remove: bool = False) -> Generator[int]:
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
    with _flock(home() / "mutex.lock"):
        yield


# Runs


@dataclass
class Run:
    """What one run used, in runs/ID.json; locked for as long as the run lives."""

    recipe: str
    config: dict[str, Any]
    id: str = field(default_factory=lambda: f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid4().hex[:8]}")
    started: float = field(default_factory=time.time)
    stages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """One entry a stage call: name, key, code, inputs, state, reason, rows, seconds, digest, path."""
    artifacts: list[str] = field(default_factory=list[str])
    """KIND/DIGEST of every artifact that the run was handed or published."""
    finished: bool = False
    """Whether the run came to its end without an error."""

    @property
    def file(self) -> Path:
        """Where the record lies."""
        return home() / "runs" / f"{self.id}.json"

    def write(self) -> None:
        """Store what is known so far."""
        write_atomic(self.file, json.dumps(asdict(self)).encode())


_open_runs: list[Run] = []


@contextmanager
def run_record(recipe: str, config: dict[str, Any]) -> Generator[Run]:
    """Keep the record of a run while the block lives; a run inside a run adds to the outer one."""
    if _open_runs:
        yield _open_runs[-1]
        return
    run = Run(recipe, config)
    with _flock(run.file.with_suffix(".lock"), remove=True):
        _open_runs.append(run)
        try:
            run.write()
            yield run
            run.finished = True
        finally:
            _open_runs.pop()
            run.write()


def current_run() -> Run | None:
    """The run that this process is in."""
    return _open_runs[-1] if _open_runs else None


def use(*artifacts: Artifact) -> None:
    """Note that the present run relies on these artifacts, before it looks at them, so that gc keeps them."""
    run = current_run()
    if run is None:
        return
    names = [f"{artifact.kind}/{artifact.digest[:32]}" for artifact in artifacts]
    new = [name for name in names if name not in run.artifacts]
    if new:
        with mutex():
            run.artifacts.extend(new)
            run.write()


def past_runs() -> list[dict[str, Any]]:
    """All run records, newest first; a torn one is left out."""
    runs: list[dict[str, Any]] = []
    for file in (home() / "runs").glob("*.json"):
        with suppress(ValueError, OSError):
            runs.append(json.loads(file.read_text()))
    return sorted(runs, key=lambda run: float(run["started"]), reverse=True)


# Work directories


@contextmanager
def work_directory(key: str, waiting: Any = None) -> Generator[Path]:
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
