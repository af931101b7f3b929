"""What all processes of a test session share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock


@contextmanager
def made_once(name: str, factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A path that one process makes within the block, if it is not there, while the others wait."""
    base = factory.getbasetemp()
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(common / f"{name}.lock"):
        yield common / name
