"""Each family is computed as transformers and PEFT compute it, and what is not computed is refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tasks.refs import ConfigError
from tasks.training.fast import frozen
from tasks.training.fast.attention import Scores, attend, make_blocks
from tasks.training.fast.families import FAMILIES
from tasks.training.fast.memory_plan import check_supported
from tasks.training.watch import read_log
from tests.support.families import TINY, tiny_base, tiny_config, with_adapter
from tests.support.nearness import Rows, gradients, packed, relative, row_by_row, scaled_product
from tests.support.tiny import make_tiny_model, tiny_reference, tiny_tokens
from tests.support.train_tiny import train

pytestmark = pytest.mark.heavy

each_family = pytest.mark.parametrize("name", TINY)
each_type = pytest.mark.parametrize("name", FAMILIES)


def some_rows(lengths: list[int], seed: int = 0) -> Rows:
    random = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(3, 400, (length,), generator=random).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in drawn]


ROWS = some_rows([20, 7, 40, 3, 26])
"""Shorter and longer than the windows, and than the lengths that scaled positions begin at."""


def both(name: str, rows: Rows, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """(loss, logits, gradients) by transformers and PEFT row by row, and packed."""
    wrapped = with_adapter(tiny_base(name, dtype, **changes), name)
    wanted = (*row_by_row(wrapped, rows), gradients(wrapped))
    wrapped = with_adapter(tiny_base(name, dtype, **changes), name)
    return wanted, (*packed(wrapped, rows), gradients(wrapped))


def assert_equal(wanted: Any, got: Any) -> None:
    assert got[0] == pytest.approx(wanted[0], abs=1e-5)
    assert (got[1] - wanted[1]).abs().max() < 1e-4
    assert all(relative({key: got[2][key]}, {key: wanted[2][key]}) < 1e-4 for key in wanted[2])


@each_family
def test_packed_equals_each_row_by_itself_in_float32(name: str) -> None:
    assert_equal(*both(name, ROWS))


@each_family
def test_packed_in_bfloat16_is_no_farther_from_float32_than_transformers_is(name: str) -> None:
    exact, _ = both(name, ROWS)
    theirs, ours = both(name, ROWS, torch.bfloat16)
    for number in (1, 2):
        far, near = (distance(found[number], exact[number]) for found in (theirs, ours))
        assert near < 1.1 * far, number


def distance(got: Any, wanted: Any) -> float:
    return relative(got, wanted) if isinstance(got, dict) else float((got.float() - wanted).norm() / wanted.norm())


@settings(deadline=None, max_examples=8, derandomize=True)
@given(
    st.sampled_from(["mistral", "gemma2", "gemma3_text", "smollm3", "phi3", "qwen2"]),
    st.lists(st.integers(3, 34), min_size=1, max_size=4),
    st.integers(2, 36),  # through 1 a token sees itself alone, and queries have no gradient
)
def test_rows_of_any_lengths_are_seen_through_windows_of_any_size(name: str, lengths: list[int], window: int) -> None:
    assert_equal(*both(name, some_rows(lengths), sliding_window=window))


@each_type
def test_the_saved_adapter_says_in_plain_peft_what_the_training_said(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    tiny_base(name).save_pretrained(tmp_path / "base")
    wrapped = with_adapter(tiny_base(name), name)
    said = packed(wrapped, ROWS)[1]
    wrapped.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    tuned = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    with torch.no_grad():
        again = torch.cat([tuned(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in ROWS])
    assert (said - again).abs().max() < 1e-4


def test_gemma_2_trains_by_fast_as_by_hf_its_capped_scores_too(home: Path, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "gemma2", vocabulary=440)
    (path / "model.safetensors").unlink()
    tiny_base("gemma2").save_pretrained(path)
    rows, curves = tiny_tokens(16), dict[str, list[float]]()
    for backend in ("fast", "hf"):
        adapter = train(tiny_reference(path), rows, backend=backend, max_steps=3, logging_steps=1, save_steps=3)
        curves[backend] = [record.loss for record in read_log(adapter.log / "train_log.jsonl")]
    assert curves["fast"] == pytest.approx(curves["hf"], abs=1e-4)


KINDS: list[tuple[frozen.Kind, float]] = [("fp8", 0.35), ("fp8-backward", 0.08)]


@each_type
@pytest.mark.parametrize(("kind", "bound"), KINDS)
def test_in_fp8_a_family_learns_in_float32s_direction(
    name: str, kind: frozen.Kind, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", scaled_product)
    wrapped = with_adapter(tiny_base(name), name)
    row_by_row(wrapped, ROWS)
    exact, wrapped = gradients(wrapped), with_adapter(tiny_base(name, torch.bfloat16), name)
    packed(wrapped, ROWS, kind=kind)
    assert relative(gradients(wrapped), exact) < bound


@each_type
def test_a_base_in_nf4_is_trained_as_it_is(name: str, tmp_path: Path) -> None:
    from tasks.training.loading import load_base

    tiny_base(name, intermediate_size=128).save_pretrained(tmp_path)
    wrapped = with_adapter(load_base(tmp_path, "bfloat16", load_in_4bit=True, device="cpu"), name)
    with torch.no_grad():
        wanted = wrapped(input_ids=torch.tensor([ROWS[0]["input_ids"]])).logits[0].float()
    wrapped = with_adapter(load_base(tmp_path, "bfloat16", load_in_4bit=True, device="cpu"), name)
    got = packed(wrapped, ROWS[:1], kind="nf4")[1].float()
    assert (got - wanted).norm() < 0.02 * wanted.norm()
    assert all(grad.abs().sum() > 0 for grad in gradients(wrapped).values())


def test_recomputing_changes_nothing_where_layers_differ() -> None:
    kept, again = (with_adapter(tiny_base("gemma2"), "gemma2") for _ in range(2))
    assert packed(kept, ROWS)[0] == packed(again, ROWS, checkpointed=True)[0]
    assert all(torch.equal(grad, gradients(kept)[name]) for name, grad in gradients(again).items())


def test_capped_scores_on_a_gpu_are_those_on_the_cpu() -> None:
    """The operator that a GPU compiles; on a CPU it runs forwards only."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, heads, 16, generator=random) for heads in (4, 2, 2))
    bounds, sizes = torch.tensor([0, 20, 32, 40, 40], dtype=torch.int32), torch.tensor([3, 20])
    for window in (None, 5):
        scores = Scores(0.3, window, cap=2.0)
        wanted = attend(q, k, v, bounds, sizes, scores)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            got = attend(q, k, v, bounds, sizes, scores, make_blocks(bounds, 40, window))
        assert torch.allclose(got, wanted, atol=1e-5)


