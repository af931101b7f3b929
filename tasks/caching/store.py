"""Artifacts under AMAZON_FT_HOME: publishing and verification.

    artifacts/KIND/DIGEST/   published directories, named by content, never changed; manifest.json names every file
    records/KEY              what a stage with that key returned (written by Prefect as the task's result)
    drafts/                  directories being written; each is locked by its writer
    work/KEY/                a training's checkpoints, locked by the run that trains (work/KEY.lock)
    runs/ID.json             what each run used, locked while it runs
    digests.sqlite           memo of file digests
    models/RECIPE/NAME       links to saved models

Every write goes to a draft, is synced, and is renamed into place; the kernel frees a lock when its holder dies,
however it dies.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from uuid import uuid4

from pydantic import BaseModel

from tasks.caching.context import context
from tasks.caching.files import space_checked, sync_directory
from tasks.caching.locks import locked, mutex
from tasks.caching.manifest import find_damage, write_manifest
from tasks.config import Verify
from tasks.refs import Artifact, home


class Missing(Exception):  # noqa: N818  # an outcome, not an error
    """An artifact or record can't be served; the message says why."""


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
    # the lock comes before there is anything that gc could take for a leftover
    with space_checked(path, need_bytes), locked(path.with_suffix(".lock"), remove=True):
        path.mkdir()
        try:
            draft = Draft(path)
            yield draft
            draft._published = _seal(draft, kind)  # pyright: ignore[reportPrivateUsage]
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _seal(draft: Draft, kind: str) -> Artifact:
    manifest = write_manifest(draft.path, kind)
    artifact = Artifact(kind=kind, digest=manifest.digest, rows=draft.rows, size_bytes=manifest.size_bytes)
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
    sync_directory(artifact.path.parent)
    return artifact


def use(*artifacts: Artifact) -> None:
    """Note that the present run relies on these artifacts, before it looks at them, so that gc keeps them."""
    run = context().run
    if run is None:
        return
    names = [f"{artifact.kind}/{artifact.digest[:32]}" for artifact in artifacts]
    new = [name for name in names if name not in run.artifacts]
    if new:
        with mutex():
            run.artifacts.extend(new)
            run.write()


def check(value: BaseModel) -> None:
    """Verify every artifact that a recorded result names.

    Raises:
        Missing: naming what is missing or damaged.
    """
    artifacts = list(artifacts_of(value))
    use(*artifacts)
    for artifact in artifacts:
        verify(artifact, context().verify)


def artifacts_of(value: BaseModel) -> Iterator[Artifact]:
    """Every artifact that a reference names, its own first."""
    if isinstance(value, Artifact):
        yield value
        return
    for name in type(value).model_fields:
        item = getattr(value, name)
        for part in cast("tuple[object, ...]", item) if isinstance(item, tuple) else (item,):
            if isinstance(part, BaseModel):
                yield from artifacts_of(part)


def verify(artifact: Artifact, how: Verify = "full") -> None:
    """Check that an artifact is there with the bytes it was published with, and nothing else.

    Raises:
        Missing: naming the file that is missing, damaged or stray.
    """
    if damage := find_damage(artifact.path, expected=artifact.digest, digests=how == "full"):
        raise Missing(f"output {damage.how}: {(artifact.path / damage.name).relative_to(home())}")
