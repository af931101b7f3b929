"""What a training's log says of its steps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tasks.backends import Report
from tasks.backends.trainer import on_one_gpu
from tasks.backends.watch import LOG, Verdict, Watch, read_log


class Listener:
    def report(self, report: Report) -> None: ...

    def close(self) -> None: ...


class OnTheDevice(float):
    """A number that has to be waited for."""

    def __float__(self) -> float:
        time.sleep(0.3)
        return 1.0


def watch(log: Path) -> Watch:
    verdict = Verdict(max_loss=9, scaled=False, rows_of=lambda step: [], kept=lambda: "")
    return Watch(log=log, steps=8, progress=Listener(), verdict=verdict, memory_gib=lambda: 0.5)


def test_steps_that_the_gpu_does_later_than_they_were_noted_take_their_share_of_the_time(tmp_path: Path) -> None:
    watched = watch(tmp_path / LOG)
    for step in (1, 2, 3, 4):
        watched.micro_step(2.0, 7)
        watched.clipped(OnTheDevice())
        watched.step_ended(step, None)
    watched.flush()
    seconds = [record.seconds for record in read_log(tmp_path / LOG)]
    assert seconds[-1] >= 1.2
    assert [second / seconds[-1] for second in seconds] == pytest.approx([0.25, 0.5, 0.75, 1], abs=0.05)


def test_a_batch_is_never_spread_over_several_gpus(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2)
    assert arguments.n_gpu == 0
    assert on_one_gpu(arguments).n_gpu == 0
    arguments._n_gpu = 2  # as where two are visible
    assert arguments.train_batch_size == 4
    assert on_one_gpu(arguments).train_batch_size == 2
