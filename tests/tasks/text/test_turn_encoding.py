"""Conversations joined from turns equal the whole text's ids, and exactly the answers are learnt."""

from __future__ import annotations

import html
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tasks.config import CHAT_TEMPLATE, QUESTIONS, TemplateConfig
from tasks.refs import InputError, Special
from tasks.template import describe_template, join_turns, render_turns
from tasks.text.chat_template import parse_template
from tasks.text.encoding import BatchEncoder, Encoded, load_tokenizer_json
from tasks.text.turn_encoding import TurnEncoder, choose_encoder, encode_whole, refuse_specials, without_specials
from tasks.text.turns import find_cut, find_shape
from tests.support.prepared import SPECIAL, golden_products, id_rows
from tests.support.tiny import BOS, CORPUS, EOS, make_tiny_tokenizer

MERGING = "Answer.\n\nT: {INPUT}\n\nT: cor{OUTPUT}"
"""Its last word grows together with the answer's first."""
Turn = tuple[str, str, str]


def described(text: str = CHAT_TEMPLATE, special: Special = SPECIAL) -> dict[str, Any]:
    return describe_template(parse_template(text, special), special, TemplateConfig(chat_template=text))


def batch_of(turns: list[Turn]) -> pa.RecordBatch:
    """turns.arrow of (prompt, question, answer)."""
    columns = [[f"u{number}" for number in range(len(turns))], *map(list, zip(*turns, strict=True))]
    return pa.RecordBatch.from_arrays(
        [pa.array(column, pa.string()) for column in columns], ["uid", "prompt", "question", "answer"]
    )


def turns_of(products: list[tuple[str, str]]) -> list[Turn]:
    return [(title, QUESTIONS[number % len(QUESTIONS)], content) for number, (title, content) in enumerate(products)]


def merging_tokenizer() -> Tokenizer:
    """A byte-level BPE that knows the template's `cor` and an answer's `azul` as one word."""
    backend = make_tiny_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS, *["T: corazul claro"] * 50], trainer)
    return backend


def digits_tokenizer() -> Tokenizer:
    """As SmolLM2's: each digit is a word."""
    backend = make_tiny_tokenizer()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return backend


