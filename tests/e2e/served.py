"""`amazon-ft up` in a process of its own, and what a person does with it: runs, looks, kills."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.running.quiet import SWITCHES
from tests.support.checkout import Checkout
from tests.support.tiny import make_tiny_model

SIZES = [
    "catalogue.rows=200",
    "catalogue.malformed_lines=2",
    "sample.rows=40",
    "sample.eval_rows=6",
    "finetune.warmup_steps=1",
    "evaluate.generations=2",
    "evaluate.max_new_tokens=8",
]
SHORT = ["finetune.max_steps=4", "finetune.logging_steps=1", "finetune.save_steps=2"]
PREPARED = ["catalogue", "ingest", "sample", "sharegpt", "template", "tokenize"]
"""The demo's stages that need no device."""
PATIENCE_SECONDS = 400
"""How long to wait for what must happen: most of it takes seconds on an idle machine, and minutes on a busy one."""


@dataclass
class Served:
    """A server, its workers, and their root."""

    url: str
    root: Path
    model: Path
    process: subprocess.Popen[bytes]

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def output(self) -> str:
        """What `up` printed so far."""
        return (self.root / "up.log").read_text()

    @property
    def env(self) -> dict[str, str]:
        """Another shell's: it knows the server's address, and has a PREFECT_HOME of its own."""
        return os.environ | {"PREFECT_API_URL": f"{self.url}/api", "PREFECT_HOME": str(self.root / "other"), "DO_NOT_TRACK": "1"}

    def command(self, *words: str) -> str:
        """What a command of ours prints in another shell of this root."""
        done = self.try_command(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def try_command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of ours in another shell of this root, whether it succeeds or not."""
        environment = self.env | {"AMAZON_FT_HOME": str(self.home)}
        line = [sys.executable, "-m", "flows.cli", *words]
        return subprocess.run(line, env=environment, check=False, capture_output=True, text=True)

    def overrides(self, *more: str) -> list[str]:
        return [f"model.id={self.model}", *SIZES, *more]

    def post(self, path: str, **body: Any) -> Any:
        return self.request("POST", path, body).json()

    def get(self, path: str) -> Any:
        return self.request("GET", path).json()

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """As Prefect's client, tries again while SQLite is busy."""
        for _ in range(20):
            answer = httpx.request(method, f"{self.url}/api/{path}", json=body, timeout=60)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(0.5)
        return answer.raise_for_status()

    def change_pool(self, pool: str, *, env: dict[str, str] | None = None, **defaults: Any) -> dict[str, Any]:
        """What a pool's page lets one edit; the values before."""
        template = self.get(f"work_pools/{pool}")["base_job_template"]
        form = template["variables"]["properties"]
        before = {name: form[name].get("default") for name in defaults}
        for name, value in defaults.items():
            form[name]["default"] = value
        form["env"]["default"] |= env or {}
        self.request("PATCH", f"work_pools/{pool}", {"base_job_template": template})
        return before

    def deployment(self, name: str) -> dict[str, Any]:
        return self.get(f"deployments/name/{name}")

    def start(self, *overrides: str, deployment: str = "demo") -> str:
        """The id of a new run of recipe demo, by its own deployment or another one."""
        config = self.deployment("amazon-ft/demo")["parameters"]["config"]
        body = {"state": {"type": "SCHEDULED"}, "parameters": {"config": config, "overrides": self.overrides(*overrides)}}
        there = self.deployment(f"amazon-ft/{deployment}")["id"]
        return self.post(f"deployments/{there}/create_flow_run", **body)["id"]

    def run(self, run: str) -> dict[str, Any]:
        return self.get(f"flow_runs/{run}")

    def children(self, run: str) -> list[dict[str, Any]]:
        return self.post("flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [run]}})

    def child(self, run: str) -> dict[str, Any]:
        """The one child of a run, as soon as it is there."""
        return until(lambda: self.children(run))[0]

    def ended(self, run: str) -> dict[str, Any]:
        """The run in its final state."""
        final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        return until(lambda: found if (found := self.run(run))["state_type"] in final else None)

    def tasks(self, run: str, run_count: int = 1) -> dict[str, str]:
        """{task run: state} of a run's first or later try."""
        rows = self.post("task_runs/filter", flow_runs={"id": {"any_": [run]}}, limit=50)
        return {row["name"]: row["state_name"] for row in rows if row["flow_run_run_count"] in (0, run_count)}

    def artifacts(self, run: str) -> dict[str, dict[str, Any]]:
        rows = self.post("artifacts/filter", flow_runs={"id": {"any_": [run]}}, limit=50)
        return {row["key"]: row for row in rows}

    def logs(self, run: str) -> str:
        rows = self.post("logs/filter", logs={"flow_run_id": {"any_": [run]}}, limit=200)
        return "\n".join(row["message"] for row in rows)

    def set_state(self, run: str, kind: str, *, name: str | None = None, force: bool = False) -> None:
        self.post(f"flow_runs/{run}/set_state", state={"type": kind, "name": name}, force=force)

    def steps(self) -> int:
        """Training steps that were logged so far, over all trainings."""
        return sum(len(log.read_text().splitlines()) for log in (self.home / "work").glob("*/train_log.jsonl"))

    def training(self, run: str) -> str:
        """The id of a run's child once it trains: some steps later than now."""
        child = self.child(run)["id"]
        self.trains(child)
        return child

    def trains(self, child: str) -> None:
        """Return once a child that has only just been created trains: some steps later than now."""
        before = self.steps()
        until(lambda: self.steps() > before or self.run(child)["state_type"] not in ("SCHEDULED", "PENDING", "RUNNING"))
        assert self.run(child)["state_type"] == "RUNNING", self.run(child)["state"]

    def checkpoints(self) -> set[str]:
        return {str(path.relative_to(self.home)) for path in (self.home / "work").glob("*/checkpoint-*")}

    def process_of(self, run: str) -> psutil.Process:
        """The process that executes a run."""
        return next(process for process in self.processes() if _environment(process).get("PREFECT__FLOW_RUN_ID") == run)

    def process_named(self, *words: str) -> psutil.Process:
        """The process of the server or of a worker."""
        return self.processes_named(*words)[0]

    def processes_named(self, *words: str) -> list[psutil.Process]:
        """As process_named; none while it is to be started again."""
        return [process for process in self.processes() if set(words) <= set(process.cmdline())]

    def processes(self) -> list[psutil.Process]:
        """All that `up` started, by the root in their environment."""
        found = (process for process in psutil.process_iter() if process.pid != os.getpid())
        return [process for process in found if _environment(process).get("AMAZON_FT_HOME") == str(self.home)]

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Ctrl-C, or another signal."""
        if self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(PATIENCE_SECONDS)


def answers(url: str) -> bool:
    """Whether a server is well."""
    try:
        return httpx.get(f"{url}/api/health").is_success
    except httpx.HTTPError:
        return False


def until(found: Callable[[], Any]) -> Any:
    """What is found, as soon as it is; the server may be away, and the machine as busy as it likes."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up:
        with suppress(httpx.HTTPError):
            if value := found():
                return value
        time.sleep(0.3)
    pytest.fail(f"not found within {PATIENCE_SECONDS} s")


def _environment(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error):
        return process.environ()
    return {}


@contextmanager
def serve(root: Path, *options: str) -> Iterator[Served]:
    """`amazon-ft up` of a copy of the project until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    checkout = Checkout.copy_to(root / "checkout")
    own = {
        "AMAZON_FT_HOME": str(root / "home"),
        "PREFECT_HOME": str(root / "prefect"),
        "OMP_NUM_THREADS": "1",
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",  # no test asks for a block
    }
    env = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    with (root / "up.log").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "up", "--port", str(port), *options],
            env=env | own | {"PYTHONPATH": str(checkout.path), "PYTHONUNBUFFERED": "1"},
            cwd=root,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    served = Served(f"http://127.0.0.1:{port}", root, make_tiny_model(root / "model"), process)
    try:
        until(lambda: "Ctrl-C" in served.output or process.poll() is not None)
        assert process.poll() is None, served.output
        yield served
    finally:
        served.stop()


__all__ = ["PREPARED", "SHORT", "SIZES", "Served", "serve", "until"]
