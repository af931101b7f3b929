"""A model as one GGUF file, which llama.cpp, Ollama and LM Studio run; written with the package `gguf`.

Tensors are named by that package's own maps; architectures.py says what else differs from family to family.

Source: llama.cpp, convert_hf_to_gguf.py: the order of query and key rows, norms of Gemma, vectors in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tasks.training.exporting.architectures import ARCHITECTURES, add_numbers, architecture_of, position_tensors
from tasks.training.exporting.vocabulary import add_vocabulary, pre_tokenizer

Bits = Literal["BF16", "F16", "Q8_0"]
"""How matrices are written, by the name of the package `gguf`."""


def write_gguf(model: Any, tokenizer: Path, target: Path, name: str, bits: Bits | None = None) -> None:
    """Write model and tokenizer; matrices as `bits` says, else in their own 16 bits, vectors in 32.

    Raises:
        InputError: for what llama.cpp does not compute, or a tokenizer that it has no name for.
    """
    import gguf

    check_exportable(model.config, tokenizer)
    architecture, matrix = architecture_of(model.config), gguf.GGMLQuantizationType[bits or own_bits(model)]
    writer = gguf.GGUFWriter(target, architecture.name)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{matrix.name}"])
    add_numbers(writer, model.config, architecture)
    add_vocabulary(writer, tokenizer, model.config.vocab_size)
    for tensor, values in tensors(model):
        kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else matrix
        writer.add_tensor(tensor, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def round_matrices(model: Any, bits: Bits) -> None:
    """Round a model's matrices as a file of such bits holds them."""
    import gguf
    import torch

    kind = gguf.GGMLQuantizationType[bits]
    for parameter in model.parameters():
        if parameter.ndim > 1:
            rounded = gguf.dequantize(gguf.quantize(parameter.detach().float().numpy(), kind), kind)
            parameter.data = torch.from_numpy(rounded).to(parameter.dtype)


def own_bits(model: Any) -> Bits:
    """The 16 bits of a model's own numbers."""
    return "F16" if str(model.dtype) == "torch.float16" else "BF16"


def check_exportable(config: Any, tokenizer: Path) -> None:
    """Refuse what can't be written before anything is merged.

    Raises:
        InputError: as write_gguf.
    """
    architecture_of(config)
    pre_tokenizer(json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8")))


def tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """(GGUF name, float32 array) of each tensor; a head that is tied to the embedding is left out."""
    import gguf

    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if architecture.interleaved else {}
    yield from position_tensors(config)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, ending = name.rpartition(".")
        values = tensor.float().numpy()
        if stem.endswith("norm"):
            values = values + architecture.norm_shift
        count = next((count for part, count in heads.items() if stem.endswith(part)), None)
        yield f"{names.get_name(stem)}.{ending}", interleaved(values, count) if count else values


def interleaved(values: Any, heads: int) -> Any:
    """Rows of a query or key matrix, or entries of its bias, in GGUF's order: each head's two halves by turns.

    >>> import numpy as np
    >>> interleaved(np.arange(8), 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)
