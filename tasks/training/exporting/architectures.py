"""A family of models in llama.cpp: its architecture's name and keys, and what of a configuration it does not compute.

Source: llama.cpp, conversion/ (convert_hf_to_gguf.py before): what each class of a family writes; src/models/ for what is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.refs import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp calls a family, and where its tensors differ from transformers'."""

    name: str
    interleaved: bool = False
    """Whether rows of queries and keys are in llama.cpp's own order, each head's two halves by turns."""
    norm_shift: float = 0.0
    """Added to the weights of norms."""
    every_window: bool = False
    """Whether it sees through windows, as its layers alternate; else a file's context is no longer than a window."""
    rereadable: bool = True
    """Whether transformers reads such a file again."""


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True, rereadable=False),
    "granite": Architecture("granite", interleaved=True, rereadable=False),
    "smollm3": Architecture("smollm3", interleaved=True, rereadable=False),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma2": Architecture("gemma2", norm_shift=1.0, every_window=True),
    "gemma3_text": Architecture("gemma3", norm_shift=1.0, every_window=True),
    "phi3": Architecture("phi3"),
    "olmo2": Architecture("olmo2", rereadable=False),
}
"""By transformers' model_type."""
GEMMA_PERIOD = {"gemma2": 2, "gemma3_text": 6}
"""Of so many layers one sees all tokens."""
NO_ROPE_PERIOD = 4
"""Of so many layers of SmolLM 3 one has no positions."""
ROPES = ("default", "linear", "llama3", "yarn", "longrope")


def architecture_of(config: Any) -> Architecture:
    """The architecture of a model's configuration.

    Raises:
        InputError: when llama.cpp does not compute it so.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise InputError(
            f"export gguf: got a {config.model_type} model; expected {', '.join(ARCHITECTURES)}. Use --format merged-16bit."
        )
    if wrong := next((f"{name} {value}" for name, value, right in _fixed(config) if not right), None):
        raise InputError(f"export gguf: llama.cpp computes no {config.model_type} so: got {wrong}. Use --format merged-16bit.")
    return found


def _fixed(config: Any) -> Iterator[tuple[str, object, bool]]:
    """(setting, value, whether it is what llama.cpp takes for granted)."""
    kind, layers = config.model_type, range(1, config.num_hidden_layers + 1)
    yield from (("rope type", found, found in ROPES) for found in (part["rope_type"] for part in ropes(config).values()))
    yield "attention_bias", True, not getattr(config, "attention_bias", False)
    if kind in GEMMA_PERIOD:
        wanted = ["full_attention" if layer % GEMMA_PERIOD[kind] == 0 else "sliding_attention" for layer in layers]
        yield "layer_types", config.layer_types, config.layer_types == wanted
        scalar, wide = config.query_pre_attn_scalar, config.hidden_size // config.num_attention_heads
        is_27b = config.num_hidden_layers == {"gemma2": 46, "gemma3_text": 62}[kind]
        yield "query_pre_attn_scalar", scalar, scalar == (wide if is_27b else config.head_dim)
    if kind == "smollm3":
        yield "no_rope_layers", config.no_rope_layers, config.no_rope_layers == [int(n % NO_ROPE_PERIOD != 0) for n in layers]


def ropes(config: Any) -> dict[str | None, dict[str, Any]]:
    """The rotary positions of each type of layer, or of all.

    >>> from types import SimpleNamespace
    >>> ropes(SimpleNamespace(rope_parameters={"rope_type": "default", "rope_theta": 1e4}))
    {None: {'rope_type': 'default', 'rope_theta': 10000.0}}
    """
    parameters = dict(config.rope_parameters)
    nested = {kind: part for kind, part in parameters.items() if isinstance(part, dict)}
    return nested or {None: parameters}


def head_size(config: Any) -> int:
    """Numbers of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_numbers(writer: GGUFWriter, config: Any, architecture: Architecture) -> None:
    """Write a model's dimensions, positions and multipliers."""
    size, rope = head_size(config), next(iter(ropes(config).values()))
    rope = ropes(config).get("full_attention", rope)
    window = window_of(config)
    writer.add_block_count(config.num_hidden_layers)
    short = window is not None and not architecture.every_window
    writer.add_context_length(min(config.max_position_embeddings, window) if short and window else config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if window is not None and architecture.every_window:
        writer.add_sliding_window(window)
    if architecture.name == "phi3":
        writer.add_sliding_window(0)  # llama.cpp asks for the key, and sees through no window of this family
    _add_scaled_positions(writer, config, rope)
    _add_multipliers(writer, config)


def window_of(config: Any) -> int | None:
    """The tokens that a layer sees where some see fewer than all."""
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    return getattr(config, "sliding_window", None) if "sliding_attention" in types else None


def _add_scaled_positions(writer: GGUFWriter, config: Any, rope: dict[str, Any]) -> None:
    import gguf

    match rope["rope_type"]:
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        case "longrope":
            writer.add_rope_scaling_orig_ctx_len(length := rope["original_max_position_embeddings"])
            scale = rope.get("factor") or config.max_position_embeddings / length
            usual = math.sqrt(1 + math.log(scale) / math.log(length)) if scale > 1 else 1.0
            writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or usual)
        case _:
            pass


def _add_multipliers(writer: GGUFWriter, config: Any) -> None:
    add = {
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
    }
    for name, write in add.items():
        if (value := getattr(config, name, None)) is not None:
            write(value)


def position_tensors(config: Any) -> Iterator[tuple[str, Any]]:
    """(name, float32 array) of what positions are divided by, where it is not one number."""
    import numpy as np
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = next(iter(ropes(config).values()))
    if rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        size = head_size(config)
        plain = 1 / rope["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float32) / size)
        yield "rope_freqs.weight", (plain / scaled.numpy()).astype(np.float32)
    if rope["rope_type"] == "longrope":
        yield "rope_factors_long.weight", np.asarray(rope["long_factor"], np.float32)
        yield "rope_factors_short.weight", np.asarray(rope["short_factor"], np.float32)
