"""What a GGUF file of each family says, in transformers where that reads it, and in llama.cpp where it is installed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.refs import InputError
from tasks.training.exporting import llama_cpp
from tasks.training.exporting.architectures import ARCHITECTURES, architecture_of
from tasks.training.exporting.gguf import Bits, round_matrices, write_gguf
from tasks.training.exporting.modelfile import make_modelfile
from tasks.training.exporting.vocabulary import pre_tokenizer
from tests.support.families import EXPORTED, TINY, tiny_base, tiny_config
from tests.support.tiny import BOS, CORPUS, EOS, PAD, make_tiny_model

pytestmark = pytest.mark.heavy

each_family = pytest.mark.parametrize("name", TINY)
PROMPTS = [[0, *range(3 * size, 4 * size)] for size in range(2, 40, 7)]
NEAR: dict[Bits, float] = {"F16": 0.02, "Q8_0": 0.3}
"""Nats between the likeliest tokens' likelihoods: both compute in other types and orders."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tokenizer"), vocabulary=440)


@pytest.fixture
def runtime() -> Callable[..., Any]:
    if find_spec("xllamacpp") is None:
        how = pytest.fail if os.environ.get("AMAZON_FT_REQUIRE_LLAMACPP") == "1" else pytest.skip
        how('llama.cpp is not installed: pip install "amazon-ft[llamacpp]"')
    return llama_cpp.serve_file


def exported(name: str, tokenizer: Path, path: Path, bits: Bits = "F16") -> tuple[Any, Path]:
    """A tiny model that llama.cpp computes, and its file."""
    model = tiny_base(name, **EXPORTED.get(name, {})).eval()
    write_gguf(model, tokenizer, path / "model.gguf", "tiny", bits)
    return model, path / "model.gguf"


@each_family
def test_transformers_reads_a_family_again_as_it_was_written(name: str, tokenizer: Path, tmp_path: Path) -> None:
    for bits in ("F16", "Q8_0"):
        model, file = exported(name, tokenizer, tmp_path, bits)
        if not architecture_of(model.config).rereadable:
            with pytest.raises((ValueError, NotImplementedError), match=r"is not supported yet|Unknown gguf model_type"):
                AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, config=model.config)
            return
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=file.name, config=model.config, dtype=torch.float32, attn_implementation="eager"
        )
        round_matrices(model, bits)
        with torch.no_grad():
            apart = [(model(torch.tensor([ids])).logits - again(torch.tensor([ids])).logits).abs().max() for ids in PROMPTS]
        assert max(apart) < 1e-4


@each_family
@pytest.mark.parametrize("bits", NEAR)
def test_llama_cpp_computes_what_transformers_computes(
    name: str, bits: Bits, tokenizer: Path, tmp_path: Path, runtime: Callable[..., Any]
) -> None:
    import httpx

    model, file = exported(name, tokenizer, tmp_path, bits)
    server = runtime(file, 64)
    compared = 0
    for ids in PROMPTS:
        asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 10, "cache_prompt": False}
        said = httpx.post(f"{server.listening_address}/completion", json=asked).json()
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        for token in said.get("completion_probabilities", ()):  # of the end, and of a part of a character, nothing is told
            assert max(abs(found["logprob"] - wanted[found["id"]].item()) for found in token["top_logprobs"]) < NEAR[bits]
            compared += 1
    assert compared > 1


def make_pieces(path: Path, *, prefix: bool) -> Path:
    """A tokenizer as those that were made of SentencePiece's, Llama 2's with a space in front of a text, Gemma's without."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    parts = [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=440, special_tokens=[BOS, EOS, PAD, "<unk>", *every_byte], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    told = json.loads(made.to_str())
    told["added_tokens"] = [token for token in told["added_tokens"] if not token["content"].startswith("<0x")]
    (path / "tokenizer.json").write_text(json.dumps(told))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_cuts_a_text_into_a_sentencepiece_tokenizers_pieces(
    prefix: bool, tmp_path: Path, runtime: Callable[..., Any]
) -> None:
    import httpx

    pieces = make_pieces(tmp_path, prefix=prefix)
    server, tokenizer = runtime(exported("mistral", pieces, tmp_path)[1], 64), AutoTokenizer.from_pretrained(pieces)
    for text in (*CORPUS, "Ação 5 × 3 kg, \U0001f600!"):
        asked = {"content": text, "add_special": False, "parse_special": True}
        found = httpx.post(f"{server.listening_address}/tokenize", json=asked).json()["tokens"]
        assert found == tokenizer(text, add_special_tokens=False)["input_ids"], text


CUTS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
LETTERS += (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+"
)


@pytest.mark.parametrize(
    ("regex", "ignore_merges", "name"),
    [
        (CUTS % r"\p{N}{1,3}", True, "llama-bpe"),
        (CUTS % r"\p{N}{1,3}", False, "dbrx"),
        (CUTS % r"\p{N}", False, "qwen2"),
        (LETTERS % ("", "", ""), False, "tekken"),
        (LETTERS % ((r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",) * 2 + ("{1,3}",)), False, "gpt-4o"),
    ],
)
def test_a_byte_level_tokenizer_is_named_by_how_it_cuts(regex: str, ignore_merges: bool, name: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}
    cut = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}]}
    assert pre_tokenizer({"pre_tokenizer": cut, "model": {"type": "BPE", "ignore_merges": ignore_merges}}) == name


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gemma2", r"no gemma2 so: got query_pre_attn_scalar 24"),
        ("gemma3_text", r"no gemma3_text so: got layer_types \['sliding_attention', 'full_attention', 'sliding_attention'\]"),
        ("smollm3", r"no smollm3 so: got no_rope_layers \[1, 0, 1\]"),
    ],
)
def test_what_llama_cpp_takes_for_granted_is_refused_where_it_is_otherwise(name: str, told: str) -> None:
    with pytest.raises(InputError, match=rf"^export gguf: llama\.cpp computes {told}\. Use --format merged-16bit\.$"):
        architecture_of(tiny_config(name))


def test_another_family_is_refused() -> None:
    from transformers import GPT2Config

    with pytest.raises(InputError, match=r"^export gguf: got a gpt2 model; expected llama, mistral, granite, .*Use --format"):
        architecture_of(GPT2Config())


def test_a_context_is_no_longer_than_a_window_that_llama_cpp_does_not_see_through(tokenizer: Path, tmp_path: Path) -> None:
    lengths = dict[str, int]()
    for name in ("mistral", "qwen2", "qwen3", "gemma2"):
        fields = GGUFReader(exported(name, tokenizer, tmp_path)[1]).fields
        lengths[name] = fields[f"{ARCHITECTURES[TINY[name][0]].name}.context_length"].contents()
    assert lengths == {"mistral": 200, "qwen2": 200, "qwen3": 256, "gemma2": 256}


def test_a_modelfile_renders_a_turn_as_the_chat_template_does(tokenizer: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert make_modelfile(loaded, "model.gguf") == (
        'FROM ./model.gguf\nTEMPLATE """{{ if .System }}'
        f"{BOS}system: {{{{ .System }}}}\nuser: {{{{ .Prompt }}}}\nassistant: {{{{ else }}}}"
        f'{BOS}user: {{{{ .Prompt }}}}\nassistant: {{{{ end }}}}{{{{ .Response }}}}"""\n'
        f'PARAMETER stop "{EOS}"\nPARAMETER temperature 0\n'
    )
