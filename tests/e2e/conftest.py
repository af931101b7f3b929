"""Runs of a tiny recipe, and a server with workers, for whole modules of tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.served import Served, serve
from tests.e2e.tiny_runs import Tiny, make_tiny
from tests.support.database import place_database


@pytest.fixture(scope="session")
def finished(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny run that came to its end; do not change it, copy it."""
    tiny = make_tiny(tmp_path_factory.mktemp("finished") / "tiny")
    tiny.run()
    return tiny


@pytest.fixture
def tiny(finished: Tiny, tmp_path: Path) -> Tiny:
    """A copy of the finished run, to change."""
    return finished.copy_to(tmp_path / "tiny")


@pytest.fixture
def fresh(prefect_api: str, tmp_path: Path) -> Tiny:
    """A tiny recipe that never ran."""
    return make_tiny(tmp_path / "tiny")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`amazon-ft up`."""
    root = tmp_path_factory.mktemp("served")
    place_database(root / "prefect", tmp_path_factory)
    with serve(root) as running:
        yield running


@pytest.fixture(scope="session")
def long() -> list[str]:
    """Settings of a training that can be killed, and goes on from its checkpoint."""
    return ["finetune.max_steps=1500", "finetune.logging_steps=10", "finetune.save_steps=100"]
