"""Ctrl-C, and SIGTERM to the whole process group: a run ends soon, with 130 or 143, and leaves nothing that was done behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.e2e.served import until
from tests.e2e.test_kill import is_being_written
from tests.e2e.tiny_runs import Tiny, make_tiny
from tests.support.database import place_database
from tests.support.forked import Forked


@pytest.fixture
def alone(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A tiny recipe whose runs have a server of their own, and a training that would go on for minutes."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    place_database(tmp_path / "prefect", tmp_path_factory)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    return make_tiny(tmp_path / "tiny")


def start(tiny: Tiny, *overrides: str) -> Forked:
    words = [word for override in overrides for word in ("--set", override)]
    own = {"PYTHONPATH": str(tiny.checkout.path), "AMAZON_FT_HOME": str(tiny.home), "OMP_NUM_THREADS": "1"}
    command = ["-m", "flows.cli", "run", str(tiny.recipe), *words]
    return Forked(command, env={**os.environ, **own, "LINGER_SECONDS": "1"}, cwd=tiny.checkout.path, leader=True)


def interrupted(process: Forked, how: signal.Signals, happened: Callable[[], bool]) -> Forked:
    """The process at its end, after a signal to its group as soon as something happened, and with it all that it started."""
    while not happened():
        assert process.poll() is None, process.stderr
        time.sleep(0.002)
    started = psutil.Process(process.pid).children(recursive=True)
    process.signal_group(how)
    process.wait()
    until(lambda: not any(child.is_running() for child in started))
    assert "Traceback" not in process.stderr
    assert "not your doing" not in process.stderr
    return process


def in_training(tiny: Tiny, steps: int) -> Callable[[], bool]:
    return lambda: any(len(log.read_text().splitlines()) >= steps for log in tiny.home.glob("work/*/train_log.jsonl"))


LONG = ("finetune.max_steps=20000", "finetune.save_steps=10000", "finetune.logging_steps=1")


@pytest.mark.slow("two runs, each with a server of its own")
def test_a_training_writes_a_checkpoint_says_so_and_ends(alone: Tiny) -> None:
    step = 0
    for how, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        ended = interrupted(start(alone, *LONG), how, in_training(alone, step + 3))
        assert ended.returncode == code, ended.stderr
        assert (f"finetune goes on from step {step}" in ended.stderr) == (step > 0)
        assert f"{how.name}: a checkpoint is written after the step at hand" in " ".join(ended.stderr.split())
        assert "interrupted; finished stages are kept" in ended.stderr
        before, step = step, max(int(path.name.rpartition("-")[2]) for path in alone.home.glob("work/*/checkpoint-*"))
        assert step > before


@pytest.mark.slow("three runs, each with a server of its own")
def test_a_run_that_does_not_train_ends_too(alone: Tiny) -> None:
    alone.let_drafts_linger()
    moments: dict[str, tuple[signal.Signals, Callable[[], bool]]] = {
        "server": (signal.SIGTERM, (alone.home / "prefect-server.log").is_file),
        "conversations": (signal.SIGTERM, lambda: is_being_written(alone.home, "conversations")),
        "baseline": (signal.SIGINT, lambda: is_being_written(alone.home, "baseline")),
    }
    for moment, (how, happened) in moments.items():
        ended = interrupted(start(alone), how, happened)
        assert ended.returncode == 128 + how, (moment, ended.stderr)
        assert "interrupted; finished stages are kept" in ended.stderr
