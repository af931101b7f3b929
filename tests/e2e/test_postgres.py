"""The same run with the server's data in PostgreSQL, as a team's server has it."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import SHORT, serve

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real PostgreSQL of the test's own; it refuses to run as root."""
    if not BINARIES:
        pytest.skip("PostgreSQL's binaries are not in /usr/lib/postgresql")
    root = tmp_path_factory.mktemp("postgres")
    for parent in (root, *root.parents[:2]):
        parent.chmod(0o755)
    data = root / "data"
    data.mkdir()
    shutil.chown(data, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def as_postgres(program: str, *arguments: str) -> None:
        command = ["runuser", "-u", "postgres", "--", str(BINARIES[-1] / program), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=data)

    as_postgres("initdb", "-D", str(data), "-U", "prefect", "--auth=trust", "--no-sync")
    options = f"-c listen_addresses=127.0.0.1 -p {port} -k {data} -c fsync=off"
    as_postgres("pg_ctl", "-D", str(data), "-w", "-l", str(data / "log"), "-o", options, "start")
    try:
        as_postgres("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "prefect", "prefect")
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
    finally:
        as_postgres("pg_ctl", "-D", str(data), "-m", "fast", "stop")


@pytest.mark.slow
def test_run_completes_and_is_cached_on_postgresql(postgres: str, tmp_path: Path) -> None:
    with serve(tmp_path / "served", "--no-ui", "--database-url", postgres) as served:
        first, second = (served.ended(served.start(*SHORT)) for _ in range(2))
        assert (first["state_type"], second["state_type"]) == ("COMPLETED", "COMPLETED")
        assert len(served.children(first["id"])) == 1
        assert served.children(second["id"]) == []
        assert {"demo-source", "demo-stages", "demo-evaluation"} <= set(served.artifacts(first["id"]))
        assert not (served.root / "prefect" / "prefect.db").exists()
