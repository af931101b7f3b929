"""The server that `amazon-ft up` keeps for a root: named in AMAZON_FT_HOME/up.json for as long as it is up."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks.caching.files import write_atomic
from tasks.caching.locks import is_locked, locked
from tasks.refs import home


def _note() -> Path:
    return home() / "up.json"


@contextmanager
def announced(api: str) -> Generator[None]:
    """Let other commands of this root find the server for the block; of two that are up, the later one."""
    with locked(_note().with_suffix(".lock")):
        write_atomic(_note(), json.dumps({"api": api}).encode())
        try:
            yield
        finally:
            _note().unlink(missing_ok=True)


def standing_api() -> str | None:
    """The API of the server that is up for this root; None where none is."""
    if is_locked(_note().with_suffix(".lock")):
        with suppress(OSError, ValueError):  # just ending
            return json.loads(_note().read_bytes())["api"]
    return None
