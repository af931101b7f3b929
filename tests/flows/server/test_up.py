"""The parts of `amazon-ft up` that need no server: its port, its workers, what they share, the names of runs."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.recipes import load_recipe, run_tags, short_digest
from flows.server import up
from tasks.caching.runs import Run
from tasks.refs import PipelineError
from tests.support.checkout import PROJECT


def test_port_in_use_is_said_with_the_ways_out(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "flows.cli", "up", "--port", str(port)]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert f"up: 127.0.0.1:{port}: Address already in use; expected a free port. Use --port" in said
    assert "Traceback" not in said


def test_run_name_tells_configurations_apart_but_not_where_they_run() -> None:
    demo, other = load_recipe("demo"), load_recipe("demo", ["finetune.learning_rate=1e-4"])
    assert Run("demo", {}, tags=run_tags(demo)).title == f"demo 1,000 rows {short_digest(demo)}"
    assert run_tags(demo) == ["amazon-ft", "demo", "1,000 rows", short_digest(demo)]
    assert short_digest(demo) != short_digest(other)
    assert short_digest(demo) == short_digest(load_recipe("demo", ["finetune.keep_checkpoints=1"]))


class Recorder(up.Processes):
    """Notes what would be started."""

    def start(self, name: str, *command: str) -> Any:
        self.started[name] = up.Started(command, subprocess.Popen(["true"]))
        self.started[name].process.wait()


@pytest.mark.parametrize(("gpus", "workers"), [(0, 1), (2, 2)])
def test_there_are_as_many_workers_as_gpus_each_of_which_may_train_on_all(
    gpus: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[str | None]()
    monkeypatch.setattr(up.psutil, "Popen", lambda *_, env, **__: seen.append(env.get("CUDA_VISIBLE_DEVICES")))
    processes = up.Processes({"CUDA_VISIBLE_DEVICES": "the user's"})
    names = up._start_workers(processes, gpus)
    assert names == {"cpu-0": "cpu"} | {f"cuda-{number}": "cuda" for number in range(workers)}
    assert seen == ["the user's"] * (1 + workers)
    trains = [item for name, item in processes.started.items() if name != "cpu-0"]
    assert all(item.command[-2:] == ("--limit", "1") for item in trains)


def test_flow_runs_find_relative_paths_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AMAZON_FT_DATA", raising=False)
    assert up.environment(up.UpOptions())["AMAZON_FT_DATA"] == str(tmp_path)
    monkeypatch.setenv("AMAZON_FT_DATA", "/srv/data")
    assert up.environment(up.UpOptions())["AMAZON_FT_DATA"] == "/srv/data"


def test_browsers_elsewhere_are_told_where_the_api_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_SERVER_UI_API_URL", raising=False)
    assert "PREFECT_SERVER_UI_API_URL" not in up.environment(up.UpOptions())
    told = up.environment(up.UpOptions(host="0.0.0.0", port=4300))["PREFECT_SERVER_UI_API_URL"]
    assert told == f"http://{socket.getfqdn()}:4300/api"


def test_what_ends_again_and_again_is_not_started_for_ever() -> None:
    from rich.console import Console

    processes = Recorder({})
    processes.start("cuda-0", "worker")
    with pytest.raises(PipelineError, match="up: cuda-0: ended with exit code 0 within 10 s; expected it to stay"):
        processes.revive(Console(file=io.StringIO()))


def test_what_ends_later_is_started_again() -> None:
    from rich.console import Console

    processes, said = Recorder({}), io.StringIO()
    processes.start("cuda-0", "worker")
    first = processes.started["cuda-0"]
    first.at -= up.STAY_SECONDS
    processes.revive(Console(file=said))
    assert processes.started["cuda-0"].process is not first.process
    assert processes.started["cuda-0"].command == ("worker",)
    assert "is started again" in said.getvalue()
