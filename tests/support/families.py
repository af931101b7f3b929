"""A tiny random model of each family that the fast backend trains, with every feature of the family on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.config import LoraSection
from tasks.training.loading import attach_fresh_adapter, attention_of
from tests.support.nearness import adapter_of

SHAPE = {
    "vocab_size": 448,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 24}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 24,
}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 24, "sliding_window": 6}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "smollm3": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3_text": (
        "gemma3_text",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
    "phi3": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24, "sliding_window": 20}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 1.7,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.11,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {}),
}
"""{name: (model_type, what of its config is not SHAPE's)}."""
EXPORTED: dict[str, dict[str, Any]] = {
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4, "use_sliding_window": False},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "layer_types": None},
    "phi3": {
        "max_position_embeddings": 1024,
        "sliding_window": None,
        "original_max_position_embeddings": 256,
        "rope_parameters": LONGROPE | {"original_max_position_embeddings": 256},
    },
    "mistral": {"sliding_window": 200},
    "qwen2": {"sliding_window": 200},
}
"""What of them llama.cpp takes for granted."""
FUSED_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
LORA = LoraSection(r=8, alpha=16)


def tiny_config(name: str, **changes: Any) -> Any:
    """The configuration of a tiny model."""
    model_type, own = TINY[name]
    return AutoConfig.for_model(model_type, **SHAPE | own | changes)


def tiny_base(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A tiny model whose every parameter is random, norms and biases included."""
    torch.manual_seed(seed)
    config = tiny_config(name, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention_of(config))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn_like(parameter) * 0.2
    return model.to(dtype)


def lora_of(name: str) -> LoraSection:
    """An adapter on every linear map of a family's layers."""
    return LORA.model_copy(update={"target_modules": FUSED_TARGETS}) if TINY[name][0] == "phi3" else LORA


def with_adapter(base: Any, name: str) -> Any:
    """The model with an adapter that is not zero."""
    wrapped = attach_fresh_adapter(base, lora_of(name))
    random = torch.Generator().manual_seed(1)
    for parameter in adapter_of(wrapped).values():
        parameter.data = torch.randn(parameter.shape, generator=random) * 0.05
    return wrapped
