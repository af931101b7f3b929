"""A Llama model as one GGUF file, which llama.cpp, Ollama and LM Studio run; written with the package `gguf`.

Source: llama.cpp, convert_hf_to_gguf.py, LlamaModel: tensor names, the order of query and key rows, vectors in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.refs import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter

LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
"""The beginning of the regular expression by which Llama 3's tokenizer cuts words."""


def write_gguf(model: Any, tokenizer: Path, target: Path, name: str) -> None:
    """Write model and tokenizer; matrices keep their 16 bits, vectors get 32.

    Raises:
        InputError: for another architecture, scaled positions, or a tokenizer that llama.cpp has no name for.
    """
    import gguf

    check_exportable(model.config, tokenizer)
    config = model.config
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_name(name)
    half = str(model.dtype) == "torch.float16"
    matrix = gguf.GGMLQuantizationType.F16 if half else gguf.GGMLQuantizationType.BF16
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_rope_freq_base(_rope(config).get("rope_theta", 10_000.0))
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    for tensor, values in tensors(model):
        kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else matrix
        writer.add_tensor(tensor, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_exportable(config: Any, tokenizer: Path) -> None:
    """Refuse what can't be written before anything is merged.

    Raises:
        InputError: as write_gguf.
    """
    if config.model_type != "llama":
        raise InputError(f"export gguf: got a {config.model_type} model; expected llama. Use --format merged-16bit.")
    if (scaled := _rope(config).get("rope_type", "default")) != "default":
        raise InputError(f"export gguf: got {scaled} positions; expected plain rotary ones. Use --format merged-16bit.")
    pre_tokenizer(json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8")))


def tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """(GGUF name, float32 array) of each tensor; a head that is tied to the embedding is left out."""
    import gguf

    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, ending = name.rpartition(".")
        values = tensor.float().numpy()
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


def pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts words.

    Raises:
        InputError: when it has none that is known here.
    """
    shape = json.dumps(tokenizer.get("pre_tokenizer"), ensure_ascii=False)
    if tokenizer["model"]["type"] == "BPE" and "ByteLevel" in shape:
        if json.dumps(LLAMA3_SPLIT, ensure_ascii=False)[1:-1] in shape:
            return "llama-bpe"
        if '"Digits"' in shape:
            return "smollm"
        if '"Split"' not in shape:
            return "gpt-2"
    raise InputError(
        f"export gguf: a tokenizer that llama.cpp has no name for here: got {shape[:120]}; expected a byte-level one that "
        "cuts words as GPT-2's, SmolLM's or Llama 3's. Use --format merged-16bit."
    )


def _add_tokenizer(writer: GGUFWriter, directory: Path, size: int) -> None:
    import gguf

    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["id"]: token for token in tokenizer["added_tokens"]}
    named = {number: text for text, number in tokenizer["model"]["vocab"].items()} | {i: t["content"] for i, t in special.items()}
    kinds = {
        number: gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED for number, token in special.items()
    }
    missing = gguf.TokenType.UNUSED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list([named.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([kinds.get(i, gguf.TokenType.NORMAL if i in named else missing) for i in range(size)])
    vocabulary = gguf.SpecialVocab(directory, load_merges=True, n_vocab=size)
    vocabulary.add_special_token["bos"] = False  # the chat template begins with it where there is one
    vocabulary.add_to_gguf(writer, quiet=True)


def _rope(config: Any) -> dict[str, Any]:
    return dict(config.rope_parameters or {})


def _head_size(config: Any) -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads
