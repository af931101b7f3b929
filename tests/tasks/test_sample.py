"""The sample is the document's, and no evaluation product is trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.caching.store import publish
from tasks.config import SampleConfig
from tasks.reading.conversations import Conversation, conversation_table
from tasks.refs import Artifact, InputError, Products
from tasks.sample import choose_after, choose_before, equal_rows, normalised, permutation, sample
from tasks.tables.arrow import write_table
from tests.support.prepared import publish_products

Pairs = list[tuple[str, str]]
MANY = [(f"Title {number}", f"Content {number}") for number in range(50)]


def table(rows: Pairs, batch: int = 4) -> pa.Table:
    schema = pa.schema({"title": pa.string(), "content": pa.string()})
    made = [dict(zip(schema.names, row, strict=True)) for row in rows]
    parts = [pa.RecordBatch.from_pylist(made[start : start + batch], schema) for start in range(0, len(made), batch)]
    return pa.Table.from_batches(parts, schema)


def rows_of(artifact: Artifact) -> Pairs:
    return [(row["title"], row["content"]) for row in Dataset.from_file(str(artifact / "products.arrow"))]


def config(**changes: Any) -> SampleConfig:
    return SampleConfig(**({"rows": 10, "eval_rows": 5} | changes))


def refusal(products: Pairs, **changes: Any) -> str:
    with pytest.raises(InputError) as refused:
        sample.fn(Products(data=publish_products(products)), config(**changes))
    return str(refused.value)


@pytest.mark.parametrize("seed", [0, 42, 3407])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_permutation_equals_the_shuffle_of_datasets(rows: int, seed: int) -> None:
    shuffled = Dataset.from_dict({"row": range(rows)}).shuffle(seed=seed)
    assert permutation(rows, seed).tolist() == shuffled["row"][:]


def test_permutation_equals_the_documents(shared: Path) -> None:
    inputs = json.loads((shared / "golden" / "inputs.json").read_text(encoding="utf-8"))
    for seed, digest in inputs["sha256_int64_perm_100000"]["100000"].items():
        assert hashlib.sha256(permutation(100_000, int(seed)).astype("<i8").tobytes()).hexdigest() == digest
    for rows, found in inputs["shuffle_permutations"].items():
        assert {seed: permutation(int(rows), int(seed)).tolist() for seed in found} == found


def test_after_the_documents_selection_come_the_evaluation_rows() -> None:
    document = Dataset.from_dict({"title": [title for title, _ in MANY]}).shuffle(seed=42).select(range(10))
    train, evaluation, _ = choose_after(table(MANY), config(eval_split="after"))
    assert [MANY[row][0] for row in train] == document["title"][:]
    assert evaluation.tolist() == permutation(50, 42)[10:15].tolist()


def test_before_it_the_rest_is_shuffled_anew() -> None:
    train, evaluation, _ = choose_before(table(MANY), config())
    assert evaluation.tolist() == permutation(50, 1)[:5].tolist()
    rest = np.setdiff1d(np.arange(50), evaluation)
    assert train.tolist() == rest[permutation(45, 42)[:10]].tolist()


def test_stage_publishes_both_splits(golden: Callable[[str, str], None]) -> None:
    split = sample.fn(Products(data=publish_products(MANY)), config())
    assert (split.train.rows, split.evaluation.rows) == (10, 5)
    assert split.counts == {"products": 50, "train": 10, "evaluation": 5}
    told = [json.dumps(rows_of(artifact)) for artifact in (split.train, split.evaluation)]
    golden("sample.json", "\n".join(told) + "\n")


def test_batches_of_the_input_do_not_show() -> None:
    for choose, how in ((choose_before, "before"), (choose_after, "after")):
        found = [choose(table(MANY, batch), config(eval_split=how)) for batch in (1, 4, 50)]
        assert all(np.array_equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("split", ["before", "after"])
def test_no_evaluation_rows_are_none(split: str) -> None:
    assert sample.fn(Products(data=publish_products(MANY)), config(eval_rows=0, eval_split=split)).evaluation.rows == 0


SPELLINGS = ("pan", "Pan", " PAN ", "ｐａｎ", "pan lid", "pan\u00a0 lid", "pan\tlid", "straße", "STRASSE", "ﬁn", "fin", "x", "")
TEXTS = st.sampled_from(SPELLINGS)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(TEXTS, TEXTS), min_size=4, max_size=30),
    st.sampled_from(["before", "after"]),
    st.integers(0, 3),
    st.integers(0, 99),
)
def test_no_training_product_equals_one_for_evaluation(rows: Pairs, split: str, eval_rows: int, seed: int) -> None:
    choose = choose_before if split == "before" else choose_after
    try:
        train, evaluation, _ = choose(table(rows), config(rows=2, eval_rows=eval_rows, eval_seed=seed, eval_split=split))
    except InputError:
        return
    texts = [tuple(map(normalised, row)) for row in rows]
    trained, held = ([texts[row] for row in chosen] for chosen in (train, evaluation))
    assert not set(trained) & set(held)
    assert len(set(held)) == len(held) == eval_rows
    assert len(set(train.tolist())) == len(train) == 2
    assert all(all(text) for text in held)


@pytest.mark.parametrize(("split", "left", "held"), [("before", 47, 5), ("after", 50, 2)])
def test_row_that_stands_in_both_sources_is_dropped_from_one_and_counted(split: str, left: int, held: int) -> None:
    others = [(f" TITLE {number}", f"content {number}") for number in range(3)] + [
        ("New", "One"),
        ("new ", "one"),
        ("Newer", "Two"),
    ]
    asked = config(rows=left, eval_rows=held, eval_split=split)
    found = sample.fn(Products(data=publish_products(MANY)), asked, Products(data=publish_products(others)))
    train, evaluation = rows_of(found.train), rows_of(found.evaluation)
    assert (len(train), len(evaluation), found.counts["in both"]) == (left, held, 3)
    assert set(evaluation) <= set(others)
    assert not {tuple(map(normalised, row)) for row in train} & {tuple(map(normalised, row)) for row in evaluation}


def test_held_out_rows_of_another_source_are_drawn_by_their_own_seed() -> None:
    others = [(f"Other {number}", "Said.") for number in range(20)]
    found = sample.fn(Products(data=publish_products(MANY)), config(), Products(data=publish_products(others)))
    assert rows_of(found.evaluation) == [others[row] for row in permutation(20, 1)[:5]]
    assert rows_of(found.train) == [MANY[row] for row in permutation(50, 42)[:10]]


def test_held_out_rows_of_another_kind_are_refused() -> None:
    talk = conversation_table(iter([Conversation("u", "", ["Hi"], ["Ho"])]))
    with publish("products") as draft:
        draft.rows = write_table(draft / "products.arrow", talk.schema, talk.to_batches())
    with pytest.raises(InputError) as refused:
        sample.fn(Products(data=publish_products(MANY)), config(), Products(data=draft.artifact))
    assert str(refused.value) == (
        "sample.eval_sources: got rows with uid, system, prompts, answers; expected uid, title, content, as those of "
        "ingest.sources are read. Name files of the same kind of rows."
    )


@settings(max_examples=40)
@given(*[st.lists(st.tuples(TEXTS, TEXTS), min_size=4, max_size=30)] * 2, st.sampled_from(["before", "after"]), st.integers(0, 3))
def test_no_training_product_equals_one_of_the_other_source(rows: Pairs, others: Pairs, split: str, eval_rows: int) -> None:
    choose = choose_before if split == "before" else choose_after
    try:
        found = choose(table(rows), config(rows=2, eval_rows=eval_rows, eval_split=split), table(others))
    except InputError:
        return
    trained, held = {tuple(map(normalised, rows[row])) for row in found.train}, [others[row] for row in found.evaluation]
    assert not trained & {tuple(map(normalised, row)) for row in held}
    assert len({tuple(map(normalised, row)) for row in held}) == eval_rows


@settings(max_examples=40)
@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=20), st.sets(st.tuples(TEXTS, TEXTS), max_size=3))
def test_equal_rows_are_all_found(rows: Pairs, wanted: set[tuple[str, str]]) -> None:
    texts = {(normalised(title), normalised(content)) for title, content in wanted}
    expected = [row for row, pair in enumerate(rows) if tuple(map(normalised, pair)) in texts]
    assert [row for row, _ in equal_rows(table(rows), texts)] == expected


def test_more_rows_than_there_are_names_both_numbers() -> None:
    assert refusal(MANY, rows=46) == (
        "sample.rows: got 46; expected at most 45 (50 products less 5 for evaluation and their equals). "
        "Lower sample.rows or give more data."
    )
    assert refusal(MANY, rows=51, eval_split="after") == (
        "sample.rows: got 51; expected at most 50 (products). Lower sample.rows or give more data."
    )
    assert refusal(MANY, rows=47, eval_split="after") == (
        "sample.eval_rows: got 5; expected at most 3 (distinct products with a title and a content that training leaves over). "
        "Lower sample.eval_rows or give more data."
    )
