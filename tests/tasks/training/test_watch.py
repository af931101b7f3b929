"""What a training's log says of its steps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tasks.training.watch import LOG, DivergenceCheck, Watch, read_log
from tests.support.tiny import make_tiny_model, tiny_reference, tiny_tokens
from tests.support.train_tiny import train

pytestmark = pytest.mark.heavy


class OnTheDevice(float):
    """A number that has to be waited for."""

    def __float__(self) -> float:
        time.sleep(0.3)
        return 1.0


def watch(log: Path) -> Watch:
    check = DivergenceCheck(max_loss=9, scaled=False, rows_of=lambda step: [], kept=lambda: "")
    return Watch(log=log, steps=8, check=check, memory_gib=lambda: 0.5)


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


@pytest.mark.parametrize("backend", ["hf", "fast"])
def test_a_batch_is_never_spread_over_the_gpus_that_are_visible(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainingArguments

    def visible(arguments: TrainingArguments) -> int:
        _ = arguments._setup_devices
        return arguments._n_gpu or 2  # 0 is what this machine has

    model, rows = tiny_reference(make_tiny_model(tmp_path / "tiny")), tiny_tokens(40)
    alone = read_log(train(model, rows, backend=backend, gradient_checkpointing="none").log / LOG)
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(visible))
    assert TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2).train_batch_size == 4
    of_two = read_log(train(model, rows, backend=backend, gradient_checkpointing="none", seed=1).log / LOG)
    assert [record.tokens for record in alone] != [record.tokens for record in of_two], "another seed, so that it is trained"
    assert len(alone) == len(of_two)
    assert max(record.tokens for record in of_two) < 1.5 * max(record.tokens for record in alone)
