"""One training to a GPU of the host at a time, whoever starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from flows.running import gpus
from flows.running.gpus import gpus_wanted, held_gpus
from tasks.config import FinetuneConfig
from tasks.refs import ConfigError
from tests.support.checkout import PROJECT
from tests.support.gpus import H200, SECOND_H200, driver

TRAINS = """
import sys, time
from flows.running import gpus
from flows.running.gpus import gpus_wanted, held_gpus
from tasks.config import FinetuneConfig
from tasks.refs import ConfigError
import os
with held_gpus("cuda", int(sys.argv[2])):
    print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    time.sleep(float(sys.argv[1]))
"""


@contextmanager
def training(env: dict[str, str], seconds: int, gpus: int = 1) -> Iterator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
    """A training of that length on the first free GPUs, and what it says: the GPUs, and whether it waits for them."""
    command = [sys.executable, "-c", TRAINS, str(seconds), str(gpus)]
    with subprocess.Popen(command, cwd=PROJECT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield process, process.stdout, process.stderr
        finally:
            process.kill()


def trained(env: dict[str, str]) -> str:
    """The GPU of a training from its start to its end."""
    with training(env, 0) as (_, output, _):
        return output.read()


def host(folder: Path, *gpus: str) -> dict[str, str]:
    """The environment of a host with these GPUs."""
    env = os.environ | {"PATH": driver(folder / "bin", *gpus), "TMPDIR": str(folder)}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    return env


def test_two_trainings_take_two_gpus_and_a_third_what_is_free_again(tmp_path: Path) -> None:
    env = host(tmp_path, H200, SECOND_H200)
    with training(env, 900) as (_, output, _):
        first = output.readline()
        assert [trained(env), trained(env)] == ["GPU-21111111-2222-3333-4444-555555555555\n"] * 2
    assert first == trained(env) == "GPU-11111111-2222-3333-4444-555555555555\n"


def test_training_waits_for_a_gpu_that_another_holds(tmp_path: Path) -> None:
    env = host(tmp_path, H200)
    with training(env, 900) as (holder, output, _):
        held = output.readline()
        with training(env, 0) as (waiting, taken, said):
            assert "another training holds GPU 0" in said.readline()
            assert waiting.poll() is None
            holder.kill()
            assert taken.read() == held


def test_training_on_two_gpus_takes_both_or_none(tmp_path: Path) -> None:
    env = host(tmp_path, H200, SECOND_H200)
    with training(env, 900) as (holder, output, _):
        output.readline()
        with training(env, 0, gpus=2) as (waiting, taken, said):
            assert "waits for 2 GPUs: another training holds GPU 0." in said.readline()
            assert trained(env) == "GPU-21111111-2222-3333-4444-555555555555\n"  # what the waiting one does not hold
            assert waiting.poll() is None
            holder.kill()
            assert taken.read() == "GPU-11111111-2222-3333-4444-555555555555,GPU-21111111-2222-3333-4444-555555555555\n"


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "list_gpus", lambda: [gpus.Gpu(str(index), f"GPU-{index}", "", "", None) for index in (0, 1)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("two_gpus")
def test_more_gpus_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError) as caught, held_gpus("cuda", 3):
        pass
    assert str(caught.value) == (
        "finetune.devices: too few GPUs here: got 3; expected at most 2, or auto. Lower it, or run on a machine with more."
    )


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("devices", "accumulation", "wanted"), [(1, 8, 1), ("auto", 8, 2), ("auto", 1, 1), (2, 8, 2)])
def test_auto_wants_as_many_gpus_as_a_step_has_rows_for(devices: int | str, accumulation: int, wanted: int) -> None:
    config = FinetuneConfig.model_validate({"devices": devices, "batch_size": 1, "gradient_accumulation": accumulation})
    assert gpus_wanted(config) == wanted


@pytest.mark.parametrize("before", [None, "1"])
def test_the_gpus_to_see_are_afterwards_those_from_before(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name, value in host(tmp_path, H200, SECOND_H200).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before or "")
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ValueError, match="no loss"), held_gpus("cuda"):
        assert os.environ["CUDA_VISIBLE_DEVICES"][:5] == ("GPU-2" if before else "GPU-1")
        raise ValueError("no loss")
    assert caplog.messages == [f"holds GPU {before or 0} (NVIDIA H200)."]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_every_user_of_the_host_may_take_the_lock(tmp_path: Path) -> None:
    mask = os.umask(0o077)
    try:
        trained(host(tmp_path, H200))
    finally:
        os.umask(mask)
    locks = list(tmp_path.glob("*.lock"))
    assert {lock.stat().st_mode & 0o777 for lock in locks} == {0o666}
