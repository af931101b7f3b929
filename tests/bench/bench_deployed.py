"""What `amazon-ft up` takes to a finished run, and what a fully cached deployed run costs beyond an empty one.

usage: python -m tests.bench.bench_deployed [--runs N] [--out JSON]

A server, workers and a tiny model of its own under a temporary directory. An empty flow is deployed to the same pool; cached
runs and empty runs take turns, each timed by the server from its creation to its end. Prints medians and their difference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from tests.e2e.served import SHORT, Served, serve

EMPTY = """
from prefect import flow

@flow
def empty():
    pass
"""


def deploy_empty(served: Served) -> str:
    """The id of a deployment of an empty flow on pool cpu."""
    (served.root / "empty.py").write_text(EMPTY)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "empty.py:empty", "-n", "empty", "-p", "cpu"]
    subprocess.run(command, env=served.env, cwd=served.root, check=True, capture_output=True)
    return served.deployment("empty/empty")["id"]


def seconds(run: dict[str, str]) -> float:
    """From a run's creation to its end, by the server's clock."""
    assert run["state_type"] == "COMPLETED", run["state"]
    return (datetime.fromisoformat(run["end_time"]) - datetime.fromisoformat(run["created"])).total_seconds()


def measure(runs: int) -> dict[str, object]:
    """Everything, once from a cold start."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as served:
        ready = time.perf_counter() - started
        first = served.ended(served.start(*SHORT), 600)
        finished = time.perf_counter() - started
        empty, times = deploy_empty(served), {"cached": list[float](), "empty": list[float]()}
        for _ in range(runs):
            times["cached"].append(seconds(served.ended(served.start(*SHORT))))
            body = {"state": {"type": "SCHEDULED"}}
            times["empty"].append(seconds(served.ended(served.post(f"deployments/{empty}/create_flow_run", **body)["id"])))
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    return {
        "up_ready_seconds": round(ready, 1),
        "first_run_seconds": round(seconds(first), 1),
        "up_to_finished_run_seconds": round(finished, 1),
        "median_seconds": medians,
        "all_seconds": {name: [round(value, 2) for value in values] for name, values in times.items()},
        "cached_beyond_empty_seconds": round(medians["cached"] - medians["empty"], 2),
        "load": [round(value, 1) for value in os.getloadavg()],
        "machine": f"{os.cpu_count()} cores, python {platform.python_version()}, prefect {version('prefect')}",
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments.runs), indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
