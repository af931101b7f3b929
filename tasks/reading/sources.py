"""Paths, globs and URLs to the files they name, each with the digest of its content."""

from __future__ import annotations

import glob
import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from tasks.caching.files import file_digest
from tasks.config import HALF_A_PAIR
from tasks.reading.downloads import fetch, without_query
from tasks.refs import InputError, Source, SourceFile

URL = re.compile(r"^(?!file://)[A-Za-z][A-Za-z0-9+.-]+(://|::)")
HUB_DATASET = re.compile(r"^hf://datasets/[^/]+/[^/]+/?$")
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def locate_source(sources: tuple[str, ...], setting: str = "ingest.sources") -> Source:
    """The files that paths, globs and fsspec URLs name, in that order, a glob's files by name, each file once.

    A directory that the library `datasets` saved stands for its files, of several splits for those of `train`. What a URL names
    is fetched to AMAZON_FT_HOME/downloads, and again only once it has changed.

    Raises:
        InputError: listing everything that is not there or is no plain file, and the setting that named it.
    """
    return digest_files(find_files(sources, setting), setting)


def digest_files(files: Iterable[Path], setting: str = "ingest.sources") -> Source:
    """Files, each by the digest of its content.

    Raises:
        InputError: for one that can't be read.
    """
    return Source(files=tuple(_source_file(path, setting) for path in files))


def find_files(sources: tuple[str, ...], setting: str = "ingest.sources") -> list[Path]:
    """The files of `locate_source`, unread.

    Raises:
        InputError: as locate_source.
    """
    files, problems = dict[Path, None](), list[str]()
    for source in sources:
        try:
            files.update(dict.fromkeys(fetch(_hub_pattern(source)) if URL.match(source) else _match(source)))
        except (ImportError, OSError, RuntimeError, ValueError) as error:  # a name that is too long, a user that is none
            problems.append(f"{without_query(source)}: {getattr(error, 'strerror', None) or str(error) or type(error).__name__}")
    problems.extend(f"{path}: is {kind}; expected a file" for path in files if (kind := _oddity(path)))
    if problems:
        listed = "; ".join(problems)
        raise InputError(f"{setting}: {listed}. Give paths, globs or URLs of data files, or directories that `datasets` saved.")
    return list(files)


def _match(source: str) -> Iterable[Path]:
    """The path itself, else what it matches as a glob."""
    path = Path(source.removeprefix("file://")).expanduser().absolute()
    if path.exists():
        return _saved_files(path) or [path]
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207  # Path's takes no absolute one
    if not found:
        raise FileNotFoundError("not found")
    return found


def _saved_files(path: Path) -> list[Path]:
    """The files of a directory that `Dataset.save_to_disk` wrote, in their order. Source: datasets 4.8.5, arrow_dataset.py."""
    if (path / "dataset_dict.json").is_file():
        path = path / "train"
    state = path / "state.json"
    return [path / file["filename"] for file in json.loads(state.read_bytes())["_data_files"]] if state.is_file() else []


def _oddity(path: Path) -> str | None:
    if HALF_A_PAIR.search(str(path)):
        return "named in bytes that are no UTF-8"
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"a link to nothing ({error.strerror})" if path.is_symlink() else f"not to be had ({error.strerror})"
    if not stat.S_ISREG(mode):
        return KINDS.get(stat.S_IFMT(mode), "no plain file")
    return None if os.access(path, os.R_OK) else "closed to this user (check its permissions)"


def _source_file(path: Path, setting: str) -> SourceFile:
    try:
        return SourceFile(url=str(path), digest=file_digest(path), size_bytes=path.stat().st_size)
    except OSError as error:
        raise InputError(f"{setting}: {path}: {error.strerror}; expected a readable file. Check its permissions.") from error


def _hub_pattern(url: str) -> str:
    """A data set of the Hub without a path stands for the Parquet files of its training split."""
    return f"{url.rstrip('/')}/**/*train*.parquet" if HUB_DATASET.match(url) else url
