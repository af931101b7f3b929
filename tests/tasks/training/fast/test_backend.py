"""The fast backend computes what transformers and PEFT compute, however rows are packed, batched or recomputed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.activations import ACT2FN

from flows.recipes import load_recipe
from tasks.config import FinetuneConfig, LoraSection, WeightsConfig
from tasks.refs import Adapter, ConfigError, Model
from tasks.training import hardware, model_shape
from tasks.training.backend import Job
from tasks.training.checkpoints import checkpoints, is_last
from tasks.training.fast import frozen, layers, lora_linear, loss, positions
from tasks.training.fast import packed as packed_model
from tasks.training.fast.backend import LENGTHS, Lengths, collator, max_lengths
from tasks.training.fast.loss import linear_loss
from tasks.training.fast.memory_plan import check_supported, choose
from tasks.training.fast.packed import Collator, PackedLlama
from tasks.training.loading import attach_fresh_adapter, load_base
from tasks.training.watch import read_log
from tests.support.nearness import Rows, adapter_of, gradients, packed, relative, row_by_row, scaled_product
from tests.support.tiny import make_tiny_model, tiny_reference, tiny_tokens
from tests.support.train_tiny import train
from tests.tasks.test_finetune import interrupted, make_llama3_config, work_of

pytestmark = pytest.mark.heavy

FAST = {"backend": "fast", "gradient_checkpointing": "none"}
LORA = LoraSection(r=8, alpha=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_reference(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def tiny_llama(model: Model, dtype: torch.dtype, lora: LoraSection = LORA) -> Any:
    """The tiny model with an adapter that is not zero."""
    base = AutoModelForCausalLM.from_pretrained(model.path, dtype=dtype, attn_implementation="sdpa")
    wrapped = attach_fresh_adapter(base, lora)
    random = torch.Generator().manual_seed(1)
    for parameter in adapter_of(wrapped).values():
        parameter.data = torch.randn(parameter.shape, generator=random) * 0.05
    return wrapped


def some_rows(lengths: list[int], seed: int = 0) -> Rows:
    random = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(3, 400, (length,), generator=random).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in drawn]


def reference(model: Model, rows: Rows) -> tuple[float, Tensor, dict[str, Tensor]]:
    """Loss, logits and gradients in float32 by transformers and PEFT, each row by itself."""
    wrapped = tiny_llama(model, torch.float32)
    return *row_by_row(wrapped, rows), gradients(wrapped)


ROWS = some_rows([20, 7, 33, 12, 26])
FILLED = Collator(tokens=128, longest=25, rows=9, labelled=64)


@pytest.mark.parametrize("collate", [Collator(), FILLED])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_equals_each_row_by_itself_in_float32(model: Model, collate: Collator, checkpointed: bool) -> None:
    loss, logits, wanted = reference(model, ROWS)
    wrapped = tiny_llama(model, torch.float32)
    got, got_logits = packed(wrapped, ROWS, collate=collate, checkpointed=checkpointed)
    assert got == pytest.approx(loss, abs=1e-6)
    assert (got_logits - logits).abs().max() < 1e-5
    assert relative(gradients(wrapped), wanted) < 1e-5


def test_packed_in_bfloat16_is_as_near_to_float32_as_each_row_by_itself(model: Model) -> None:
    _, logits, wanted = reference(model, ROWS)
    wrapped = tiny_llama(model, torch.bfloat16)
    got_logits = packed(wrapped, ROWS)[1]
    assert (got_logits.float() - logits).abs().max() < 4e-2
    assert (got_logits.float() - logits).norm() < 1e-2 * logits.norm()
    assert relative(gradients(wrapped), wanted) < 2e-2


Function = Callable[..., Tensor]
BOUNDS: list[tuple[frozen.Kind, float]] = [("plain", 2e-2), ("fp8", 6e-2), ("fp8-backward", 6e-2)]


SILU, GELU = lora_linear.GATED["silu"], lora_linear.GATED["gelu_pytorch_tanh"]
MAPS = [(lora_linear.apply, 96), (lora_linear.apply, 288), (SILU, 576), (GELU, 576)]
"""Maps of 256 values to fewer and to more, and to gate and up, each with what comes out of its matrices."""


@pytest.mark.parametrize(("function", "out"), MAPS)
@pytest.mark.parametrize(("kind", "bound"), BOUNDS)
def test_a_map_and_its_gradients_stay_near_to_float32(
    kind: frozen.Kind, bound: float, function: Function, out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", scaled_product)
    assert_near(kind, bound, function, out, "cpu")


def assert_near(kind: frozen.Kind, bound: float, function: Function, out: int, device: str) -> None:
    """A map of 256 values and its gradients in bfloat16 against autograd's in float32."""
    random = torch.Generator().manual_seed(0)
    shapes = [(64, 256), (16, 256), (out, 16), (out, 256), (64, out if function is lora_linear.apply else out // 2)]
    x, a, b, w, g = (torch.randn(shape, generator=random) / shape[1] ** 0.5 for shape in shapes)
    wanted = gradients_by_autograd([x, a, b], w, g, ACT2FN["gelu_pytorch_tanh" if function is GELU else "silu"])
    got = map_and_gradients(kind, function, [part.to(device, torch.bfloat16) for part in (x, a, b, w, g)])
    for name, one, other in zip(("y", "dx", "da", "db"), got, wanted, strict=True):
        assert (one.float().cpu() - other).norm() < bound * other.norm(), name


def gradients_by_autograd(inputs: list[Tensor], w: Tensor, g: Tensor, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x, a, b = (part.requires_grad_() for part in inputs)
    y = x @ w.t() + x @ a.t() @ b.t()
    if g.shape != y.shape:
        gate, up = y.chunk(2, 1)
        y = function(gate) * up
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), g)]


