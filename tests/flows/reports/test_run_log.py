"""What a run said is kept beside its record, whoever ran its stages, and goes when the record goes."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from flows.reports.run_log import RunLog, log_lines
from flows.running.garbage import collect
from tasks.caching.context import open_run
from tasks.caching.events import RunBegan
from tasks.caching.runs import Run, past_runs
from tasks.refs import InputError

logger = logging.getLogger("tasks.test_run_log")


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tasks")


def test_the_log_of_a_run_holds_what_it_and_its_training_said_and_what_ended_it() -> None:
    with pytest.raises(ValueError, match="broken"), open_run("demo", {}, observers=[RunLog()]) as run:
        logger.info("parent says")
        worker = RunLog(run.id)
        worker.hear(RunBegan(Run("demo", {})))
        logger.info("both say")
        worker.close()
        raise ValueError("broken\x1b[2J")
    logger.info("after the run")
    said = CliRunner().invoke(app, ["logs"]).stdout
    messages = [line.split(maxsplit=3)[3] for line in said.splitlines()]
    assert messages == ["parent says", "both say", "both say", "broken␛[2J"]
    assert said.splitlines()[-1].split()[2] == "ERROR"


def test_following_ends_with_the_run() -> None:
    lines: list[str] = []
    with open_run("demo", {}, observers=[RunLog()]):
        logger.info("before")
        reader = threading.Thread(target=lambda: lines.extend(log_lines(past_runs()[0], follow=True)))
        reader.start()
        reader.join(0.1)
        assert reader.is_alive()
        logger.info("meanwhile")
    reader.join(30)
    assert [line.split()[3] for line in lines] == ["before", "meanwhile"]


def test_a_log_goes_with_its_record(home: Path) -> None:
    with open_run("demo", {}, observers=[RunLog()]):
        logger.info("said")
    assert len(list((home / "runs").glob("*.log"))) == 1
    collect(keep_last=0, age_seconds=0)
    assert list((home / "runs").iterdir()) == []


def test_a_run_without_a_log_is_said_so() -> None:
    with open_run("demo", {}) as run:
        pass
    with pytest.raises(InputError, match=f"run {run.id}: has no log"):
        list(log_lines(past_runs()[0]))
