"""The same run with the server's data in PostgreSQL, as a team's server has it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import SHORT, serve

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@pytest.fixture
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


@pytest.mark.slow
def test_run_completes_and_is_cached_on_postgresql(postgres: str, tmp_path: Path) -> None:
    with serve(tmp_path / "served", "--no-ui", "--database-url", postgres) as served:
        first, second = (served.ended(served.start(*SHORT)) for _ in range(2))
        assert (first["state_type"], second["state_type"]) == ("COMPLETED", "COMPLETED")
        assert len(served.children(first["id"])) == 1
        assert served.children(second["id"]) == []
        assert {"demo-source", "demo-stages", "demo-evaluation"} <= set(served.artifacts(first["id"]))
        assert not (served.root / "prefect" / "prefect.db").exists()
