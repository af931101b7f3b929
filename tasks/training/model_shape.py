"""The dimensions of a base model, from its config.json alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.config import FinetuneConfig
from tasks.refs import ConfigError

SEPARATE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
FUSED = ("qkv_proj", "gate_up_proj")
"""The same maps where a family stores those with a common input as one."""
FUSED_FAMILIES = ("phi3",)
ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a model of Llama's kind."""

    hidden: int
    layers: int
    vocabulary: int
    tied: bool
    linear: dict[str, tuple[int, int]]
    """(in, out) features of each linear module of a layer, by name."""

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer's linear modules."""
        return sum(inputs * outputs for inputs, outputs in self.linear.values())


def read_shape(model: Path) -> ModelShape | None:
    """The dimensions of a model directory; None for an architecture without Llama's modules, fused as Phi 3's or not."""
    from transformers import CONFIG_MAPPING

    stored = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if "hidden_size" not in stored:
        return None
    try:
        config: Any = CONFIG_MAPPING[stored.get("model_type", "llama")].from_dict(stored)
        return ModelShape(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            linear=_linear(config),
        )
    except (AttributeError, KeyError, ValueError):
        return None


def check_targets(shape: ModelShape, config: FinetuneConfig) -> None:
    """Refuse adapters on maps that a model does not have, which PEFT leaves out without a word if it has others of them.

    Raises:
        ConfigError: naming those that it has.
    """
    wanted = [name.rsplit(".")[-1] for name in config.lora.target_modules]
    known = config.backend == "fast"  # others may reach further modules, by names that are not known here
    missing = [name for name in wanted if name not in shape.linear and (known or name in SEPARATE + FUSED)]
    if missing and config.backend != "unsloth":  # which takes fused maps apart
        raise ConfigError(
            f"finetune.lora.target_modules: no such maps in this model's layers: got {', '.join(missing)}; expected some of "
            f"{', '.join(shape.linear)}. Set finetune.lora.target_modules=[{', '.join(shape.linear)}]."
        )


def _linear(config: Any) -> dict[str, tuple[int, int]]:
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    keys = size * (getattr(config, "num_key_value_heads", None) or heads)
    into = ((hidden, size * heads), (hidden, keys), (hidden, keys), (hidden, inner), (hidden, inner))
    if config.model_type in FUSED_FAMILIES:
        into = ((hidden, size * heads + 2 * keys), (hidden, 2 * inner))
    names = FUSED if config.model_type in FUSED_FAMILIES else SEPARATE
    found = dict(zip(names, into, strict=True)) | {"o_proj": (size * heads, hidden), "down_proj": (inner, hidden)}
    return {name: found[name] for name in sorted(found, key=ORDER.index)}