def sentencepiece_like(*, metaspace: bool) -> Tokenizer:
    """A BPE with byte fallback, not byte-level: as Llama 2's, a segment at a time, or with Metaspace, a word at a time."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    byte_tokens = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", BOS, EOS, *byte_tokens], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def by_turns(backend: Tokenizer, turns: list[Turn], width: int, template: dict[str, Any], *, plain: bool = False) -> Encoded:
    """Encoded by the fast way, which must be available."""
    encoder = choose_encoder(backend, batch_of(turns), width, template, plain=plain)
    assert encoder is not None
    return encoder.join(encoder.encode(batch_of(turns)), width)


def texts_of(turns: list[Turn], width: int, template: dict[str, Any]) -> list[str]:
    """What the template stage makes of the turns."""
    return join_turns(render_turns(batch_of(turns), template), width, template).to_pylist()


def whole_ids(backend: Tokenizer, turns: list[Turn], width: int, template: dict[str, Any]) -> list[list[int]]:
    return [backend.encode(text, add_special_tokens=False).ids for text in texts_of(turns, width, template)]


def learnt_texts(backend: Tokenizer, encoded: Encoded) -> list[list[str]]:
    """For each conversation, the text of each run of learnt tokens."""
    found: list[list[str]] = []
    start = 0
    for ids in id_rows(encoded.ids):
        learnt = np.concatenate([[False], encoded.learnt[start : start + len(ids)], [False]])
        edges = np.flatnonzero(np.diff(learnt)).reshape(-1, 2)
        found.append([backend.decode(ids[begin:end], skip_special_tokens=False) for begin, end in edges])
        start += len(ids)
    return found


@pytest.mark.parametrize("width", [1, 2, 5])
def test_ids_equal_the_whole_text_and_the_answers_alone_are_learnt(width: int) -> None:
    backend, template, turns = make_tiny_tokenizer(), described(), turns_of(golden_products())
    turns = [turn for turn in turns if EOS not in "".join(turn)] + [("Tutu", "What?", "Blue")]
    encoded = by_turns(backend, turns, width, template)
    assert id_rows(encoded.ids) == whole_ids(backend, turns, width, template)
    answers = [answer + EOS for _, _, answer in turns]
    assert learnt_texts(backend, encoded) == [answers[start : start + width] for start in range(0, len(turns), width)]


@pytest.mark.parametrize(
    "template",
    [
        "Be kind.\n\n# T:\n{INPUT}\n\n# A:\n{OUTPUT}",
        "Be kind. Q: {INPUT} A: {OUTPUT} Q: {INPUT} A: {OUTPUT}",
        "{INPUT} => {OUTPUT}\n{INPUT} => {OUTPUT}\n",
        f"Hi\n# Q {{INPUT}}{EOS}\n# A {{OUTPUT}}{EOS}",
        "Hi\n# Q {question} {INPUT}\n# A {OUTPUT}  ",
        MERGING,
    ],
)
@pytest.mark.parametrize("special", [SPECIAL, Special(bos=None, eos=EOS)], ids=["bos", "no bos"])
@pytest.mark.parametrize("make", [make_tiny_tokenizer, merging_tokenizer, digits_tokenizer])
def test_other_templates_give_the_whole_texts_ids(template: str, special: Special, make: Any) -> None:
    backend, about, turns = make(), described(template, special), turns_of(golden_products())
    encoder = choose_encoder(backend, batch_of(turns), 2, about, plain=False)
    encoded = encode_whole(backend, batch_of(turns), 2, about) if encoder is None else by_turns(backend, turns, 2, about)
    assert id_rows(encoded.ids) == whole_ids(backend, turns, 2, about)
    if template != "Be kind. Q: {INPUT} A: {OUTPUT} Q: {INPUT} A: {OUTPUT}":
        assert encoder is not None, "a template whose turns stand on their own takes the fast way"


def test_a_token_that_merges_the_templates_end_with_the_answer_is_learnt() -> None:
    backend, template = merging_tokenizer(), described(MERGING)
    turns = [("Caneca", "", "azul claro"), ("Prato", "", "preto")]
    assert "Ġcorazul" in backend.get_vocab()
    for encoded in (by_turns(backend, turns, 1, template), encode_whole(backend, batch_of(turns), 1, template)):
        assert learnt_texts(backend, encoded) == [[" corazul claro" + EOS], ["preto" + EOS]]


@pytest.mark.parametrize("metaspace", [True, False])
def test_a_tokenizer_that_is_not_byte_level_learns_the_answers_too(metaspace: bool) -> None:
    backend, template = sentencepiece_like(metaspace=metaspace), described()
    turns = [("Chaleira de aço", QUESTIONS[0], "Feita de aço 茶, marca Aurora."), ("Tutu", QUESTIONS[1], " preta")]
    encoder = choose_encoder(backend, batch_of(turns), 2, template, plain=False)
    assert (encoder is not None) == metaspace, "where segments are not split to words, whole texts are encoded"
    encoded = encode_whole(backend, batch_of(turns), 2, template) if encoder is None else by_turns(backend, turns, 2, template)
    assert id_rows(encoded.ids) == whole_ids(backend, turns, 2, template)
    (learnt,) = learnt_texts(backend, encoded)
    assert learnt[0].endswith(f"\nFeita de aço 茶, marca Aurora.{EOS}"), "its first token reaches back into the template"
    assert learnt[1].endswith(f" preta{EOS}")


def test_special_tokens_in_products_are_characters_or_tokens() -> None:
    backend, template = make_tiny_tokenizer(), described()
    turns = [(f"Before {EOS} after", QUESTIONS[0], f"Ends with {BOS}{EOS}")]
    (plain,) = id_rows(by_turns(backend, turns, 1, template, plain=False).ids)
    assert (plain.count(0), plain.count(1)) == (2, 3)
    encoder = choose_encoder(backend, without_specials(backend, batch_of(turns)), 1, template, plain=True)
    assert encoder is not None
    encoded = encoder.join(encoder.encode(batch_of(turns)), 1)
    (ids,) = id_rows(encoded.ids)
    assert (ids.count(0), ids.count(1)) == (1, 1), "one BOS in front, one EOS behind the answer"
    assert backend.decode(ids, skip_special_tokens=False) == texts_of(turns, 1, template)[0]
    assert learnt_texts(backend, encoded) == [[turns[0][2] + EOS]]


def test_whole_texts_refuse_special_tokens_that_should_be_characters() -> None:
    backend = make_tiny_tokenizer()
    refuse_specials(backend, batch_of([("a", "b", "c")]))
    with pytest.raises(InputError) as caught:
        refuse_specials(backend, batch_of([("a", "b", "c"), ("a", "b", f"x{EOS}")]))
    assert str(caught.value) == (
        "product u1: special token in its text: this tokenizer can't take it for plain text. "
        "Set tokenize.special_tokens_in_products=control to let it be the token, or remove the product."
    )


def test_the_cut_lies_where_neither_side_reaches_over() -> None:
    backend = make_tiny_tokenizer()
    assert find_cut(backend, BOS, "", "\n\n# T:\n") == 0, "after a special token everything stands alone"
    assert find_cut(backend, "x", "", f"y{EOS}z") == 1 + len(EOS)
    cut = find_cut(backend, BOS + "Answer.", "", "\n\n# T:\n")
    assert cut is not None
    assert find_cut(merging_tokenizer(), "T: cor", "", "azul") is None, "one token on both sides can't be cut"


def test_a_template_without_a_safe_cut_has_no_shape() -> None:
    template = {**described(), "preamble": "T: cor", "before_prompt": "azul"}
    assert find_shape(merging_tokenizer(), template) is None
    assert choose_encoder(merging_tokenizer(), batch_of([("a", "b", "c")]), 1, template, plain=False) is None


def test_a_fast_encoder_with_other_ids_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, turns = make_tiny_tokenizer(), batch_of([("Caneca corazul", "", "Blue")])
    monkeypatch.setattr("tasks.text.turn_encoding.make_encoder", lambda _, plain: BatchEncoder(merging_tokenizer(), plain=plain))
    encoder = choose_encoder(backend, turns, 1, described(), plain=False)
    assert encoder is not None
    assert encoder.join(encoder.encode(turns), 1).ids.equals(encode_whole(backend, turns, 1, described()).ids)


def test_an_eos_that_eats_the_space_behind_it_leaves_no_fast_way() -> None:
    backend = make_tiny_tokenizer()
    backend.add_special_tokens([AddedToken(EOS, rstrip=True, normalized=False, special=True)])
    turns = batch_of([("Tutu", "What?", "Blue"), ("Mug", "What?", "Red")])
    assert choose_encoder(backend, turns, 2, described(), plain=False) is None


def test_real_products_with_llama3(shared: Path, llama3: Path) -> None:
    backend, template = load_tokenizer_json(llama3), described()
    with (shared / "data" / "products_700.jsonl").open(encoding="utf-8") as file:
        products = [json.loads(line) for line in file]
    turns = turns_of([(product["title"] or "", html.unescape(product["content"] or "")) for product in products])[:699]
    encoded = by_turns(backend, turns, 3, template)
    assert id_rows(encoded.ids) == whole_ids(backend, turns, 3, template)
    answers = [answer + EOS for _, _, answer in turns]
    assert learnt_texts(backend, encoded) == [answers[start : start + 3] for start in range(0, len(turns), 3)]


@cache
def _llama_like() -> tuple[Tokenizer, dict[str, Any], TurnEncoder]:
    backend, template = make_tiny_tokenizer(), described()
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    encoder = choose_encoder(backend, batch_of(turns_of(golden_products())), 1, template, plain=False)
    assert encoder is not None
    return backend, template, encoder


words = st.text() | st.text("ab '\n\t 19.#é")


@given(turns=st.lists(st.tuples(words, words, words), min_size=1, max_size=4))
def test_any_conversation_equals_its_whole_text(turns: list[Turn]) -> None:
    backend, template, encoder = _llama_like()
    encoded = encoder.join(encoder.encode(batch_of(turns)), len(turns))
    assert id_rows(encoded.ids) == whole_ids(backend, turns, len(turns), template)
    assert learnt_texts(backend, encoded) == [[answer + EOS for _, _, answer in turns]]
    whole = encode_whole(backend, batch_of(turns), len(turns), template)
    assert np.array_equal(encoded.learnt, whole.learnt)
