"""Several source files are read, cached and, on a cluster, spread one by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.pipeline import read_products
from tasks.caching.context import planning
from tasks.catalogue import lines
from tasks.config import CatalogueConfig, IngestConfig
from tasks.ingest import ingest
from tasks.reading.sources import locate_source
from tests.support import forked
from tests.support.checkout import PROJECT

READ = Path(__file__).parent / "shard_stages.py"
FIVE = 5


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Five files of a few products each; some are in two of them."""
    made = list(lines(CatalogueConfig(rows=100, malformed_lines=0)))
    paths = [tmp_path / f"shard-{number}.json" for number in range(FIVE)]
    for number, path in enumerate(paths):
        path.write_text("\n".join(made[number * 18 : number * 18 + 25]) + "\n", encoding="utf-8")
    return list(map(str, paths))


def read(files: list[str], **env: str) -> dict[str, Any]:
    done = forked.run([READ, *files], cwd=PROJECT, env=os.environ | env | {"PYTHONPATH": str(PROJECT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def whole(files: list[str]) -> str:
    return ingest.fn(locate_source(tuple(files)), IngestConfig()).data.digest


def planned(files: list[str]) -> list[list[str]]:
    with planning("shards") as plan:
        read_products(locate_source(tuple(files)), IngestConfig())
    return [[step.name, step.state] for step in plan.steps]


def test_of_four_files_a_fifth_runs_one_ingest(prefect_api: str, files: list[str]) -> None:
    assert planned(files) == [["ingest", "run"]] * FIVE + [["join", "unknown"]]
    first = read(files[:4])
    assert first["stages"] == [["ingest", "completed"]] * 4 + [["join", "completed"]]
    assert first["digest"] == whole(files[:4])
    assert planned(files) == [["ingest", "cached"]] * 4 + [["ingest", "run"], ["join", "unknown"]]
    more = read(files)
    assert more["stages"] == [["ingest", "cached"]] * 4 + [["ingest", "completed"], ["join", "completed"]]
    assert more["digest"] == whole(files)
    assert planned(files) == [["ingest", "cached"]] * FIVE + [["join", "cached"]]


@pytest.fixture
def cluster(home: Path) -> Iterator[Any]:
    """A Dask cluster of two worker processes."""
    pytest.importorskip("prefect_dask", reason="the extra `dask` is not installed")
    code = "from distributed import LocalCluster; import sys\nif __name__ == '__main__':\n"
    code += " cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)\n"
    code += " print(cluster.scheduler_address, flush=True); sys.stdin.read(); cluster.close()"
    script = home.parent / "cluster.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    assert process.stdout
    yield process.stdout.readline().strip()
    process.stdin.close()
    process.wait(120)
    process.stdout.close()


@pytest.mark.slow("a cluster of processes")
def test_cluster_reads_files_at_once_and_records_them(prefect_api: str, cluster: str, files: list[str]) -> None:
    spread = read(files, AMAZON_FT_DASK=cluster)
    assert spread["stages"] == [["ingest", "completed"]] * FIVE + [["join", "completed"]]
    assert spread["digest"] == whole(files)
    assert read(files)["stages"] == [["ingest", "cached"]] * FIVE + [["join", "cached"]]
