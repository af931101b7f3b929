"""With the server's data in PostgreSQL, as a team's server has it: of test_deployed.py what differs there, and lost connections.

What differs: the storage of runs, logs and artifacts, the transitions that server, workers and runs ask for at once, and the pool
of connections. What a failure says, or what becomes of a killed process, is decided before anything is stored.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.served import Served, serve
from tests.e2e.test_deployed import (
    again,
    test_run_completes_and_trains_on_the_cuda_pool,
    test_second_run_is_all_cached_without_a_child,
)
from tests.e2e.test_deployed_faults import test_cancelled_parent_cancels_the_training_which_leaves_a_checkpoint

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


CLOSE_ALL = """
select count(pg_terminate_backend(pid)) from pg_stat_activity where usename = 'prefect' and pid <> pg_backend_pid()
"""


@dataclass(frozen=True)
class Postgres:
    """A running PostgreSQL."""

    folder: str
    port: str

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://prefect@127.0.0.1:{self.port}/prefect"

    def run(self, program: str, *arguments: str) -> str:
        """What one of PostgreSQL's programs printed, run as its user where this is root."""
        user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        done = subprocess.run(
            [*user, str(BINARIES[-1] / program), *arguments], check=True, stdout=subprocess.PIPE, cwd="/", text=True
        )
        return done.stdout

    def ask(self, query: str) -> str:
        return self.run("psql", "-h", "127.0.0.1", "-p", self.port, "-U", "prefect", "-At", "-c", query, "prefect")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL of the test's own, in a directory that its user can reach; it refuses to run as root."""
    if not BINARIES:
        pytest.skip("PostgreSQL's binaries are not in /usr/lib/postgresql")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres")
        database = Postgres(folder, port)
        database.run("initdb", "-D", f"{folder}/data", "-U", "prefect", "--auth=trust", "--no-sync")
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
        log = str(Path(folder, "log"))
        database.run("pg_ctl", "-D", f"{folder}/data", "-w", "-l", log, "-o", options, "start")
        try:
            database.run("createdb", "-h", "127.0.0.1", "-p", port, "-U", "prefect", "prefect")
            yield database
        finally:
            database.run("pg_ctl", "-D", f"{folder}/data", "-m", "fast", "stop")


@pytest.fixture(scope="module")
def served(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`amazon-ft up` without its pages, on that database."""
    with serve(tmp_path_factory.mktemp("served"), "--no-ui", "--database-url", postgres.url) as running:
        yield running
        assert not (running.root / "prefect" / "prefect.db").exists()


@pytest.fixture(scope="module")
def settings(long: list[str]) -> list[str]:
    """Of the finished run."""
    return [*long, "finetune.max_steps=150"]


@pytest.fixture(scope="module")
def finished_run(served: Served, postgres: Postgres, settings: list[str]) -> str:
    """A run; while it trained, the server lost its connections to the database four times. Its id."""
    run = served.start(*settings)
    served.training(run)
    lost = 0
    for _ in range(4):
        lost += int(postgres.ask(CLOSE_ALL))
        time.sleep(0.5)
    assert lost >= 4, "each time the server had opened a new one"
    served.ended(run)
    return run


__all__ = [
    "again",
    "test_cancelled_parent_cancels_the_training_which_leaves_a_checkpoint",
    "test_run_completes_and_trains_on_the_cuda_pool",
    "test_second_run_is_all_cached_without_a_child",
]
