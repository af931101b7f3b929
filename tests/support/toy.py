"""Two small stages, for tests of the machinery around stages."""

from __future__ import annotations

import time

from tasks.caching.locks import work_directory
from tasks.caching.stage import current_key, stage
from tasks.caching.store import publish
from tasks.config import SampleConfig
from tasks.refs import Artifact, InputError, Products


def _published(kind: str, text: str, rows: int) -> Artifact:
    with publish(kind) as draft:
        (draft / "rows.txt").write_text(text)
        draft.rows = rows
    return draft.artifact


@stage(version=1)
def read(text: str, config: SampleConfig) -> Products:
    """Upper-case text; refuses `bad`, fails for a while on `flaky`."""
    if text == "bad":
        raise InputError("toy.read: text: got 'bad'; expected anything else. Say something else.")
    return Products(data=_published("products", text.upper() * config.rows, rows=config.rows), lines=len(text))


@stage(version=1, unfinished=lambda key: "resumable from step 3")
def count(products: Products) -> Products:
    """Length of what was read; keeps a work directory."""
    with work_directory(current_key()) as work:
        (work / "checkpoint").write_text("3")
        time.sleep(0.01)
    return Products(data=_published("counts", str(len((products.data / "rows.txt").read_text())), rows=1))
