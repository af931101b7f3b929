"""Encoding each distinct word once gives the tokenizer's own ids, on real products and on text made to break it."""

from __future__ import annotations

import html
import json
import random
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from tasks.text.encoding import BatchEncoder, load_tokenizer_json
from tasks.text.word_encoding import RUNS, WordEncoder, make_encoder
from tests.support.prepared import id_rows
from tests.support.tiny import EOS, make_tiny_tokenizer

FRAGMENTS = (
    *("don't", "I'LL", "we've", "'s", "'S", "ſ", "'ſ", "ﬁ", "ß", "İ", "ı", "K", "e\u0301", "Ação", "é", "a", "B", " word"),
    *(
        "\r\n",
        "\n\n\n",
        " \n ",
        "\t\t",
        "  ",
        " " * 9,
        "\u3000",
        "\u00a0",
        "\u2028",
        "\u200b",
        "\x85",
        "\x1c",
        "\ue000",
        "\ufeff",
    ),
    *("1234567", "12 3", "٣٤", "½", "Ⅷ", "---", "...", " (", ")!", "&amp;", "</s>", "<|end_of_text|>", "👩‍👩‍👧"),
)


@cache
def characters() -> list[list[str]]:
    """All characters of each Unicode category, without surrogates."""
    by_category = defaultdict[str, list[str]](list)
    for point in range(sys.maxunicode + 1):
        by_category[unicodedata.category(chr(point))].append(chr(point))
    return [by_category[name] for name in sorted(by_category) if name != "Cs"]


def fuzz_texts(count: int, seed: int) -> list[str]:
    """Texts of words, white space, digits, contractions and characters of every category."""
    draw = random.Random(seed)

    def piece() -> str:
        match draw.randrange(6):
            case 0:
                return draw.choice(draw.choice(characters()))
            case 1:
                return draw.choice(" \t\n\r\u00a0") * draw.randint(1, 12)
            case 2:
                return str(draw.randrange(10 ** draw.randint(1, 12)))
            case 3:
                return "".join(draw.choices("abcdefgxyzABCàéçõ'", k=draw.randint(1, 8)))
            case _:
                return draw.choice(FRAGMENTS)

    return ["".join(piece() for _ in range(draw.randint(0, 12))) for _ in range(count)]


def assert_same_ids(backend: Tokenizer, texts: list[str], *, plain: bool = False) -> None:
    """The fast encoder, met twice by each word, against the tokenizer's own `encode`."""
    encoder = make_encoder(backend, plain=plain)
    assert type(encoder) is WordEncoder
    backend.encode_special_tokens = plain
    theirs = [row.ids for row in backend.encode_batch(texts, add_special_tokens=False)]
    backend.encode_special_tokens = False
    for _ in range(2):
        assert id_rows(encoder.encode(pa.array(texts, pa.string()))) == theirs


def tiny_with(pattern: str) -> Tokenizer:
    """The tiny tokenizer with a splitting pattern as Llama 3's file writes it."""
    backend = make_tiny_tokenizer()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return backend


@pytest.mark.parametrize("pattern", [*RUNS, None], ids=["llama3", "qwen2", "gpt2", "byte-level"])
@pytest.mark.parametrize("plain", [False, True])
def test_ids_equal_the_tokenizers_on_fuzzed_text(pattern: str | None, plain: bool) -> None:
    assert_same_ids(
        tiny_with(pattern) if pattern else make_tiny_tokenizer(), fuzz_texts(1500, seed=len(pattern or "")), plain=plain
    )


def test_llama3_ids_equal_the_tokenizers_on_real_products(shared: Path, llama3: Path) -> None:
    with (shared / "data" / "products_700.jsonl").open(encoding="utf-8") as file:
        products = [json.loads(line) for line in file]
    texts = [product[name] or "" for product in products for name in ("title", "content")]
    assert len(products) == 700
    assert_same_ids(load_tokenizer_json(llama3), [*texts, *map(html.unescape, texts)])


@pytest.mark.parametrize("plain", [False, True])
def test_llama3_ids_equal_the_tokenizers_on_fuzzed_text(llama3: Path, plain: bool) -> None:
    assert_same_ids(load_tokenizer_json(llama3), fuzz_texts(6000, seed=3), plain=plain)


@given(st.lists(st.text() | st.text("ab '\n\r\t 19.-é"), min_size=1, max_size=6))
def test_any_text_gets_the_tokenizers_ids(texts: list[str]) -> None:
    encoder, backend = _known()
    theirs = [row.ids for row in backend.encode_batch(texts, add_special_tokens=False)]
    assert id_rows(encoder.encode(pa.array(texts))) == theirs


@cache
def _known() -> tuple[BatchEncoder, Tokenizer]:
    backend = tiny_with(next(iter(RUNS)))
    return make_encoder(backend, plain=False), backend


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: setattr(backend, "normalizer", normalizers.NFC()),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Split(Regex(r"\d"), "isolated")),
        lambda backend: setattr(backend.model, "dropout", 0.5),
        lambda backend: setattr(backend, "decoder", decoders.Fuse()),
    ],
    ids=["normalizer", "prefix space", "other splitter", "other pattern", "dropout", "decoder"],
)
def test_a_tokenizer_that_does_more_encodes_with_its_own_loop(change: Callable[[Tokenizer], None]) -> None:
    backend = make_tiny_tokenizer()
    change(backend)
    assert type(make_encoder(backend, plain=False)) is BatchEncoder


def test_added_tokens_in_products_are_found_wherever_they_stand() -> None:
    backend = make_tiny_tokenizer()
    backend.add_tokens([AddedToken("Aurora", normalized=False)])
    assert_same_ids(backend, ["AuroraAurora", "xAurora y", f"a{EOS}b", EOS, ""])
    assert_same_ids(backend, ["AuroraAurora", "xAurora y", f"a{EOS}b", EOS, ""], plain=True)


def test_an_empty_column_has_no_ids() -> None:
    assert len(make_encoder(make_tiny_tokenizer(), plain=False).encode(pa.array([], pa.string()))) == 0


def test_a_text_is_split_into_its_words() -> None:
    encoder = make_encoder(make_tiny_tokenizer(), plain=False)
    assert isinstance(encoder, WordEncoder)
    words = encoder.split(pl.Series(["a  b", "", "don't 12"]))
    assert words.to_list() == [["a", " ", " b"], [], ["don", "'t", " 12"]]


def test_a_full_dictionary_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.text.word_encoding.MAX_WORDS", 50)
    backend = make_tiny_tokenizer()
    encoder = make_encoder(backend, plain=False)
    for start in range(0, 200, 20):
        texts = [f"word{number} {number * 7919} shared" for number in range(start, start + 20)]
        assert id_rows(encoder.encode(pa.array(texts))) == [
            row.ids for row in backend.encode_batch(texts, add_special_tokens=False)
        ]
        assert isinstance(encoder, WordEncoder)
        assert len(encoder._words._met) <= 50
        assert len(encoder._pieces._met) <= 50


def test_texts_encoded_by_several_threads_keep_their_ids() -> None:
    backend = make_tiny_tokenizer()
    encoder = make_encoder(backend, plain=True)
    batches = [fuzz_texts(50, seed) for seed in range(24)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda texts: id_rows(encoder.encode(pa.array(texts))), batches))
    backend.encode_special_tokens = True
    assert made == [[row.ids for row in backend.encode_batch(texts, add_special_tokens=False)] for texts in batches]
