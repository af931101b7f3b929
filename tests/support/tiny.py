"""A tiny Llama with its own tokenizer: real files that every loader accepts, made in milliseconds without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer as BpeTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from tasks.caching.store import publish
from tasks.refs import Artifact, Model, Special, Tokenizer

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"

CORPUS = (
    "Responda à pergunta sobre o produto com base no título e na descrição fornecidos.",
    "### Título do produto:\nChaleira elétrica de aço inox\n\n### Pergunta:\nQual é a descrição deste produto?",
    "### Resposta (baseada na descrição):\nFeita de aço, 2 litros, marca Aurora, cor preta.",
    "The quick brown kettle is made of steel by Aurora; size 2 litres, colour black &amp; silver.",
)


def make_tiny_model(path: Path, *, hidden: int = 32, layers: int = 2, vocabulary: int = 600, seed: int = 0) -> Path:
    """A directory with config.json, model.safetensors, tokenizer.json and its configs; equal bytes for equal arguments."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(vocabulary)
    tokenizer.save(str(path / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    _write(path / "tokenizer_config.json", _tokenizer_config())
    _write(path / "special_tokens_map.json", {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD})
    _write(path / "config.json", _config(hidden, layers, size))
    _write(path / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False})
    save_file(_weights(hidden, layers, size, seed), path / "model.safetensors", metadata={"format": "pt"})
    return path


def make_tiny_tokenizer(vocabulary: int = 600) -> BpeTokenizer:
    """A byte-level BPE tokenizer, as Llama-3's: BOS is 0 and added in front, EOS is 1, the padding token 2."""
    tokenizer = BpeTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def _weights(hidden: int, layers: int, size: int, seed: int) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return (random.standard_normal((rows, columns)) * 0.08).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(size, hidden), "lm_head.weight": matrix(size, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            columns = hidden if name in "qo" else hidden // 2
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(columns, hidden)
        for name, shape in (("gate", (2 * hidden, hidden)), ("up", (2 * hidden, hidden)), ("down", (hidden, 2 * hidden))):
            weights[f"{prefix}.mlp.{name}_proj.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{name}.weight"] = np.ones(hidden, np.float32)
    weights["model.norm.weight"] = np.ones(hidden, np.float32)
    return weights


def _config(hidden: int, layers: int, size: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "torch_dtype": "float32",
    }


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1))


def tiny_reference(path: Path) -> Model:
    """What the model stage would hand on for a tiny model's directory."""
    tokenizer = Tokenizer(path=str(path), digest="tiny", special=Special(bos=BOS, eos=EOS))
    return Model(path=str(path), digest=path.name, name="org/tiny", tokenizer=tokenizer)


def tiny_tokens(rows: int, *, seed: int = 0, kind: str = "tokens") -> Artifact:
    """Random rows of 10 to 40 ids as tokens.arrow, the first 4 ids unlabelled; or three of them to a pack as packs.arrow."""
    random = np.random.default_rng(seed)
    made = [tiny_row(f"u{index}", random.integers(3, 400, size=random.integers(8, 38)).tolist()) for index in range(rows)]
    if kind == "packs":
        made = [_packed(made[start : start + 3]) for start in range(0, rows, 3)]
    return publish_rows(kind, made)


def tiny_row(uid: str, ids: list[int]) -> dict[str, list[object]]:
    """BOS, the ids, EOS; labelled from the fifth on."""
    row: list[object] = [0, *ids, 1]
    return {"uids": [uid], "input_ids": row, "labels": [-100] * 4 + row[4:]}


def publish_rows(kind: str, rows: list[dict[str, list[object]]]) -> Artifact:
    """Rows as KIND.arrow."""
    fields = {"uids": pa.list_(pa.string())} | {name: pa.list_(pa.int32()) for name in rows[0] if name != "uids"}
    schema = pa.schema(fields)
    with publish(kind) as draft:
        with pa.OSFile(str(draft / f"{kind}.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema))
        draft.rows = len(rows)
    return draft.artifact


def _packed(rows: list[dict[str, list[object]]]) -> dict[str, list[object]]:
    names = ("uids", "input_ids", "labels")
    return {name: [item for row in rows for item in row[name]] for name in names} | {
        "seq_lengths": [len(row["input_ids"]) for row in rows]
    }
