"""The tests of test_deployed.py again, with the server's data in PostgreSQL, as a team's server has it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.served import Served, serve
from tests.e2e.test_deployed import (
    finished_run,
    test_artifacts_of_both_runs_are_readable,
    test_cancelled_parent_cancels_the_training_which_leaves_a_checkpoint,
    test_failure_of_the_training_reaches_the_parent_in_its_own_words,
    test_killed_training_crashes_the_run_and_a_retry_reruns_only_that,
    test_killed_worker_crashes_its_run_with_the_cause_and_up_starts_it_again,
    test_missing_worker_is_said_with_the_command_that_starts_one,
    test_run_completes_and_trains_on_the_cuda_pool,
    test_second_run_is_all_cached_without_a_child,
)

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """URL of a real PostgreSQL of the test's own, in a directory that its user can reach; it refuses to run as root."""
    if not BINARIES:
        pytest.skip("PostgreSQL's binaries are not in /usr/lib/postgresql")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres")
        run("initdb", "-D", f"{folder}/data", "-U", "prefect", "--auth=trust", "--no-sync")
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
        run("pg_ctl", "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            run("createdb", "-h", "127.0.0.1", "-p", port, "-U", "prefect", "prefect")
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
        finally:
            run("pg_ctl", "-D", f"{folder}/data", "-m", "fast", "stop")


def run(program: str, *arguments: str) -> None:
    """One of PostgreSQL's programs, as its user where this is root."""
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    command = [*user, str(BINARIES[-1] / program), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")


@pytest.fixture(scope="module")
def served(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`amazon-ft up` without its pages, on that database."""
    with serve(tmp_path_factory.mktemp("served"), "--no-ui", "--database-url", postgres) as running:
        yield running
        assert not (running.root / "prefect" / "prefect.db").exists()


__all__ = [
    "finished_run",
    "test_artifacts_of_both_runs_are_readable",
    "test_cancelled_parent_cancels_the_training_which_leaves_a_checkpoint",
    "test_failure_of_the_training_reaches_the_parent_in_its_own_words",
    "test_killed_training_crashes_the_run_and_a_retry_reruns_only_that",
    "test_killed_worker_crashes_its_run_with_the_cause_and_up_starts_it_again",
    "test_missing_worker_is_said_with_the_command_that_starts_one",
    "test_run_completes_and_trains_on_the_cuda_pool",
    "test_second_run_is_all_cached_without_a_child",
]
