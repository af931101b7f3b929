"""Loads a base model with plain transformers: what the hf backend trains and what evaluation asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.config import LoraSection
from tasks.refs import Model


def load_base(path: Path, dtype: str, *, load_in_4bit: bool, device: str) -> Any:
    """The causal language model of a directory, on the device; quantized to NF4 if wanted and not stored so already."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    number = getattr(torch, dtype)
    # None would hide the quantization that a directory's own config.json tells of
    quantize = {"quantization_config": _nf4(number)} if load_in_4bit and not is_quantized(path) else {}
    model = AutoModelForCausalLM.from_pretrained(
        str(path),
        dtype=number,
        device_map={"": device},
        attn_implementation=attention_of(AutoConfig.from_pretrained(str(path), local_files_only=True)),
        local_files_only=True,
        **quantize,
    )
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # a directory's own config.json may ask for one that the GPU lacks
            module.compute_dtype = number
    return model


def attention_of(config: Any) -> str:
    """Transformers' attention that computes what a model's configuration says: its `sdpa` passes capped scores over."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def load_tokenizer(model: Model) -> Any:
    """The model's tokenizer, padding on the right; the EOS token pads where there is no padding token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.tokenizer.path, padding_side="right", local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def attach_fresh_adapter(model: Any, lora: LoraSection) -> Any:
    """PEFT's wrapper with a fresh adapter around a model as it is; the start depends on lora.random_state alone."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(lora.random_state)
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            bias=lora.bias,
            target_modules=list(lora.target_modules),
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            modules_to_save=list(lora.modules_to_save) or None,
            task_type="CAUSAL_LM",
        ),
    )


def is_quantized(path: Path) -> bool:
    """Whether the directory's weights are stored quantized."""
    return "quantization_config" in json.loads((path / "config.json").read_text(encoding="utf-8"))


def is_in_4bit(path: Path) -> bool:
    """Whether the directory's weights are stored in 4 bits by bitsandbytes."""
    return bool(json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config", {}).get("load_in_4bit"))


def _nf4(number: Any) -> Any:
    """The quantization of the document's base model, unsloth/llama-3-8b-bnb-4bit."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=number
    )
