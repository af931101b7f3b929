"""The server goes away in the middle of a training, and everything ends with Ctrl-C."""

from __future__ import annotations

import signal
import sqlite3
import time
from contextlib import closing

import pytest

from tests.e2e.served import Served, until

OUTAGE_SECONDS = 10
STEPS = 300
"""Of the training; about as long as the outage on a quick machine, many times that on a slow one."""


@pytest.mark.slow("a training, and a server that is away for a while")
def test_training_goes_on_while_the_server_is_away(served: Served, long: list[str]) -> None:
    run = served.start(*long, f"finetune.max_steps={STEPS}", "finetune.seed=1")
    child = served.training(run)
    served.process.send_signal(signal.SIGSTOP)  # or it would start the server again
    served.process_named("inner", "server").kill()
    before, counts = served.steps(), list[int]()
    for _ in range(4):
        time.sleep(OUTAGE_SECONDS / 4)
        counts.append(served.steps())
    served.process.send_signal(signal.SIGCONT)
    assert before < counts[-1]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] or counts[-1] % STEPS == 0  # the end of the training
    assert served.ended(child)["state_type"] == "COMPLETED"
    assert served.ended(run)["state_type"] == "COMPLETED", served.run(run)["state"]


@pytest.mark.slow("a deployed run and its training")
def test_ctrl_c_ends_everything_after_the_training_wrote_a_checkpoint(served: Served, long: list[str]) -> None:
    run = served.start(*long, "finetune.seed=2")
    child = served.training(run)
    before = served.checkpoints()
    assert len(served.processes()) >= 6
    served.stop()
    assert served.process.returncode == 0
    until(lambda: not served.processes())
    assert served.checkpoints() - before
    with closing(sqlite3.connect(served.root / "prefect" / "prefect.db")) as database:
        states = dict(database.execute("select id, state_type from flow_run where id in (?, ?)", (run, child)))
    assert set(states) == {run, child}
    assert set(states.values()) <= {"CRASHED", "CANCELLED"}
