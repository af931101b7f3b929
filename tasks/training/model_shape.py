"""The dimensions of a base model, from its config.json alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelShape:
    """A Llama-like model's dimensions."""

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
    """The dimensions of a model directory; None for an architecture without Llama's modules."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    try:
        hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        keys = size * config.get("num_key_value_heads", heads)
        return ModelShape(
            hidden=hidden,
            layers=config["num_hidden_layers"],
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            linear={
                "q_proj": (hidden, size * heads),
                "k_proj": (hidden, keys),
                "v_proj": (hidden, keys),
                "o_proj": (size * heads, hidden),
                "gate_proj": (hidden, inner),
                "up_proj": (hidden, inner),
                "down_proj": (inner, hidden),
            },
        )
    except KeyError:
        return None
