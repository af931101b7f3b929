"""However a training on several devices ends, it ends as one: one reason, no process left, and a checkpoint to go on from."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, ProcessFailure

from tasks.config import FinetuneConfig, WeightsConfig
from tasks.finetune import finetune, left_behind
from tasks.rank import make_error_handler
from tasks.refs import DivergedError, Model, PipelineError
from tasks.training import hardware
from tasks.training.backend import Job
from tasks.training.checkpoints import checkpoints, step_of
from tasks.training.parallel.launch import Reason, explain
from tasks.training.watch import read_log
from tests.support.checkout import PROJECT
from tests.support.forked import Forked
from tests.support.tiny import make_tiny_model, tiny_reference, tiny_tokens
from tests.support.train_tiny import inputs, train

pytestmark = [pytest.mark.heavy, pytest.mark.slow("each process that torchrun starts imports the libraries")]

LONG = {"max_steps": 4000, "save_steps": 10, "logging_steps": 10, "devices": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_reference(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def ranks(home: Path) -> dict[str, psutil.Process]:
    """The processes of a training under this root, by rank."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if "tasks.rank" in process.cmdline() and any(str(home) in word for word in process.cmdline()):
                found[process.environ()["RANK"]] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def when_trained(home: Path) -> dict[str, psutil.Process]:
    """The processes, once the first checkpoint is sealed."""
    deadline = time.monotonic() + 300
    while not list(home.glob("work/*/checkpoint-*/manifest.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return ranks(home)


def gone(processes: dict[str, psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(list(processes.values()), timeout=60)
    return not alive


def started(model: Model, changes: dict[str, Any]) -> Forked:
    arguments = ["-m", "tests.support.train_tiny", model.path, json.dumps(changes)]
    return Forked(arguments, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=PROJECT)


def test_a_killed_process_ends_the_training_which_goes_on_alone(
    home: Path, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows, seen, long = tiny_tokens(40), dict[str, psutil.Process](), LONG | {"max_steps": 200}

    def kill() -> None:
        seen.update(when_trained(home))
        seen["1"].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(PipelineError) as caught:
        train(model, rows, **long)
    killer.join()
    work = home / "work" / finetune.key(inputs(model, rows, **long))[:32]
    kept = checkpoints(work)[0]
    assert str(caught.value) == (
        "finetune: process 1 of 2 ended early: got SIGKILL; expected it to train to the end. The kernel kills so when the main "
        f"memory runs out. The checkpoint of step {step_of(kept)} is kept in {kept}. Run again to go on from there; what the "
        f"processes said is in {work / 'ranks'}."
    )
    assert sorted(seen) == ["0", "1"]
    assert gone(seen)
    with caplog.at_level(logging.INFO):
        assert train(model, rows, **long | {"devices": 1}).steps == 200
    assert f"finetune goes on from step {step_of(kept)}." in caplog.text


def test_sigterm_ends_all_after_the_same_step_with_a_checkpoint(home: Path, model: Model) -> None:
    parent = started(model, LONG)
    seen = when_trained(home)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait() == -signal.SIGTERM, parent.stderr
    assert gone(seen)
    work = home / "work" / finetune.key(inputs(model, tiny_tokens(40), **LONG))[:32]
    log = read_log(work / "train_log.jsonl")
    assert step_of(checkpoints(work)[0]) == log[-1].step > 10
    assert left_behind(finetune.key(inputs(model, tiny_tokens(40), **LONG))) == f"resumable from step {log[-1].step}"


def test_no_process_outlives_the_one_that_started_it(home: Path, model: Model) -> None:
    parent = started(model, LONG)
    seen = when_trained(home)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert sorted(seen) == ["0", "1"]
    assert gone(seen)


def test_a_process_that_lost_another_is_not_the_reason(tmp_path: Path, model: Model) -> None:
    """By the files that torchrun's @record writes."""

    def failure(rank: int, exitcode: int, error: Exception | None = None) -> ProcessFailure:
        file = tmp_path / f"{rank}.json"
        file.unlink(missing_ok=True)
        if error is not None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
                ErrorHandler().record_exception(error)
        return ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(file))

    def told(*failures: ProcessFailure) -> PipelineError:
        reasons = {failure.local_rank: Reason.of(failure) for failure in failures}
        return explain(job_in(tmp_path, model), tmp_path, 2, reasons)

    lost = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711")
    diverged = told(failure(0, 1, DivergedError("finetune step 3: training diverged: got loss nan.")), failure(1, 1, lost))
    assert (type(diverged), str(diverged)) == (DivergedError, "finetune step 3: training diverged: got loss nan.")
    full = told(failure(0, 1, lost), failure(1, 1, PipelineError("finetune: out of memory on H100: got 80 GiB.")))
    assert str(full) == "finetune: out of memory on H100: got 80 GiB. That was process 1 of 2."
    for reason, got in ((failure(1, -9), "SIGKILL"), (failure(1, 1, KeyError("uids")), "KeyError: 'uids'")):
        assert str(told(failure(0, 1, lost), reason)).startswith(f"finetune: process 1 of 2 ended early: got {got}; expected it")
    late = failure(0, -9)
    late.timestamp += 30  # by the agent, for it did not end when it was told to
    assert str(told(late, failure(1, 1, lost))).startswith("finetune: process 1 of 2 ended early: got RuntimeError: [gloo")
    assert str(told(failure(0, -6), failure(1, -9))).startswith("finetune: process 1 of 2 ended early: got SIGKILL; expected")
    assert str(told(failure(0, -15), failure(1, 3))).startswith("finetune: process 1 of 2 ended early: got exit code 3; expected")


def job_in(work: Path, model: Model) -> Job:
    config = FinetuneConfig(backend="hf", gradient_checkpointing="none")
    resolved = hardware.resolve(config, WeightsConfig(load_in_4bit=False), "cpu")
    return Job(model, work / "tokens.arrow", False, config, 64, resolved, work)


def test_the_error_of_a_process_is_there_once_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"

    def killed(*_: Any) -> None:
        assert not file.exists()
        raise KeyboardInterrupt

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("json.dump", killed)
        make_error_handler().record_exception(ValueError("odd"))
    assert not file.exists()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    make_error_handler().record_exception(ValueError("odd"))
    assert json.loads(file.read_text())["message"]["message"] == "ValueError: odd"