# What is not computed

READ = {
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters"),
    *("sliding_window", "layer_types", "use_sliding_window", "max_window_layers", "no_rope_layers", "no_rope_layer_interval"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "attention_multiplier"),
    *("embedding_multiplier", "logits_scaling", "residual_multiplier", "original_max_position_embeddings"),
}
"""By layers.py and packed.py, or by transformers' modules that they call or read."""
IN_THE_WEIGHTS = {"vocab_size", "hidden_size", "intermediate_size", "tie_word_embeddings"}
REFUSED = {"hidden_act", "hidden_activation", "attention_bias", "mlp_bias", "use_bidirectional_attention"}
SAID = {"attention_dropout", "resid_pdrop", "embd_pdrop"}
IDLE = {"initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings"} | {
    "pretraining_tp"
}
"""Of nothing that a training computes."""


@each_type
def test_every_setting_of_a_familys_config_is_computed_or_refused(name: str) -> None:
    from transformers import PreTrainedConfig

    fields = {key for key in type(tiny_config(name)).__annotations__ if key not in PreTrainedConfig.__annotations__}
    own = fields | ({"layer_types"} if hasattr(tiny_config(name), "layer_types") else set())
    assert (
        own
        - READ
        - IN_THE_WEIGHTS
        - REFUSED
        - SAID
        - IDLE
        - {"model_type"}
        - {key for key in own if key.startswith(("base_model_", "keys_to_", "default_theta", "attribute_map"))}
        == set()
    )


def refusal(tmp_path: Path, **config: Any) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        check_supported(tmp_path, "bfloat16")
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "model_type mixtral, a mixture of experts"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "model_type qwen3_moe, a mixture of experts"),
        ({"model_type": "gemma3", "vision_config": {"hidden_size": 8}}, "model_type gemma3, a model of images"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type dynamic"),
        ({"model_type": "qwen2", "rope_parameters": {"rope_type": "mrope"}}, "rope type mrope"),
        ({"model_type": "mistral", "hidden_act": "relu"}, "hidden_act relu"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "hidden_activation gelu"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({"model_type": "qwen3", "attention_bias": True}, "biases True"),
        ({"model_type": "llama", "layer_types": ["chunked_attention"]}, "layer type chunked_attention"),
    ],
)
def test_a_setting_that_is_not_computed_is_refused_by_name(config: dict[str, Any], told: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, **config) == (
        f"finetune.backend: the fast backend can't train this model: got {told}; expected a Llama or one of its kin (llama, "
        "smollm3, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3, granite, olmo2), its weights in 16 bits or in 4 by "
        "bitsandbytes, in bfloat16 or float32, with no such setting. "
        "Set finetune.backend=hf finetune.gradient_checkpointing=full."
    )


def test_dropout_that_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "granite", "attention_dropout": 0.1}))
    check_supported(tmp_path, "bfloat16")
    assert "trains without the dropout of the model's config.json: {'attention_dropout': 0.1}" in caplog.text


@each_family
def test_every_tiny_model_is_supported(name: str, tmp_path: Path) -> None:
    tiny_config(name).save_pretrained(tmp_path)
    check_supported(tmp_path, "bfloat16")
