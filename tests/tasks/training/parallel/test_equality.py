"""The number of devices changes nothing but the time: losses, gradients, adapter, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from tasks.config import FinetuneConfig
from tasks.finetune import finetune
from tasks.refs import Model
from tasks.training.watch import StepRecord, read_log
from tests.support.ranks import launch_forked
from tests.support.tiny import make_tiny_model, tiny_reference, tiny_tokens
from tests.support.train_tiny import inputs, train

pytestmark = pytest.mark.heavy

THIRTY = {"max_steps": 30, "logging_steps": 5, "save_steps": 10, "learning_rate": 2e-4}
ROWS = 43
"""Five steps of eight rows, and one of three, in which one of four devices has nothing to do."""


class Trained(NamedTuple):
    records: list[StepRecord]
    weights: dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_reference(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.training.parallel.launch.launch", launch_forked)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def trained_in(home: Path, monkeypatch: pytest.MonkeyPatch, model: Model, kind: str, **changes: Any) -> Trained:
    """A training under a root of its own, for the number of devices is not in its key."""
    monkeypatch.setenv("AMAZON_FT_HOME", str(home))
    rows = tiny_tokens(3 * ROWS if kind == "packs" else ROWS, kind=kind)
    adapter = train(model, rows, **THIRTY | changes)
    return Trained(read_log(adapter.log / "train_log.jsonl"), load_file(adapter.data / "adapter_model.safetensors"))


def assert_equal(got: Trained, wanted: Trained) -> None:
    """The same steps and the same adapter, but for what float32 rounds."""
    for name, bound in (("step", 0.0), ("tokens", 0.0), ("learning_rate", 0.0), ("loss", 1e-6), ("grad_norm", 1e-6)):
        ours, theirs = ([getattr(record, name) for record in trained.records] for trained in (got, wanted))
        assert ours == pytest.approx(theirs, rel=bound, abs=bound), name
    assert got.weights.keys() == wanted.weights.keys()
    assert max(float(np.abs(got.weights[name] - wanted.weights[name]).max()) for name in wanted.weights) < 1e-6


@pytest.mark.slow("a dozen processes that train")
@pytest.mark.parametrize(("backend", "kind"), [("hf", "tokens"), ("fast", "packs")])
def test_any_number_of_devices_trains_and_goes_on_as_one_does(
    backend: str, kind: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = trained_in(tmp_path / "alone", monkeypatch, model, kind, backend=backend)
    for devices in (2, 3, 4):
        home = tmp_path / str(devices)
        assert_equal(trained_in(home, monkeypatch, model, kind, backend=backend, devices=devices), alone)
    for devices in (1, 3):  # from a checkpoint of four, batches laid out in another process
        (newest,) = home.glob("work/*/checkpoint-30")
        (newest / "manifest.json").unlink()
        assert_equal(trained_in(home, monkeypatch, model, kind, backend=backend, devices=devices, num_workers=1), alone)
        assert sorted(path.name for path in newest.glob("rng*")) == ["rng_state.pth"]


def test_the_number_of_devices_is_not_in_the_key(model: Model) -> None:
    keys = {finetune.key(inputs(model, tiny_tokens(4), devices=devices)) for devices in (1, 2, "auto")}
    assert len(keys) == 1
    assert FinetuneConfig().devices == 1


@pytest.mark.slow("three processes that train")
def test_a_base_model_that_is_shared_out_trains_as_one_that_each_holds(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = trained_in(tmp_path / "alone", monkeypatch, model, "packs", backend="fast")
    assert_equal(trained_in(tmp_path / "3", monkeypatch, model, "packs", backend="fast", devices=3, sharded=True), alone)
