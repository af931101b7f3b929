"""What every test gets: a root of its own, quiet libraries, and the places of shared data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ |= {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """AMAZON_FT_HOME of the test."""
    path = tmp_path / "home"
    monkeypatch.setenv("AMAZON_FT_HOME", str(path))
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden data and real rows that lie beside the project."""
    if not SHARED.is_dir():
        pytest.skip("../shared is not here: it holds real rows and golden files that the project does not carry")
    return SHARED
