"""The manifest of a directory that must stay as it was written: an artifact's, a checkpoint's.

    manifest.json   {"kind": KIND, "files": {NAME: {"sha256": 64 hex digits, "size": bytes}}}; written last

A directory without one was not written to its end.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tasks.caching.files import file_digest, text_digest, write_atomic, written_digest
from tasks.refs import Value

MANIFEST = "manifest.json"


class Listed(Value):
    """A file as it was written."""

    size: int
    sha256: str


class Manifest(Value):
    """All files below a directory by their relative names, the manifest itself left out."""

    kind: str
    files: dict[str, Listed]

    @property
    def text(self) -> str:
        """The bytes of manifest.json; equal for equal files."""
        return json.dumps(self.model_dump(), indent=1, sort_keys=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the text, 64 hex digits: the digest of the whole directory."""
        return text_digest(self.text)

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(file.size for file in self.files.values())


class Damage(NamedTuple):
    """A file that is not as its manifest says."""

    how: str
    """missing, corrupt, or stray: there without being named."""
    name: str
    """Relative to the directory."""


def write_manifest(path: Path, kind: str) -> Manifest:
    """Sync every file below a directory to disk, and then describe them in its manifest."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file != path / MANIFEST)
    with ThreadPoolExecutor() as pool:
        listed = zip(files, pool.map(_synced, files), strict=True)
        manifest = Manifest(kind=kind, files={str(file.relative_to(path)): entry for file, entry in listed})
    write_atomic(path / MANIFEST, manifest.text.encode())
    return manifest


def _synced(file: Path) -> Listed:
    digest = written_digest(file)
    return Listed(size=file.stat().st_size, sha256=digest)


def read_names(path: Path) -> list[str]:
    """The files that a directory's manifest names."""
    return list(Manifest.model_validate_json((path / MANIFEST).read_bytes()).files)


def find_damage(path: Path, *, expected: str | None = None, digests: bool = True) -> Damage | None:
    """The first file of a directory that is not as written, the manifest included, or is more; None for an intact one.

    `expected` is the manifest's own digest, where it is known. Without `digests` only sizes are compared.
    """
    try:
        text = (path / MANIFEST).read_bytes()
        manifest = Manifest.model_validate_json(text)
    except OSError:
        return Damage("missing", MANIFEST)
    except ValueError:
        return Damage("corrupt", MANIFEST)
    if expected not in (None, hashlib.sha256(text).hexdigest()):
        return Damage("corrupt", MANIFEST)
    found = ((_damage_of(path / name, file, digests), name) for name, file in manifest.files.items())
    stray = (("stray", name) for name in sorted(_listing(path) - {*manifest.files, MANIFEST}))
    return next((Damage(how, name) for how, name in chain(found, stray) if how), None)


def _listing(path: Path) -> set[str]:
    """All that is no directory; one without files is nothing."""
    return {str(item.relative_to(path)) for item in path.rglob("*") if item.is_symlink() or not item.is_dir()}


def _damage_of(file: Path, written: Listed, digests: bool) -> str:
    try:
        intact = file.stat().st_size == written.size and (not digests or file_digest(file) == written.sha256)
    except OSError:
        return "missing"
    return "" if intact else "corrupt"