def map_and_gradients(kind: frozen.Kind, function: Function, inputs: list[Tensor]) -> list[Tensor]:
    x, a, b = (part.requires_grad_() for part in inputs[:3])
    base = frozen.FREEZE[kind](inputs[3], len(a))
    frozen.refresh(kind, base, a, b)
    y = function(kind, x, a, b, base)
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), inputs[4])]


def test_a_whole_model_in_fp8_learns_in_float32s_direction(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", scaled_product)
    _, _, wanted = reference(model, ROWS)
    wrapped = tiny_llama(model, torch.bfloat16)
    packed(wrapped, ROWS, kind="fp8")
    assert relative(gradients(wrapped), wanted) < 0.15  # the error of each map above, through two layers and their norms


def test_with_fp8_backward_a_model_says_what_it_says_in_bfloat16_and_its_gradients_are_near(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", scaled_product)
    _, _, wanted = reference(model, ROWS)
    plain, wrapped = packed(tiny_llama(model, torch.bfloat16), ROWS), tiny_llama(model, torch.bfloat16)
    loss, logits = packed(wrapped, ROWS, kind="fp8-backward")
    assert loss == plain[0]
    assert torch.equal(logits, plain[1])
    assert relative(gradients(wrapped), wanted) < 6e-2


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """torch.compile without its code for processors; nothing is left of it."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    loss._slice_function.cache_clear()
    yield counter
    loss._slice_function.cache_clear()
    torch.compiler.reset()


@pytest.mark.usefixtures("traced")
@pytest.mark.filterwarnings("default")  # of torch, about its own tracing
def test_traced_by_torch_compile_every_gradient_is_what_it_is_untraced(model: Model) -> None:
    untraced, wrapped = tiny_llama(model, torch.float32), tiny_llama(model, torch.float32)
    packed(untraced, ROWS)
    packed(wrapped, ROWS, compiled=True)
    wanted = gradients(untraced)
    assert max(relative({name: grad}, {name: wanted[name]}) for name, grad in gradients(wrapped).items()) < 1e-5


def test_a_loss_is_that_of_the_adapter_as_it_is_and_where_it_is(model: Model) -> None:
    assert_follows_its_adapter(model, "plain", device="cpu")


def test_a_row_is_not_moved_by_its_neighbours(model: Model) -> None:
    one, other = some_rows([9, 14], seed=1), some_rows([30, 14], seed=2)
    with_one = packed(tiny_llama(model, torch.float32), [ROWS[0], one[1]])[1][:20]
    with_other = packed(tiny_llama(model, torch.float32), [ROWS[0], *other])[1][:20]
    assert (with_one - with_other).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["fp8", "fp8-backward"])
def test_maps_without_any_adapter_train_in_fp8(model: Model, kind: frozen.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", scaled_product)
    lora = LoraSection(target_modules=("q_proj", "v_proj"))
    plain, wrapped = tiny_llama(model, torch.bfloat16, lora), tiny_llama(model, torch.bfloat16, lora)
    packed(plain, ROWS)
    packed(wrapped, ROWS, kind=kind)
    assert relative(gradients(wrapped), gradients(plain)) < 0.15


def test_a_module_without_an_adapter_stays_as_it_is(model: Model) -> None:
    lora = LoraSection(r=3, alpha=4, target_modules=("v_proj", "up_proj"), use_rslora=True)
    wrapped = tiny_llama(model, torch.float32, lora)
    with torch.no_grad():
        wanted = wrapped(input_ids=torch.tensor([ROWS[0]["input_ids"]])).logits[0]
    assert (packed(wrapped, ROWS[:1])[1] - wanted).abs().max() < 1e-5
    assert all(grad.abs().sum() > 0 for grad in gradients(wrapped).values())


def test_the_collator_lays_rows_end_to_end() -> None:
    rows = [{"input_ids": [0, 7, 8, 1, 0, 9, 1], "labels": [-100, 7, 8, 1, 0, 9, 1], "seq_lengths": [4, 3]}]
    batch = Collator(tokens=5, longest=2, rows=5, labelled=4)(rows)
    assert batch["input_ids"].tolist() == [[0, 7, 8, 1, 0, 9, 1, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0]]
    assert batch["bounds"].tolist() == [0, 4, 7, 9, 10, 10]
    assert batch["sizes"] == (4, 4)
    assert batch["positions"].tolist() == [0, 1, 2, 4, 5, 0, 0, 0]
    assert batch["shift_labels"].tolist() == [7, 8, 1, 9, 1, -100, -100, -100]
    assert batch["attention_mask"].sum() == 7


def test_a_pack_without_labels_teaches_nothing(model: Model) -> None:
    wrapped = tiny_llama(model, torch.float32)
    loss, _ = packed(wrapped, [{"input_ids": [0, 7, 8, 9], "labels": [-100] * 4}])
    assert loss == 0
    assert all(not grad.any() for grad in gradients(wrapped).values())


@pytest.mark.parametrize(("packed", "tokens"), [(True, 8064), (False, 768)])
def test_a_gpu_sees_few_lengths(packed: bool, tokens: int, model: Model, tmp_path: Path) -> None:
    config = FinetuneConfig(backend="fast", batch_size=4, gradient_checkpointing="none")
    resolved = hardware.resolve(config, WeightsConfig(load_in_4bit=False), "cpu").model_copy(update={"device": "cuda"})
    job = Job(model, tmp_path, packed, config, 2048, resolved, tmp_path)
    made = collator(job, Lengths(pack=2000 if packed else 1100, row=1100, rows=3))
    assert made.tokens == tokens
    assert packed or -(-4 * 1100 // made.tokens) <= LENGTHS


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(0, 1000))
def test_the_loss_in_slices_is_cross_entropy(rows: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 6, generator=random).requires_grad_()
    weight, targets = torch.randn(11, 6, generator=random), torch.randint(0, 11, (rows,), generator=random)
    targets[::3] = -100
    wanted = functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum") / 4
    (grad,) = torch.autograd.grad(wanted, hidden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.training.fast.loss.SLICE", 4)
        got = linear_loss(hidden, weight, targets, 4, compiled=False)
    (got_grad,) = torch.autograd.grad(got, hidden)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    assert torch.allclose(got_grad, grad, atol=1e-6)


def test_last_slices_of_any_size_share_a_compilation(traced: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    monkeypatch.setattr(loss, "SLICE", 8)
    weight = torch.randn(11, 6, generator=random)
    for rows in (21, 13, 8, 15, 19, 18):
        hidden, targets = torch.randn(rows, 6, generator=random), torch.randint(0, 11, (rows,), generator=random)
        wanted, got = (linear_loss(hidden, weight, targets, 4, compiled=compiled) for compiled in (False, True))
        assert got.item() == pytest.approx(wanted.item())
    assert traced.frame_count == 2


@settings(deadline=None, max_examples=25)
@given(st.floats(1e-3, 1e4), st.floats(1e-4, 10), st.integers(0, 100))
def test_fp8_matrices_hold_adapters_of_any_size_that_matters(up: float, weight: float, seed: int) -> None:
    up *= weight
    random = torch.Generator().manual_seed(seed)
    w, a, b = (torch.randn(shape, generator=random) for shape in ((32, 48), (16, 48), (32, 16)))
    base = frozen.FREEZE["fp8"](w * weight, 16)
    frozen.refresh("fp8", base, a, b * up)
    extended, scale, balance = base[0].float(), base[1].t(), base[4]
    got_w, got_b = extended[:, :48] * scale, extended[:, 48:64] * scale / balance
    assert (got_w - w * weight).norm() < 0.05 * (w * weight).norm()
    assert (got_b - b * up).norm() < 0.05 * (b * up).norm()


def curve(adapter: Adapter) -> list[float]:
    return [record.loss for record in read_log(adapter.log / "train_log.jsonl")]


def fifty_steps(wrapped: Any, loss_of: Callable[[Rows, int], Tensor], micro: int) -> list[float]:
    """Losses of 50 steps of eight rows, so many rows at a time."""
    rows = 10 * some_rows([14 + 3 * (index % 7) for index in range(40)])
    optimizer, losses = torch.optim.AdamW(adapter_of(wrapped).values(), lr=1e-3), list[float]()
    for step in range(0, 400, 8):
        items = sum(len(row["labels"]) - 2 for row in rows[step : step + 8])
        losses.append(0.0)
        for start in range(step, step + 8, micro):
            loss = loss_of(rows[start : start + micro], items)
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def fifty_packed_steps(model: Model, micro: int, *, checkpointed: bool) -> list[float]:
    wrapped = tiny_llama(model, torch.float32)
    llama = PackedLlama(wrapped, "plain", checkpointed=checkpointed, compiled=False)
    return fifty_steps(wrapped, lambda rows, items: llama.loss(Collator()(rows), items), micro)


def test_flash_attention_4_is_left_alone_where_a_gpu_would_wait_for_python(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, attend = list[bool](), layers.attend
    monkeypatch.setattr(layers, "attend", lambda *parts, flash4: seen.append(flash4) or attend(*parts))
    monkeypatch.setattr(packed_model, "flash4_agrees", lambda *_: True)
    base = make_tiny_model(Path(model.path).parent / "one layer", layers=1)
    llama = PackedLlama(tiny_llama(tiny_reference(base), torch.float32), "plain", checkpointed=False, compiled=False)
    shape = model_shape.read_shape(base)
    assert shape is not None
    monkeypatch.setattr(packed_model, "BUSY_PRODUCTS", 20 * shape.layer_parameters)
    for tokens in (19, 20):
        llama.logits(Collator()([{"input_ids": [5] * tokens, "labels": [5] * tokens}]))
    assert seen == [False, True]


def fifty_unpacked_steps(model: Model) -> list[float]:
    """By transformers and PEFT, a row at a time."""
    wrapped = tiny_llama(model, torch.float32)

    def loss_of(rows: Rows, items: int) -> Tensor:
        logits = wrapped(input_ids=torch.tensor([rows[0]["input_ids"]])).logits[0]
        return functional.cross_entropy(logits[:-1], torch.tensor(rows[0]["labels"][1:]), reduction="sum") / items

    return fifty_steps(wrapped, loss_of, 1)


@pytest.fixture(scope="module")
def unpacked_curve(model: Model) -> list[float]:
    return fifty_unpacked_steps(model)


@pytest.mark.parametrize(("micro", "checkpointed"), [(8, False), (8, True), (1, False)])
def test_fifty_steps_are_the_same_packed_recomputed_or_row_by_row(
    model: Model, unpacked_curve: list[float], micro: int, checkpointed: bool
) -> None:
    got = fifty_packed_steps(model, micro, checkpointed=checkpointed)
    missed = [abs(one - other) for one, other in zip(got, unpacked_curve, strict=True)]
    assert max(missed) < 1e-3
    assert sum(missed) / 50 < 1e-5
    assert unpacked_curve[-1] < unpacked_curve[0]


def test_one_by_eight_trains_as_eight_by_one_and_as_the_hf_backend(model: Model) -> None:
    rows = tiny_tokens(40)
    eight_by_one = curve(train(model, rows, **FAST, batch_size=1, gradient_accumulation=8))
    one_by_eight = curve(train(model, rows, **FAST, batch_size=8, gradient_accumulation=1))
    assert one_by_eight == pytest.approx(eight_by_one, abs=1e-5)
    hf = curve(train(model, rows, **FAST | {"backend": "hf"}, batch_size=8, gradient_accumulation=1))
    assert one_by_eight == pytest.approx(hf, abs=1e-5)


@pytest.mark.parametrize(("lost", "told"), [(False, []), (True, ["adapters of k_proj, q_proj;"])])
def test_a_training_says_which_adapters_have_no_gradient(
    lost: bool, told: list[str], model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if lost:
        turn = positions.rotate
        monkeypatch.setattr(positions, "rotate", lambda *parts: turn(*parts).detach())
    train(model, tiny_tokens(40), **FAST, max_steps=3)
    warned = [record.getMessage() for record in caplog.records if "no gradient" in record.getMessage()]
    assert len(warned) == len(told)
    assert all(text in message for text, message in zip(told, warned, strict=True))


def test_it_trains_packs_to_an_adapter_that_peft_loads(model: Model) -> None:
    adapter = train(model, tiny_tokens(40, kind="packs"), **FAST, batch_size=1)
    assert adapter.steps == 12
    assert adapter.summary["last_loss"] < adapter.summary["first_loss"]
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(adapter.data.path))
    ups = [weight for name, weight in tuned.named_parameters() if "lora_B" in name]
    assert len(ups) == 14
    assert all(weight.abs().sum() > 0 for weight in ups)


def test_killed_and_run_again_it_equals_an_uninterrupted_training_to_the_bit(
    home: Path, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changes = FAST | {"max_steps": 60, "warmup_steps": 2}
    assert interrupted(home, model, changes, signal.SIGKILL).returncode == -signal.SIGKILL
    rows = tiny_tokens(40)
    assert not is_last(checkpoints(work_of(home, model, rows, **changes))[0]), "killed too late to show anything"
    with caplog.at_level(logging.INFO):
        resumed = train(model, rows, **changes)
    assert "finetune goes on from step" in caplog.text
    got = (resumed.data / "adapter_model.safetensors").read_bytes(), curve(resumed)
    monkeypatch.setenv("AMAZON_FT_HOME", str(home.with_name("other")))
    whole = train(model, tiny_tokens(40), **changes)
    assert got == ((whole.data / "adapter_model.safetensors").read_bytes(), curve(whole))


@pytest.mark.parametrize("kind", ["nf4", "plain"])
def test_a_base_model_stored_in_nf4_is_trained_as_it_is_or_unpacked(kind: frozen.Kind, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "wide", hidden=64)
    with torch.no_grad():  # a forward pass on the CPU repacks the weights, so each has its own
        wanted = in_4bit(path)(input_ids=torch.tensor([ROWS[0]["input_ids"]])).logits[0].float()
    wrapped = in_4bit(path)
    got = packed(wrapped, ROWS[:1], kind=kind)[1].float()
    assert (got - wanted).norm() < 0.02 * wanted.norm()
    assert all(grad.abs().sum() > 0 for name, grad in gradients(wrapped).items() if "lora_A" not in name)


def in_4bit(path: Path) -> Any:
    return attach_fresh_adapter(load_base(path, "bfloat16", load_in_4bit=True, device="cpu"), LORA)


@pytest.mark.parametrize(("left_out", "quant_type"), [(("o_proj", "gate_proj"), "nf4"), ((), "fp4")])
def test_what_is_not_stored_in_nf4_is_held_in_sixteen_bits(tmp_path: Path, left_out: tuple[str, ...], quant_type: str) -> None:
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type, llm_int8_skip_modules=["lm_head", *left_out])
    base = make_tiny_model(tmp_path / "base", hidden=64)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=stored).save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = in_4bit(tmp_path)(input_ids=torch.tensor([ROWS[0]["input_ids"]])).logits[0].float()
    got = packed(in_4bit(tmp_path), ROWS[:1], kind="nf4")[1].float()
    assert (got - wanted).norm() < 0.02 * wanted.norm()


def test_what_fits_is_chosen_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    shape = model_shape.read_shape(Path(make_llama3_config(tmp_path)))
    assert shape is not None
    config = FinetuneConfig(backend="fast", gradient_checkpointing="auto", optimizer="adamw_torch_fused")
    resolved = hardware.resolve(config, WeightsConfig(load_in_4bit=False), "cpu").model_copy(
        update={"dtype": "bfloat16", "device": "cuda", "device_name": "NVIDIA H100"}
    )
    monkeypatch.setattr("tasks.training.fast.memory_plan.compute_capability", lambda _: (9, 0))
    with caplog.at_level(logging.INFO):
        found = {free: choose(config, resolved, shape, 8192, free) for free in (79.0, 40.0, 22.0, 11.5)}
    chosen = {free: (way.frozen_weights, way.gradient_checkpointing) for free, way in found.items()}
    assert chosen == {79.0: ("fp8", "none"), 40.0: ("fp8", "full"), 22.0: ("fp8", "full"), 11.5: ("nf4", "full")}
    assert "base matrices fp8, gradient checkpointing none: the fastest that fits on NVIDIA H100 (about " in caplog.text
    backward = choose(config.model_copy(update={"frozen_weights": "fp8-backward"}), resolved, shape, 8192, 79.0)
    held = [(way.estimated_gib or {})["weights"] for way in (found[79.0], backward)]
    assert held[1] - held[0] == pytest.approx(6.5, abs=0.01)  # at most a byte more for each of 6.98e9 weights
    narrow = replace(shape, hidden=576)
    assert choose(config, resolved, narrow, 8192, 79.0).frozen_weights == "plain"
    monkeypatch.setattr("tasks.training.fast.memory_plan.compute_capability", lambda _: (8, 0))
    assert choose(config, resolved, shape, 8192, 79.0).frozen_weights == "plain"


@pytest.mark.parametrize("kind", ["fp8", "fp8-backward"])
def test_fp8_is_refused_where_there_is_none(model: Model, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"finetune\.frozen_weights: CPU has no fp8: got {kind}; expected auto, plain or nf4"):
        train(model, tiny_tokens(4), **FAST, frozen_weights=kind)


def test_another_architecture_is_refused_before_it_is_loaded(model: Model, tmp_path: Path) -> None:
    check_supported(Path(model.path), "bfloat16")
    config = json.loads((Path(model.path) / "config.json").read_text())
    other = {"attention_bias": True, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config | other))
    with pytest.raises(ConfigError, match=r"got biases True, dtype float16, weights gptq; expected .* Set finetune.backend=hf"):
        check_supported(tmp_path, "float16")
    shutil.copytree(model.path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="got model_type gpt2; expected a Llama"):
        train(tiny_reference(tmp_path), tiny_tokens(4), **FAST)


def test_the_sizes_of_packs_are_read_without_their_tokens() -> None:
    from datasets import Dataset

    packs = Dataset.from_dict({"input_ids": [[1] * 9, [1] * 7], "seq_lengths": [[2, 3, 4], [6, 1]]})
    assert max_lengths(packs) == Lengths(pack=9, row=6, rows=3)
    assert max_lengths(packs.remove_columns("seq_lengths")) == Lengths(pack=9, row=9, rows=1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.load_in_4bit=true", "model.load_in_4bit needs another backend than fast"),
        ("finetune.lora.dropout=0.1", "finetune.backend=fast trains without finetune.lora.dropout"),
        ("finetune.backend=hf", "finetune.gradient_checkpointing=auto and finetune.frozen_weights need finetune.backend=fast"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("fast", [override])


def needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.mark.gpu
@pytest.mark.parametrize(("function", "out"), MAPS)
@pytest.mark.parametrize(("kind", "bound"), BOUNDS)
def test_on_a_gpu_a_map_and_its_gradients_stay_near_to_float32(
    kind: frozen.Kind, bound: float, function: Function, out: int
) -> None:
    needs_cuda()
    assert_near(kind, bound, function, out, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "queries", "keys", "size"), [(9, 32, 8, 128), (9, 10, 10, 96), (9, 8, 1, 256), (70_000, 4, 2, 16)]
)
def test_on_a_gpu_heads_are_turned_and_turned_back_as_on_the_cpu(tokens: int, queries: int, keys: int, size: int) -> None:
    needs_cuda()
    angles, parts = torch.rand(tokens, size // 2).repeat(1, 2), (queries, keys, keys)
    heads, *grads = (torch.randn(tokens, count, size).bfloat16() for count in (sum(parts), *parts))

    def turned(device: str, dtype: torch.dtype) -> list[Tensor]:
        given = heads.detach().to(device).requires_grad_()
        cos, sin = (table.to(device, dtype) for table in (angles.cos(), angles.sin()))
        got = positions.turned_heads(given, cos, sin, queries, keys)
        (grad,) = torch.autograd.grad(got, given, [part.to(device) for part in grads])
        return [part.detach().cpu() for part in (*got, grad)]

    for dtype in (torch.float32, torch.bfloat16):
        wanted, got = turned("cpu", torch.float32), turned("cuda", dtype)
        assert max(relative({"": one}, {"": other}) for one, other in zip(got, wanted, strict=True)) < 0.01


@pytest.mark.gpu
def test_on_a_gpu_compiled_packs_lose_what_rows_lose_on_the_cpu(tmp_path: Path) -> None:
    needs_cuda()
    wide = tiny_reference(make_tiny_model(tmp_path / "wide", hidden=256))
    packs = tiny_tokens(40, kind="packs")
    same = FAST | {"batch_size": 1, "optimizer": "adamw_torch"}  # the one in 8 bits is a GPU's
    on_cpu = curve(train(wide, packs, **same))
    on_gpu = curve(train(wide, packs, **same | {"frozen_weights": "plain"}, device="cuda", dtype="bfloat16"))
    assert on_gpu == pytest.approx(on_cpu, rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "bound"), [("plain", 0.04), ("fp8", 0.5), ("fp8-backward", 0.1)])
def test_on_a_gpu_every_compiled_gradient_is_near_to_float32s(kind: frozen.Kind, bound: float, tmp_path: Path) -> None:
    needs_cuda()
    wide = tiny_reference(make_tiny_model(tmp_path / "wide", hidden=256))
    _, _, wanted = reference(wide, ROWS)
    wrapped = tiny_llama(wide, torch.bfloat16).to("cuda")
    packed(wrapped, ROWS, kind=kind, collate=FILLED, compiled=True)
    assert max(relative({name: grad.cpu()}, {name: wanted[name]}) for name, grad in gradients(wrapped).items()) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "fp8", "fp8-backward"])
def test_on_a_gpu_a_loss_is_that_of_the_adapter_as_it_is_and_where_it_is(kind: frozen.Kind, tmp_path: Path) -> None:
    needs_cuda()
    assert_follows_its_adapter(tiny_reference(make_tiny_model(tmp_path / "wide", hidden=256)), kind, device="cuda")


def assert_follows_its_adapter(model: Model, kind: frozen.Kind, device: str) -> None:
    """Losses of one model whose adapter is changed in place, then elsewhere, are those of new models."""
    rows = send_to_device(Collator()(ROWS), device)

    def of_factor(factor: float) -> PackedLlama:
        wrapped = tiny_llama(model, torch.bfloat16).to(device)
        for parameter in adapter_of(wrapped).values():
            parameter.data *= factor
        return PackedLlama(wrapped, kind, checkpointed=False, compiled=False)

    wrapped = tiny_llama(model, torch.bfloat16).to(device)
    llama = PackedLlama(wrapped, kind, checkpointed=False, compiled=device == "cuda")
    wanted = [of_factor(factor).loss(rows, 1).item() for factor in (1, 4, 8)]
    got = [llama.loss(rows, 1).item()]
    for parameter in adapter_of(wrapped).values():
        parameter.data.mul_(4)
    got.append(llama.loss(rows, 1).item())
    for parameter in adapter_of(wrapped).values():
        parameter.data = parameter.data * 2
    got.append(llama.loss(rows, 1).item())
    assert got == pytest.approx(wanted, rel=0.004)


def test_the_bench_measures_the_backend_in_a_process_of_its_own(model: Model, tmp_path: Path) -> None:
    from rich.console import Console

    from flows.bench.train import bench_train

    data = tiny_tokens(60, kind="packs")
    console = Console(file=(tmp_path / "told").open("w"), width=120)
    found = bench_train(model, data.path, held=("auto",), against_document=False, console=console)
    ours = found["sides"]["auto"]
    assert found["device"] == "CPU"
    assert len(ours["windows"]) == 3
    assert ours["tokens_per_second"] == sorted(ours["windows"])[1] > 0
    assert ours["seconds_to_first_step"] > 0
    console.file.close()
    assert "No GPU here: a tiny model on the CPU" in (tmp_path / "told").read_text()


def test_the_bench_measures_on_one_gpu_of_several_and_holds_it(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from flows.bench import train as bench
    from flows.running import gpus

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(gpus.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(gpus, "list_gpus", lambda: [gpus.Gpu(str(index), f"GPU-{index}", "", "", None) for index in (0, 1)])
    seen: list[str] = []

    def measured(*_: Any) -> dict[str, Any]:
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        with pytest.raises(gpus.Timeout):
            gpus._lock_of(gpus.list_gpus()[0].uuid).acquire(timeout=0)
        return {}

    monkeypatch.setattr(bench, "measure_sides", measured)
    bench.bench_train(model, tmp_path, held=("auto",), against_document=False, console=Console(quiet=True))
    assert seen == ["GPU-0"]


def test_the_bench_refuses_a_model_that_is_not_computed_before_it_measures(model: Model, tmp_path: Path) -> None:
    from rich.console import Console

    from flows.bench.train import bench_train

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    other = model.model_copy(update={"path": str(tmp_path)})
    with pytest.raises(ConfigError, match="got model_type gpt2"):
        bench_train(other, tmp_path, held=("auto",), against_document=False, console=Console(quiet=True))
