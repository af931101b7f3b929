"""Models of published shapes with random weights, so that a machine without network measures any family's speed.

Source: each model's config.json at its `url`; what it does not name is transformers' default of its model_type.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.refs import Model, Tokenizer
from tasks.tables.arrow import read_table, write_table


@dataclass(frozen=True)
class PublishedShape:
    """Where a shape was published, and the settings of its config.json that decide what is computed."""

    url: str
    model_type: str
    settings: dict[str, Any]


def _rope(theta: float, **scaling: object) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}


LLAMA_3: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
    **_rope(500_000.0),
}
LLAMA_3_70B = {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64}


def _llama3_rope(factor: float) -> dict[str, Any]:
    bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return _rope(500_000.0, rope_type="llama3", factor=factor, **bounds)


LLAMA_32_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
QWEN_25_7B: dict[str, Any] = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 131_072,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
    "bos_token_id": 151_643,
    "eos_token_id": 151_643,
    **_rope(1_000_000.0),
}
MISTRAL_7B: dict[str, Any] = {
    "vocab_size": 32_768,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **_rope(1_000_000.0),
}
GEMMA_2_9B: dict[str, Any] = {
    "vocab_size": 256_000,
    "hidden_size": 3584,
    "intermediate_size": 14_336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "layer_types": ["sliding_attention", "full_attention"] * 21,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    **_rope(10_000.0),
}
META, HUB = "https://huggingface.co/meta-llama", "https://huggingface.co"
SHAPES = {
    "llama-3-8b": PublishedShape(f"{META}/Meta-Llama-3-8B/blob/main/config.json", "llama", LLAMA_3),
    "llama-3-70b": PublishedShape(f"{META}/Meta-Llama-3-70B/blob/main/config.json", "llama", LLAMA_3 | LLAMA_3_70B),
    "llama-3.1-8b": PublishedShape(
        f"{META}/Llama-3.1-8B/blob/main/config.json",
        "llama",
        LLAMA_3 | _llama3_rope(8.0) | {"max_position_embeddings": 131_072},
    ),
    "llama-3.2-1b": PublishedShape(
        f"{META}/Llama-3.2-1B/blob/main/config.json", "llama", LLAMA_3 | _llama3_rope(32.0) | LLAMA_32_1B
    ),
    "qwen2.5-7b": PublishedShape(f"{HUB}/Qwen/Qwen2.5-7B/blob/main/config.json", "qwen2", QWEN_25_7B),
    "mistral-7b-v0.3": PublishedShape(f"{HUB}/mistralai/Mistral-7B-v0.3/blob/main/config.json", "mistral", MISTRAL_7B),
    "gemma-2-9b": PublishedShape(f"{HUB}/google/gemma-2-9b/blob/main/config.json", "gemma2", GEMMA_2_9B),
}
"""By the names of flows/choices.py."""


def make_shape(name: str, directory: Path, tokenizer: Tokenizer, device: str) -> Model:
    """A model directory of a shape in bfloat16: matrices of standard deviation 0.02, all else as transformers begins it.

    It is made on the device, one layer in memory at a time, each a file. The tokenizer stays where it is.
    """
    from safetensors.torch import save_file

    model = empty_model(name)
    directory.mkdir(parents=True)
    model.config.save_pretrained(directory)
    files: dict[str, str] = {}
    for prefix, tensors in _parts(model, device):
        save_file(tensors, directory / f"{prefix}.safetensors", metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, f"{prefix}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return Model(path=str(directory), digest=f"shape:{name}", name=f"{name}, random weights", tokenizer=tokenizer)


def empty_model(name: str) -> Any:
    """The model of a shape without weights, in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPES[name]
    with torch.device("meta"):
        config = AutoConfig.for_model(shape.model_type, **shape.settings)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _parts(model: Any, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(its name, its weights by their names in the model) of each layer and of what lies around them."""
    import torch

    torch.manual_seed(0)
    around = {"model.embed_tokens": model.model.embed_tokens, "model.norm": model.model.norm}
    around |= {} if model.config.tie_word_embeddings else {"lm_head": model.lm_head}
    for prefix, part in (around | {f"model.layers.{index}": layer for index, layer in enumerate(model.model.layers)}).items():
        part.to_empty(device=device)
        part.apply(model._init_weights)
        yield prefix, {f"{prefix}.{name}": weights.cpu() for name, weights in part.state_dict().items()}
        part.to("meta")
    if device == "cuda":
        torch.cuda.empty_cache()


def fit_packs(packs: Path, vocabulary: int, target: Path) -> int:
    """Write packs.arrow with token ids modulo a vocabulary's size; the largest id before.

    The same packs then serve every shape: as many tokens in as many rows, though no text any more.
    """
    import pyarrow as pa

    table, largest = read_table(packs), 0
    for name in ("input_ids", "labels"):
        lists = table[name].combine_chunks()
        ids = lists.flatten().to_numpy()
        largest = max(largest, int(ids.max(initial=0)))
        fitted = pa.array(np.where(ids < 0, ids, ids % vocabulary).astype(np.int32))  # below 0: no label
        offsets = pa.array(lists.offsets.to_numpy() - lists.offsets[0].as_py(), pa.int32())
        table = table.set_column(table.column_names.index(name), name, pa.ListArray.from_arrays(offsets, fitted))
    write_table(target, table.schema, table.to_batches())
    return largest
