"""The number of devices changes nothing but the time: losses, gradients, adapter, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tasks.refs import Adapter, Artifact, Model
from tasks.training.watch import StepRecord, read_log
from tests.support.ranks import launch_forked
from tests.support.tiny import make_tiny_model, tiny_reference, tiny_tokens
from tests.support.train_tiny import train

pytestmark = pytest.mark.heavy

THIRTY = {"max_steps": 30, "logging_steps": 5, "save_steps": 10, "learning_rate": 2e-4}
ROWS = 43
"""Five steps of eight rows, and one of three: with four devices one has nothing to do."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_reference(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.training.parallel.launch.launch", launch_forked)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def trained_in(home: Path, monkeypatch: pytest.MonkeyPatch, model: Model, kind: str, **changes: Any) -> Adapter:
    """A training under a root of its own, for the number of devices is not in its key."""
    monkeypatch.setenv("AMAZON_FT_HOME", str(home))
    rows: Artifact = tiny_tokens(3 * ROWS if kind == "packs" else ROWS, kind=kind)
    return train(model, rows, **THIRTY | changes)


def numbers(adapter: Adapter) -> list[StepRecord]:
    return read_log(adapter.log / "train_log.jsonl")


def adapter_off(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.mark.parametrize(("backend", "kind"), [("hf", "tokens"), ("fast", "packs")])
def test_any_number_of_devices_trains_what_one_does(
    backend: str, kind: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = trained_in(tmp_path / "1", monkeypatch, model, kind, backend=backend)
    wanted, weights = numbers(alone), load_file(alone.data / "adapter_model.safetensors")
    for devices in (2, 3, 4):
        shared = trained_in(tmp_path / str(devices), monkeypatch, model, kind, backend=backend, devices=devices)
        got = numbers(shared)
        assert [record.tokens for record in got] == [record.tokens for record in wanted]
        assert [record.loss for record in got] == pytest.approx([record.loss for record in wanted], rel=1e-6)
        assert [record.grad_norm for record in got] == pytest.approx([record.grad_norm for record in wanted], abs=1e-6)
        assert adapter_off(load_file(shared.data / "adapter_model.safetensors"), weights) < 1e-6
