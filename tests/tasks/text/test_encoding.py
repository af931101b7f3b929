"""Ids travel unchanged, and a tokenizer's directory that can't be used is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE, WordLevel

from tasks.reading.model_files import directory_tokenizer
from tasks.refs import InputError
from tasks.text import encoding
from tasks.text.encoding import (
    BatchEncoder,
    from_ids,
    load_ahead,
    load_tokenizer_json,
    special_id,
    take_tokenizer,
    token_bytes,
)
from tests.support.prepared import id_rows
from tests.support.tiny import BOS, EOS, make_tiny_model, make_tiny_tokenizer

TEXTS = ["Chaleira elétrica", "", f"ends {EOS} {BOS}", "茶 ☕\n\n"]


@given(rows=st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=8), start=st.integers(0, 8))
def test_ids_survive_the_way_through_arrow_whole_and_sliced(rows: list[list[int]], start: int) -> None:
    flat = np.array([number for row in rows for number in row], np.int32)
    column = from_ids(flat, np.cumsum([0, *map(len, rows)])).slice(start)
    assert id_rows(column) == rows[start:]


def test_a_saved_tokenizer_is_loaded_without_its_truncation_and_padding(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = load_tokenizer_json(tmp_path).encode("x" * 20, add_special_tokens=False).ids
    assert len(ids) == 20


def test_a_tokenizer_that_was_loaded_before_its_turn_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_model(tmp_path)
    named = directory_tokenizer(tmp_path)
    load_ahead(named)
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "load_tokenizer_json", lambda _: pytest.fail("was loaded again"))
        first = take_tokenizer(named)
    assert take_tokenizer(named) is not first


def test_what_can_not_be_loaded_is_told_when_its_turn_comes(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    named = directory_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    load_ahead(named)
    with pytest.raises(InputError, match="expected a file of the tokenizers library"):
        take_tokenizer(named)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_tokenizer_json(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: tokenizer.json: got No such file or directory (os error 2); expected a file of the tokenizers library. "
        "Name a model directory that has one in model.id."
    )


def test_an_eos_that_the_tokenizer_lacks_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        special_id(make_tiny_tokenizer(), "</s>")
    assert str(caught.value) == (
        "tokenizer.json: special token: got none for '</s>'; expected it among the added tokens. "
        "Name a model directory whose tokenizer_config.json and tokenizer.json fit each other."
    )


@pytest.mark.parametrize("plain", [False, True])
def test_special_tokens_in_texts_are_tokens_or_plain_text(plain: bool) -> None:
    backend = make_tiny_tokenizer()
    rows = id_rows(BatchEncoder(backend, plain=plain).encode(pa.array(TEXTS)))
    assert [backend.decode(row, skip_special_tokens=False) for row in rows] == TEXTS
    assert ({0, 1} & {number for row in rows for number in row} == set()) == plain
    assert not backend.encode_special_tokens, "the setting is undone"


def test_token_bytes_add_up_to_the_text() -> None:
    backend = make_tiny_tokenizer()
    sizes = token_bytes(backend)
    assert sizes is not None
    for text in TEXTS:
        assert sizes[backend.encode(text, add_special_tokens=False).ids].sum() == len(text.encode())


def test_a_vocabulary_of_words_or_without_some_bytes_has_no_token_bytes() -> None:
    assert token_bytes(Tokenizer(WordLevel({"a": 0}, unk_token="a"))) is None
    partial = Tokenizer(BPE({"a": 0, "b": 1}, []))
    partial.decoder = ByteLevel()
    assert token_bytes(partial) is None
