"""Families of models, found by their `model_type`: where each differs from Llama, and what of a config.json is refused.

Here stands what no number of a config says. Numbers (windows, caps, multipliers, scales, layers without positions) packed.py
reads from the loaded model, of whichever family.

Source: transformers 5.17, models/MODEL_TYPE/modeling_MODEL_TYPE.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Gate = Literal["silu", "gelu_pytorch_tanh"]

ROPES = ("default", "linear", "llama3", "yarn", "longrope", "su")
"""Rotary positions whose frequencies depend on a row alone; `su` is longrope's name in Phi 3's first configs."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
IMAGES = ("vision_config", "visual", "mm_vision_tower")
DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")
"""Settings that only a training heeds, and that tell nothing of what a model computes."""


@dataclass(frozen=True)
class Family:
    """Where a family's layers differ from Llama's."""

    title: str
    """The published models that it covers."""
    norms: tuple[str | None, str | None, str | None, str | None] = ("input_layernorm", None, "post_attention_layernorm", None)
    """Modules before and after attention, before and after the gated maps."""
    norm_offset: float | None = None
    """Added to a norm's weights, which scale in float32 then; None: they scale in the compute type, as Llama's."""
    head_norms: bool = False
    """Whether queries and keys are normed, by `q_norm` and `k_norm`."""
    biases: bool = False
    """Whether the maps to queries, keys and values have biases."""
    fused: bool = False
    """Whether these maps are one module, `qkv_proj`, and gate and up another, `gate_up_proj`."""
    gate: Gate = "silu"


AROUND = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")

FAMILIES = {
    "llama": Family("Llama 2, 3, 3.1, 3.2, 3.3; SmolLM 2"),
    "smollm3": Family("SmolLM 3"),
    "mistral": Family("Mistral 7B, Nemo, Small"),
    "qwen2": Family("Qwen 2, 2.5", biases=True),
    "qwen3": Family("Qwen 3", head_norms=True),
    "gemma2": Family("Gemma 2", norms=AROUND, norm_offset=1.0, gate="gelu_pytorch_tanh"),
    "gemma3_text": Family("Gemma 3, text", norms=AROUND, norm_offset=1.0, head_norms=True, gate="gelu_pytorch_tanh"),
    "phi3": Family("Phi 3, 3.5, 4", fused=True),
    "granite": Family("Granite 3"),
    "olmo2": Family("OLMo 2", norms=AFTER, norm_offset=0.0, head_norms=True),
}
"""By the model_type of config.json."""


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """Settings of a config.json that packed.py does not compute, each with its value.

    >>> unsupported({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    ['rope type dynamic']
    >>> unsupported({"model_type": "mixtral", "num_local_experts": 8})
    ['model_type mixtral, a mixture of experts']
    """
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        return [f"model_type {config.get('model_type')}{_kind(config)}"]
    key = "hidden_act" if family.gate == "silu" else "hidden_activation"
    settings: list[tuple[str, object, tuple[object, ...]]] = [
        (key, config.get(key, family.gate), (family.gate,)),
        ("biases", bool(config.get("attention_bias") or config.get("mlp_bias")), (False,)),
        ("use_bidirectional_attention", config.get("use_bidirectional_attention") or False, (False,)),
        *(("rope type", kind, ROPES) for kind in rope_types(config)),
        *(("layer type", kind, ("full_attention", "sliding_attention")) for kind in sorted(set(config.get("layer_types") or ()))),
    ]
    return [f"{name} {value}" for name, value, allowed in settings if value not in allowed]


def rope_types(config: Mapping[str, Any]) -> list[str]:
    """The kinds of rotary positions that a config.json names, of newer and older form, for all layers or by their type.

    >>> rope_types({"rope_parameters": {"full_attention": {"rope_type": "linear"}, "sliding_attention": {}}})
    ['default', 'linear']
    """
    told: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parts = [part for part in told.values() if isinstance(part, dict)] or [told]
    return sorted({str(part.get("rope_type") or part.get("type") or "default") for part in parts})


def dropouts(config: Mapping[str, Any]) -> dict[str, float]:
    """The dropouts of a config.json that are above 0, which packed.py leaves out."""
    return {name: config[name] for name in DROPOUTS if config.get(name)}


def _kind(config: Mapping[str, Any]) -> str:
    if any(config.get(name) for name in IMAGES):
        return ", a model of images"
    return ", a mixture of experts" if any(config.get(name) for name in EXPERTS) else ""
