"""Training ends with the same adapter however often it is interrupted, and says what is wrong before and while it trains."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.caching import locks
from tasks.config import FinetuneConfig, WeightsConfig
from tasks.finetune import _pin, finetune, left_behind, summarize
from tasks.reading.model_files import adapter_config
from tasks.refs import Adapter, Artifact, ConfigError, DivergedError, InputError, Model, PipelineError
from tasks.training import hardware, memory, model_shape
from tasks.training.checkpoints import checkpoints, is_last, step_of
from tasks.training.loading import is_in_4bit, load_base
from tasks.training.validation import best_step, has_stopped_improving
from tasks.training.watch import DivergenceCheck, StepRecord, read_log
from tests.support.checkout import PROJECT
from tests.support.forked import Forked
from tests.support.prepared import rows_of
from tests.support.tiny import make_tiny_model, publish_rows, tiny_reference, tiny_row, tiny_tokens
from tests.support.train_tiny import HELD_OUT_ROWS, inputs, train

pytestmark = pytest.mark.heavy

LONG = {"max_steps": 32, "warmup_steps": 2}
"""Enough steps to be killed between the first checkpoint and the last."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_reference(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def work_of(home: Path, model: Model, rows: Artifact, **changes: Any) -> Path:
    return home / "work" / finetune.key(inputs(model, rows, **changes))[:32]


def weights(adapter: Adapter) -> bytes:
    return (adapter.data / "adapter_model.safetensors").read_bytes()


def losses(adapter: Adapter) -> list[tuple[int, float, float]]:
    return [(record.step, record.loss, record.grad_norm) for record in read_log(adapter.log / "train_log.jsonl")]


def interrupted(home: Path, model: Model, changes: dict[str, Any], how: signal.Signals) -> Forked:
    """A training in its own process, ended by the signal as soon as its first checkpoint is sealed."""
    arguments = ["-m", "tests.support.train_tiny", model.path, json.dumps(changes)]
    process = Forked(arguments, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=PROJECT)
    while not list(home.glob("work/*/checkpoint-*/manifest.json")):
        assert process.poll() is None, "the training ended before its first checkpoint"
        time.sleep(0.002)
    process.send_signal(how)
    process.wait()
    return process


