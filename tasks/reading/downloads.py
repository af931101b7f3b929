"""Local copies of remote files, under AMAZON_FT_HOME; asked for anew at each run whether they changed.

    downloads/URL/listing.json     what the URL names, in order: each file's stamp, local copy and digest
    downloads/URL/FILE/trn.json    a copy; FILE is made of the remote path and its stamp, so that no other takes its place

Names of folders are digests, for a URL may hold a token.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from tasks.caching.files import file_digest, space_checked, text_digest, write_atomic
from tasks.refs import PipelineError, Value, home

logger = logging.getLogger(__name__)

STAMPS = {"blobid", "crc", "digest", "etag", "generation", "lastmodified", "contentmd5", "md5", "md5hash", "mtime", "sha", "size"}
"""Fields of fsspec's `info` that change with a file's content, whatever the store; upper case, hyphens and underscores apart."""
QUERY = re.compile(r"\?[^\s'\"]+")


class Copy(Value):
    """A local copy of a remote file."""

    stamp: str
    file: str
    """Below the URL's folder."""
    sha256: str


class Listing(Value):
    """The files that a URL names."""

    files: tuple[Copy, ...]


def fetch(url: str) -> list[Path]:
    """Local copies of what an fsspec URL names, by their remote names; fetched where they are new, changed or damaged.

    Where nobody can be asked, whole copies of last time are used, with a warning.

    Raises:
        OSError: with the reason why there are none.
        NoSpaceError: when the disk is full.
    """
    folder = home() / "downloads" / text_digest(url)[:16]
    before = _read_listing(folder)
    try:
        with space_checked(folder):
            now = Listing(files=tuple(_fetch_all(url, folder, before)))
    except PipelineError:
        raise
    except Exception as error:  # each store raises its own
        if before is None or not all(_is_intact(folder, copy) for copy in before.files):
            raise OSError(without_query(_reason(error, url))) from error
        logger.warning("%s: %s; the copies of last time are used.", without_query(url), without_query(_reason(error, url)))
        now = before
    if now != before:
        write_atomic(folder / "listing.json", now.model_dump_json(indent=1).encode())
    return [folder / copy.file for copy in now.files]


def without_query(text: str) -> str:
    """A text about URLs without what stands behind their question marks, which may be secret.

    >>> without_query("no answer from 'https://x/trn.json?token=abc'")
    "no answer from 'https://x/trn.json?...'"
    """
    return QUERY.sub("?...", text)


def _read_listing(folder: Path) -> Listing | None:
    with suppress(OSError, ValueError):
        return Listing.model_validate_json((folder / "listing.json").read_bytes())
    return None


def _is_intact(folder: Path, copy: Copy) -> bool:
    with suppress(OSError):
        return file_digest(folder / copy.file) == copy.sha256
    return False


def _fetch_all(url: str, folder: Path, before: Listing | None) -> Iterator[Copy]:
    import fsspec

    opened = fsspec.open_files(url, "rb")
    if not opened:
        raise FileNotFoundError("not found")
    known = {copy.file: copy for copy in before.files} if before else {}
    for file in sorted(opened, key=lambda file: file.path):
        info = file.fs.info(file.path)
        stamp = text_digest(json.dumps(stamp_of(info), default=str))
        name = f"{text_digest(f'{file.path} {stamp}')[:16]}/{Path(urlsplit(file.path).path).name or 'download'}"
        if (copy := known.get(name)) is not None and _is_intact(folder, copy):
            yield copy
        else:
            yield Copy(stamp=stamp, file=name, sha256=_download(file, folder / name, info.get("size")))


def stamp_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """The part of fsspec's `info` that tells whether a file has changed.

    >>> stamp_of({"name": "/x", "size": 3, "Last-Modified": "Fri", "atime": 7})
    {'Last-Modified': 'Fri', 'size': 3}
    """
    return {name: info[name] for name in sorted(info) if re.sub("[-_]", "", name).lower() in STAMPS}


def _download(opened: Any, target: Path, size: int | None) -> str:
    """Fetch a file in one step; its SHA-256."""
    draft = target.parent.with_name(f".{uuid4().hex}")
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        opened.fs.get_file(opened.path, str(draft))
        if size is not None and draft.stat().st_size != size:
            raise OSError(f"cut short: got {draft.stat().st_size:,} bytes; expected {size:,}")
        digest = file_digest(draft)
        target.parent.mkdir(exist_ok=True)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return digest


def _reason(error: BaseException, url: str) -> str:
    """The first line of what went wrong; stores wrap it into errors that only repeat the address."""
    inner: BaseException | None = error
    while inner is not None:
        line = (getattr(inner, "strerror", None) or str(inner)).strip().split("\n")[0]
        if line and line not in url:
            return line
        error, inner = inner, inner.__cause__
    return "not found" if isinstance(error, FileNotFoundError) else type(error).__name__
