"""What a fully cached run costs, which starts no server, beside an empty flow with one; and what a plan costs.

usage: python -m tests.bench.bench_rerun [RECIPE] [--runs N] [--out JSON]      runs RECIPE (default: demo) once if need be

Whole processes in turn, A B A B ...: `amazon-ft run RECIPE` with every stage cached, and an empty flow against the same kind
of ephemeral server. Prints the medians and their difference.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

EMPTY = """
import os
os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
from flows.server.ephemeral import prefect_server
with prefect_server():
    from prefect import flow
    flow(name="empty")(lambda: None)()
"""


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cli = [sys.executable, "-m", "flows.cli"]
    run, empty, plan = [*cli, "run", arguments.recipe, "--json"], [sys.executable, "-c", EMPTY], [*cli, "plan", arguments.recipe]
    seconds(run)
    states = {
        stage["state"] for stage in json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)["stages"]
    }
    if states != {"cached"}:
        sys.exit(f"bench_rerun: the second run of {arguments.recipe} was not all cached: {states}")
    times: dict[str, list[float]] = {"cached run": [], "empty flow": [], "plan": []}
    for _ in range(arguments.runs):
        for name, command in zip(times, (run, empty, plan), strict=True):
            times[name].append(seconds(command))
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    beyond = round(medians["cached run"] - medians["empty flow"], 2)
    result = {
        "recipe": arguments.recipe,
        "median_seconds": medians,
        "all_seconds": {name: [round(value, 2) for value in values] for name, values in times.items()},
        "beyond_prefect_seconds": beyond,
        "machine": f"{platform.machine()}, python {platform.python_version()}, prefect {version('prefect')}",
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
