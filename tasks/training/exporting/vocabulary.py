"""A tokenizer.json as llama.cpp holds a vocabulary: byte-level ones by how they cut words, SentencePiece's by their scores.

Source: llama.cpp, conversion/base.py (`_set_vocab_gpt2`, `_set_vocab_sentencepiece`) and src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.refs import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLITS = (
    (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?", "llama-bpe"),
    (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?", "qwen2"),
    (r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTIONS + r"?|", "gpt-4o"),
    (r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?", "tekken"),
)
"""(a part of the regular expression by which a tokenizer cuts words, llama.cpp's name), the first that is there."""
SPACE, BYTE = "▁", re.compile("<0x[0-9A-F]{2}>")


def pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer cuts words; `default` where it cuts none.

    Raises:
        InputError: when it has none that is known here.
    """
    if is_sentencepiece(tokenizer):
        return "default"
    shape = json.dumps(tokenizer.get("pre_tokenizer"), ensure_ascii=False)
    if tokenizer["model"]["type"] == "BPE" and "ByteLevel" in shape:
        for part, name in SPLITS:
            if json.dumps(part, ensure_ascii=False)[1:-1] in shape:
                # the same words, but joined by merges alone, as GPT-4's of which it was made
                return "dbrx" if name == "llama-bpe" and tokenizer["model"].get("ignore_merges") is False else name
        if '"Digits"' in shape:
            return "smollm"
        if '"Split"' not in shape:
            return "gpt-2"
    raise InputError(
        f"export gguf: a tokenizer that llama.cpp has no name for here: got {shape[:120]}; expected SentencePiece's, or a "
        "byte-level one that cuts words as GPT-2's, SmolLM's, Llama 3's, GPT-4o's, Qwen's or Mistral's. "
        "Use --format merged-16bit."
    )


def is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    """Whether a tokenizer was made of SentencePiece's: merges of characters, bytes where a character is unknown."""
    model = tokenizer["model"]
    return (
        model["type"] == "BPE"
        and bool(model.get("byte_fallback"))
        and SPACE in json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")], ensure_ascii=False)
    )


def add_vocabulary(writer: GGUFWriter, directory: Path, size: int) -> None:
    """Write the tokenizer of a directory for a model of so many tokens, and its chat template."""
    import gguf

    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    by_pieces = is_sentencepiece(tokenizer)
    special = {token["id"]: token for token in tokenizer["added_tokens"]}
    named = {number: text for text, number in tokenizer["model"]["vocab"].items()} | {i: t["content"] for i, t in special.items()}
    writer.add_tokenizer_model("llama" if by_pieces else "gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list([named.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([_kind(number, named, special, by_pieces=by_pieces) for number in range(size)])
    if by_pieces:
        writer.add_token_scores(piece_scores(tokenizer, named, size))
        writer.add_add_space_prefix('"Prepend"' in json.dumps(tokenizer) or '"prepend_scheme": "first"' in json.dumps(tokenizer))
    vocabulary = gguf.SpecialVocab(directory, load_merges=not by_pieces, n_vocab=size)
    vocabulary.add_special_token["bos"] = False  # the chat template begins with it where there is one
    vocabulary.add_to_gguf(writer, quiet=True)


def _kind(number: int, named: dict[int, str], special: dict[int, Any], *, by_pieces: bool) -> Any:
    from gguf import TokenType

    if number in special:
        return TokenType.CONTROL if special[number]["special"] else TokenType.USER_DEFINED
    if number not in named:
        return TokenType.UNUSED
    return TokenType.BYTE if by_pieces and BYTE.fullmatch(named[number]) else TokenType.NORMAL


def piece_scores(tokenizer: dict[str, Any], named: dict[int, str], size: int) -> list[float]:
    """The scores by which llama.cpp joins pieces in the order of a tokenizer's merges: the sooner, the higher.

    >>> piece_scores({"model": {"merges": [["a", "b"], "ab c"]}}, {0: "a", 1: "ab", 2: "abc", 3: "d"}, 4)
    [0.0, -1.0, -2.0, 0.0]
    """
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"])
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(pairs, 1):
        ranks.setdefault("".join(pair), rank)
    return [0.0 - ranks.get(named.get(number, ""), 0) for number in range(size)]
