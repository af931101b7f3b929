"""Deployed: what is killed, cancelled or goes away in the middle of a training."""

from __future__ import annotations

import signal
import sqlite3
import time
from contextlib import closing

import pytest

from tests.e2e.served import PREPARED, Served, until

OUTAGE_SECONDS = 10


@pytest.fixture(scope="module")
def killed(served: Served, long: list[str]) -> str:
    """A run whose training was killed; its id."""
    run = served.start(*long, "finetune.max_steps=300")
    served.process_of(served.training(run)).kill()
    return run


@pytest.mark.slow("a deployed run and its training")
def test_killed_training_crashes_the_run(served: Served, killed: str) -> None:
    assert served.ended(served.child(killed)["id"])["state_type"] == "CRASHED"
    assert served.ended(killed)["state_type"] == "CRASHED"
    assert "SIGKILL" in served.run(killed)["state"]["message"]


@pytest.mark.slow("a training, and a server that is away for a while")
def test_retry_reruns_only_the_training_which_goes_on_while_the_server_is_away(served: Served, killed: str) -> None:
    served.ended(killed)
    (first,) = served.children(killed)
    served.set_state(killed, "SCHEDULED", name="AwaitingRetry", force=True)  # what the page's Retry does
    (again,) = until(lambda: [child for child in served.children(killed) if child["id"] != first["id"]])
    served.trains(again["id"])
    served.process.send_signal(signal.SIGSTOP)  # or it would start the server again
    served.process_named("inner", "server").kill()
    before = served.steps()
    time.sleep(OUTAGE_SECONDS)
    assert served.steps() > before
    served.process.send_signal(signal.SIGCONT)
    assert served.ended(again["id"])["state_type"] == "COMPLETED"
    run = served.ended(killed)
    assert (run["state_type"], run["run_count"]) == ("COMPLETED", 2), run["state"]
    stages = {name: state for name, state in served.tasks(killed, run_count=2).items() if name in PREPARED}
    assert stages == dict.fromkeys(PREPARED, "Cached")
    assert len(served.children(killed)) == 2


@pytest.mark.slow("a deployed run and its training")
def test_cancelled_parent_cancels_the_training_which_leaves_a_checkpoint(served: Served, long: list[str]) -> None:
    run = served.start(*long)
    child = served.training(run)
    before = served.checkpoints()
    served.set_state(run, "CANCELLING")
    assert served.ended(run)["state_type"] == "CANCELLED"
    until(lambda: served.checkpoints() - before)
    until(lambda: served.run(child)["state_type"] == "CANCELLED")
    for each in (run, child):
        states = served.get(f"flow_run_states/?flow_run_id={each}")
        assert "CRASHED" not in [state["type"] for state in states]


@pytest.mark.slow("a deployed run and its training")
def test_killed_worker_crashes_its_run_with_the_cause_and_up_starts_it_again(served: Served, long: list[str]) -> None:
    run = served.start(*long)
    child = served.training(run)
    worker = served.process_named("inner", "--name", "cuda-0")
    worker.kill()
    assert served.ended(child)["state_type"] == "CRASHED"
    assert "worker that ran this was killed" in served.run(child)["state"]["message"]
    assert served.ended(run)["state_type"] == "CRASHED"
    until(lambda: any(process.pid != worker.pid for process in served.processes_named("inner", "--name", "cuda-0")))


@pytest.mark.slow("a deployed run and its training")
def test_sigterm_ends_everything_after_the_training_wrote_a_checkpoint(served: Served, long: list[str]) -> None:
    run = served.start(*long, "finetune.seed=2")
    child = served.training(run)
    before = served.checkpoints()
    assert len(served.processes()) >= 6
    served.stop(signal.SIGTERM)  # Ctrl-C is one handler with it
    assert served.process.returncode == 0
    until(lambda: not served.processes())
    assert served.checkpoints() - before
    with closing(sqlite3.connect(served.root / "prefect" / "prefect.db")) as database:
        states = dict(database.execute("select id, state_type from flow_run where id in (?, ?)", (run, child)))
    assert set(states) == {run, child}
    assert set(states.values()) <= {"CRASHED", "CANCELLED"}