def test_it_publishes_an_adapter_that_equals_a_second_training(model: Model) -> None:
    adapter = train(model, tiny_tokens(40))
    assert adapter.steps == 12
    assert sorted(path.name for path in adapter.data.path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]
    config = json.loads((adapter.data / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert config["target_modules"] == sorted(FinetuneConfig().lora.target_modules)
    assert adapter.summary["last_loss"] < adapter.summary["first_loss"]
    again = train(model, tiny_tokens(40), keep_checkpoints=1, num_workers=0)
    assert again.data.digest == adapter.data.digest


def test_a_loaders_worker_does_nothing_that_is_for_this_process_to_do_at_its_end(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_in_a_fork = Mock(side_effect=AssertionError)  # as Prefect's do, once it has sent a line of log
    monkeypatch.setattr(threading, "_threading_atexits", [fails_in_a_fork])
    assert train(model, tiny_tokens(40), max_steps=None, epochs=2, num_workers=1).steps == 10


def test_the_log_tells_every_step_and_what_was_resolved(model: Model) -> None:
    adapter = train(model, tiny_tokens(40), optimizer="adamw_8bit")
    records = read_log(adapter.log / "train_log.jsonl")
    assert [record.step for record in records] == list(range(1, 13))
    assert [round(record.learning_rate, 6) for record in records[:4]] == [0.0, 0.0005, 0.001, 0.0009]
    resolved = json.loads((adapter.log / "resolved.json").read_text())
    assert (resolved["dtype"], resolved["device_name"], resolved["optimizer"]) == ("float32", "CPU", "adamw_torch")
    assert resolved["peak_gib"] > 0
    assert resolved["estimated_gib"]["total"] > 0


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_killed_and_run_again_equals_an_uninterrupted_training_to_the_bit(
    home: Path, model: Model, dtype: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {**LONG, "dtype": dtype}
    assert interrupted(home, model, changes, signal.SIGKILL).returncode == -signal.SIGKILL
    rows = tiny_tokens(40)
    work = work_of(home, model, rows, **changes)
    assert not is_last(checkpoints(work)[0]), "killed too late to show anything"
    assert str(left_behind(finetune.key(inputs(model, rows, **changes)))).startswith("resumable from step ")
    with caplog.at_level(logging.INFO):
        resumed = train(model, rows, **changes)
    assert "finetune goes on from step" in caplog.text
    monkeypatch.setenv("AMAZON_FT_HOME", str(home.with_name("other")))
    undisturbed = train(model, tiny_tokens(40), **changes)
    monkeypatch.setenv("AMAZON_FT_HOME", str(home))
    got = weights(resumed), losses(resumed)
    monkeypatch.setenv("AMAZON_FT_HOME", str(home.with_name("other")))
    assert got == (weights(undisturbed), losses(undisturbed))


def test_sigterm_leaves_a_checkpoint_of_the_step_at_hand(home: Path, model: Model) -> None:
    changes = {"max_steps": 2000, "save_steps": 10, "logging_steps": 10}
    assert interrupted(home, model, changes, signal.SIGTERM).returncode == -signal.SIGTERM
    work = work_of(home, model, tiny_tokens(40), **changes)
    log = [json.loads(line)["step"] for line in (work / "train_log.jsonl").read_text().splitlines()]
    assert step_of(checkpoints(work)[0]) == log[-1] > 10
    assert left_behind(finetune.key(inputs(model, tiny_tokens(40), **changes))) == f"resumable from step {log[-1]}"


def test_a_truncated_newest_checkpoint_is_skipped_with_a_warning(
    home: Path, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    rows = tiny_tokens(40)
    whole = train(model, rows)
    work = work_of(home, model, rows)
    newest, before = checkpoints(work)
    optimizer = newest / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    with caplog.at_level(logging.INFO):
        again = train(model, rows)
    assert f"{newest.name} is skipped: optimizer.pt is corrupt; the checkpoint before it is used." in caplog.text
    assert f"finetune goes on from step {step_of(before)}." in caplog.text
    assert (weights(again), losses(again)) == (weights(whole), losses(whole))


def test_a_finished_training_is_published_again_without_training(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny_tokens(40)
    first = train(model, rows)
    monkeypatch.setattr("tasks.finetune.load_backend", lambda _: pytest.fail("it trained a step too many"))
    assert train(model, rows).data == first.data


def test_divergence_names_the_step_and_its_rows_and_keeps_the_checkpoint(home: Path, tmp_path: Path) -> None:
    wide = tiny_reference(make_tiny_model(tmp_path / "wide", hidden=64))
    alike = [tiny_row(f"u{index}", [7] * 20) for index in range(39)]
    rows = publish_rows("tokens", [*alike, tiny_row("odd", list(range(300, 350)))])
    row_by_row = {"batch_size": 1, "gradient_accumulation": 1, "learning_rate": 0.05, "max_steps": 40}
    calm = losses(train(wide, rows, **row_by_row))
    odd_step, odd_loss, _ = max(calm, key=lambda step: step[1])
    assert odd_step > 4, "the odd row comes before the first checkpoint"
    bound = odd_loss - 0.1
    with pytest.raises(DivergedError) as caught:
        train(wide, rows, **row_by_row, max_loss=bound)
    work = work_of(home, wide, rows, **row_by_row, max_loss=bound)
    kept = checkpoints(work)[0]
    assert step_of(kept) < odd_step
    assert str(caught.value) == (
        f"finetune step {odd_step}: training diverged: got loss {odd_loss:g}; expected a loss up to {bound:g} and finite "
        f"gradients. Its rows: odd. The checkpoint of step {step_of(kept)} is kept in {kept}. Lower finetune.learning_rate, "
        "raise finetune.warmup_steps, or look at these rows."
    )


def test_a_gradient_that_is_no_number_ends_the_training_at_its_step() -> None:
    verdict = DivergenceCheck(max_loss=9.0, scaled=False, rows_of=lambda step: [f"row {step}"], kept=lambda: "Nothing kept.")
    steps = [StepRecord(1, 2.0, 1.0, 1e-4, 10), StepRecord(2, math.nan, 1.0, 1e-4, 10), StepRecord(3, 2.0, math.inf, 1e-4, 10)]
    verdict.judge(steps[:1])
    with pytest.raises(
        DivergedError, match=r"^finetune step 2: training diverged: got loss nan; .* Its rows: row 2\. Nothing kept\."
    ):
        verdict.judge(steps)
    with pytest.raises(DivergedError, match=r"^finetune step 3: training diverged: got gradient norm inf;"):
        verdict.judge(steps[2:])
    replace(verdict, scaled=True).judge(steps[2:])  # float16 skips an overflowing step by design


HELD_OUT = {"max_steps": 32, "eval_steps": 2, "keep": "best", "learning_rate": 0.02}
"""Trained on random rows until the held-out ones are lost on more and more."""


def held_out_losses(adapter: Adapter) -> dict[int, float]:
    records = read_log(adapter.log / "train_log.jsonl")
    return {record.step: record.held_out_loss for record in records if record.held_out_loss is not None}


def test_the_held_out_loss_is_logged_and_is_that_of_the_evaluation(model: Model) -> None:
    from tasks.training.inference.scoring import Request, score_here

    adapter = train(model, tiny_tokens(40), eval_steps=4)
    measured = held_out_losses(adapter)
    assert list(measured) == [4, 8, 12]
    rows = rows_of(tiny_tokens(HELD_OUT_ROWS, seed=1))
    ids, labels = (tuple(tuple(row[name]) for row in rows) for name in ("input_ids", "labels"))
    how = {"dtype": "float32", "load_in_4bit": False, "device": "cpu", "prompts": (), "max_new_tokens": 1, "batch_size": 3}
    said = score_here(Request(model=model, adapter=str(adapter.data.path), input_ids=ids, labels=labels, **how))
    assert measured[12] == pytest.approx(sum(said.nll) / sum(label != -100 for row in labels for label in row[1:]), abs=1e-5)


def test_looking_at_held_out_rows_changes_no_weight_and_needs_them_as_input(model: Model) -> None:
    rows = tiny_tokens(40)
    assert inputs(model, rows)["held_out"] is None
    assert train(model, rows, eval_steps=2, lora={"dropout": 0.1}).data == train(model, rows, lora={"dropout": 0.1}).data


def test_every_line_of_the_log_tells_time_and_memory(model: Model) -> None:
    records = read_log(train(model, tiny_tokens(40)).log / "train_log.jsonl")
    seconds = [record.seconds for record in records]
    assert seconds == sorted(seconds)
    assert 0 < seconds[0] < seconds[-1] < 300
    assert all(0 < record.memory_gib < 100 for record in records)


def test_the_best_step_is_kept_beside_the_newest(home: Path, model: Model) -> None:
    rows = tiny_tokens(40)
    adapter = train(model, rows, **HELD_OUT)
    measured = held_out_losses(adapter)
    best = min(measured, key=lambda step: measured[step])
    assert best < 24, "the rows were not learnt by heart soon enough to show anything"
    assert adapter.steps == best
    assert adapter.summary["best_held_out_loss"] == round(measured[best], 4)
    assert [step_of(path) for path in checkpoints(work_of(home, model, rows, **HELD_OUT))] == [32, 28, best]
    assert weights(adapter) != weights(train(model, rows, **HELD_OUT | {"keep": "last"}))


def test_a_training_that_gets_no_better_ends_and_is_not_gone_on_with(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = HELD_OUT | {"early_stopping": 3}
    adapter = train(model, tiny_tokens(40), **stopping)
    measured = held_out_losses(adapter)
    assert list(measured)[-4] == adapter.steps
    assert max(measured) < 32
    monkeypatch.setattr("tasks.finetune.load_backend", lambda _: pytest.fail("it went on"))
    assert train(model, tiny_tokens(40), **stopping).data == adapter.data


def test_killed_and_run_again_keeps_the_same_best_step(home: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny_tokens(40)
    assert interrupted(home, model, HELD_OUT, signal.SIGKILL).returncode == -signal.SIGKILL
    assert not is_last(checkpoints(work_of(home, model, rows, **HELD_OUT))[0]), "killed too late to show anything"
    resumed = train(model, rows, **HELD_OUT)
    got = resumed.steps, weights(resumed), losses(resumed), held_out_losses(resumed)
    monkeypatch.setenv("AMAZON_FT_HOME", str(home.with_name("other")))
    whole = train(model, tiny_tokens(40), **HELD_OUT)
    assert got == (whole.steps, weights(whole), losses(whole), held_out_losses(whole))


def test_a_damaged_best_checkpoint_is_trained_again(home: Path, model: Model, caplog: pytest.LogCaptureFixture) -> None:
    rows = tiny_tokens(40)
    whole = train(model, rows, **HELD_OUT)
    (work_of(home, model, rows, **HELD_OUT) / f"checkpoint-{whole.steps}" / "adapter_model.safetensors").write_bytes(b"")
    again = train(model, rows, **HELD_OUT)
    assert f"checkpoint-{whole.steps}, the best on held-out rows, is damaged or missing; it is trained again." in caplog.text
    assert (weights(again), losses(again)) == (weights(whole), losses(whole))


def test_a_held_out_loss_that_is_no_number_is_never_the_best() -> None:
    steps = [StepRecord(step, 1.0, 1.0, 1e-4, 10, held_out_loss=loss) for step, loss in ((1, math.nan), (2, 3.0), (3, math.nan))]
    assert best_step(steps) == 2
    assert has_stopped_improving(steps, 1)
    assert not has_stopped_improving(steps[:2], 1)


def test_packs_train_without_looking_across_their_rows(model: Model) -> None:
    rows = [tiny_row(f"u{index}", list(range(3 + index, 23 + index))) for index in range(3)]
    apart = publish_rows("tokens", rows)
    pack = {name: [item for row in rows for item in row[name]] for name in ("uids", "input_ids", "labels")}
    packed = publish_rows("packs", [pack | {"seq_lengths": [len(row["input_ids"]) for row in rows]}])
    settings = {"gradient_accumulation": 1, "max_steps": 2, "save_steps": 2, "warmup_steps": 0}
    one_by_one = losses(train(model, apart, batch_size=3, **settings))
    together = losses(train(model, packed, batch_size=1, **settings))
    assert [loss for _, loss, _ in together] == pytest.approx([loss for _, loss, _ in one_by_one], abs=1e-5)


def test_a_second_run_waits_names_the_holder_and_uses_its_result(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    rows = tiny_tokens(40)
    first = train(model, rows)
    done: list[Adapter] = []
    with locks.work_directory(finetune.key(inputs(model, rows))):
        second = threading.Thread(target=lambda: done.append(train(model, rows)))
        second.start()
        deadline = time.monotonic() + 120
        while "finetune waits" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert f"finetune waits: process {os.getpid()} on {os.uname().nodename}" in caplog.text
        assert not done
    second.join(120)
    assert done[0].data == first.data


def test_no_gpu_where_one_is_asked_for_is_said_before_loading(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device: no CUDA device here: got cuda; expected a GPU .* set device=cpu\."):
        train(model, tiny_tokens(4), device="cuda")


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "empty")
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        train(tiny_reference(path), tiny_tokens(4))
    assert str(caught.value) == (
        f"model.id: org/tiny: files missing: got {path} without *.safetensors; expected a model directory as transformers "
        "saves it. Download it again or name another."
    )


def test_no_rows_are_refused(model: Model) -> None:
    empty = tiny_tokens(1).model_copy(update={"rows": 0})
    with pytest.raises(InputError, match="no rows to train on: got tokens with 0 rows"):
        train(model, empty)


def test_a_full_memory_names_three_settings(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hungry:
        def train(self, *_: Any) -> float:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes.")

    monkeypatch.setattr("tasks.finetune.load_backend", lambda _: Hungry())
    with pytest.raises(PipelineError) as caught:
        train(model, tiny_tokens(4))
    for setting in ("finetune.batch_size", "finetune.gradient_checkpointing=full", "tokenize.max_tokens"):
        assert setting in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (
            {"backend": "fast", "batch_size": 1, "gradient_checkpointing": "auto"},
            "Set finetune.frozen_weights=nf4 (now auto), or",
        ),
        ({"backend": "hf", "batch_size": 1, "gradient_checkpointing": "full"}, "Lower tokenize.max_tokens"),
        ({"batch_size": 2, "gradient_checkpointing": "full"}, "Set finetune.gradient_checkpointing=unsloth (now full), or lower"),
    ],
)
def test_only_what_can_still_go_down_is_advised(changes: dict[str, Any], advice: str) -> None:
    config = FinetuneConfig(**changes)
    assert memory.memory_advice(config).startswith(advice)
    assert ("finetune.batch_size" in memory.memory_advice(config)) == (config.batch_size > 1)


@pytest.mark.parametrize(
    ("began", "message"),
    [
        ({"dtype": "bfloat16"}, r"was begun in bfloat16: got Tesla T4, which has none; expected a GPU like NVIDIA H100"),
        ({"frozen_weights": "fp8"}, r"was begun in fp8: got Tesla T4, which has none"),
        (
            {"estimated_gib": {"weights": 15.0, "total": 60.0}},
            r"too little GPU memory: got 15.0 GiB free; expected at least 60.0",
        ),
    ],
)
def test_a_training_is_not_resumed_where_it_cannot_go_on(
    began: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.training.fast.memory_plan.compute_capability", lambda _: (7, 5))
    config = FinetuneConfig(backend="hf", gradient_checkpointing="full")
    now = hardware.resolve(config, WeightsConfig(), "cpu").model_copy(
        update={"dtype": "float16", "device": "cuda", "device_name": "Tesla T4", "free_gib": 15.0}
    )
    then = now.model_copy(update={"device_name": "NVIDIA H100", **began})
    assert _pin(tmp_path / "resolved.json", then, config) == then
    with pytest.raises(InputError, match=message):
        _pin(tmp_path / "resolved.json", now, config)


def test_a_base_stored_in_4_bits_computes_in_the_type_that_was_resolved(model: Model, tmp_path: Path) -> None:
    import torch

    load_base(Path(model.path), "bfloat16", load_in_4bit=True, device="cpu").save_pretrained(tmp_path)
    assert is_in_4bit(tmp_path)
    loaded = load_base(tmp_path, "float16", load_in_4bit=False, device="cpu")
    assert {module.compute_dtype for module in loaded.modules() if hasattr(module, "compute_dtype")} == {torch.float16}


def test_too_little_gpu_memory_is_refused_part_by_part(tmp_path: Path, model: Model) -> None:
    shape = model_shape.read_shape(Path(make_llama3_config(tmp_path)))
    assert shape is not None
    config = FinetuneConfig()
    resolved = hardware.resolve(FinetuneConfig(backend="hf"), inputs(model, tiny_tokens(1))["weights"], "cpu").model_copy(
        update={"dtype": "bfloat16", "load_in_4bit": True, "gradient_checkpointing": "unsloth", "optimizer": "adamw_8bit"}
    )
    estimate = memory.estimate_gib(shape, config, resolved, tokens=2 * 2048)
    assert 5.2 < estimate["weights"] < 6.0  # Llama-3-8B in NF4 with 16-bit embeddings
    assert estimate["adapter"] == pytest.approx(41_943_040 * 8 / 2**30, abs=1e-4)
    memory.check_memory(estimate, 80.0, config)
    with pytest.raises(InputError, match=r"too little GPU memory: got 4.0 GiB free; expected at least \d.* \(weights 5\.\d"):
        memory.check_memory(estimate, 4.0, config)


def make_llama3_config(path: Path) -> Path:
    config = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 32, "vocab_size": 128_256}))
    return path


@given(st.permutations(["q_proj", "k_proj", "v_proj"]))
def test_the_adapters_config_has_the_same_bytes_in_any_order(modules: list[str]) -> None:
    config = {"target_modules": modules, "base_model_name_or_path": "/somewhere", "r": 4}
    assert adapter_config(config, "org/tiny") == adapter_config(dict(reversed(config.items())), "org/tiny")


@given(st.lists(st.floats(0, 20), min_size=1, max_size=50), st.integers(1, 10))
def test_a_summary_lies_within_the_losses(values: list[float], window: int) -> None:
    records = [StepRecord(step, loss, 1.0, 1e-4, 10) for step, loss in enumerate(values, 1)]
    summary = summarize(records, window)
    assert min(values) - 1e-4 <= summary["last_loss"] <= max(values) + 1e-4
    assert summary["tokens"] == 10 * len(values)
