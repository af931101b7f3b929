"""Prefect's database, migrated once a session: that is half of a server's own first start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.once import made_once

NAME = "prefect.db"


def place_database(prefect_home: Path, factory: pytest.TempPathFactory) -> None:
    """Put an empty, migrated database where a server with that PREFECT_HOME looks for its own."""
    with made_once("migrated", factory) as made:
        if not (made / NAME).exists():
            command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
            environment = os.environ | {
                "PREFECT_HOME": str(made),
                "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{made / NAME}",
            }
            subprocess.run(command, env=environment, check=True, capture_output=True)
    prefect_home.mkdir(parents=True, exist_ok=True)
    for file in made.glob(f"{NAME}*"):  # with its write-ahead log
        shutil.copyfile(file, prefect_home / file.name)
