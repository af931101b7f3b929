"""Conversations equal Unsloth's to the byte, whatever the products hold and however they lie in batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.config import SharegptConfig
from tasks.refs import ConfigError
from tasks.sharegpt import sharegpt, turn_products
from tests.support.prepared import converse, golden_products, lines, rows_of, split_products

ROLES = {"human": "user", "gpt": "assistant"}


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("turns", [1, 3])
def test_conversations_equal_their_golden_file(golden: Callable[[str, str], None], turns: int) -> None:
    golden(f"sharegpt_ext{turns}.json", lines(rows_of(converse(golden_products(), turns).train)))


@pytest.mark.parametrize("turns", [1, 3])
def test_conversations_equal_unsloths(shared: Path, turns: int) -> None:
    theirs = load(shared / "golden" / f"sharegpt_ext{turns}.json")
    inputs = load(shared / "golden" / "inputs.json")
    products = [(row["title"], row["content"]) for row in inputs["rows"]]
    ours = rows_of(converse(products, turns, merged_prompt=inputs["merged_prompt"]).train)
    assert [{"conversations": row["conversations"]} for row in ours] == theirs["standardized"]
    renamed = [
        [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]] for row in theirs["rows"]
    ]
    assert [row["conversations"] for row in ours] == renamed


def test_further_turns_follow_the_documents_permutations(shared: Path) -> None:
    inputs = load(shared / "golden" / "inputs.json")
    for rows, permutations in inputs["shuffle_permutations"].items():
        turns = turn_products(int(rows), extension=3, seed=3407)
        assert turns[:, 0].tolist() == list(range(int(rows)))
        assert [turns[:, 1].tolist(), turns[:, 2].tolist()] == [permutations["3408"], permutations["3409"]]
    turns = turn_products(100_000, extension=3, seed=3407).astype("<i8")
    digests = inputs["sha256_int64_perm_100000"]["100000"]
    assert [hashlib.sha256(turns[:, turn].tobytes()).hexdigest() for turn in (1, 2)] == [digests["3408"], digests["3409"]]


def test_upstreams_edge_cases_come_out_as_they_do_there(shared: Path) -> None:
    theirs = load(shared / "golden" / "edge_cases.json")["results"]
    rows = [("Girls Ballet Tutu Neon Pink", "High quality 3 layer ballet tutu. 12 inches in length")]
    (row,) = rows_of(converse(rows, merged_prompt="{{lit}} {title}").train)
    assert f"{row['conversations'][0]['content']!r}" in theirs["to_sharegpt_braced_literal"]
    with pytest.raises(ConfigError, match=r"got \{titulo\}"):
        converse(rows, merged_prompt="{titulo}")
    assert "KeyError" in theirs["to_sharegpt_missing_col"]


def test_the_stage_splits_turns_from_conversations_and_counts_both() -> None:
    split = split_products([(f"T{number}", f"C{number}") for number in range(7)], evaluation=[("E0", "F0"), ("E1", "F1")])
    inputs = {"split": split, "config": SharegptConfig(merged_prompt="{title}?", conversation_extension=2)}
    made = sharegpt.execute(inputs)
    assert made.counts == {"train": 7, "evaluation": 2}
    assert [made.train.rows, made.evaluation.rows] == [7, 2]
    assert rows_of(made.train, "turns")[3] == {"uid": "u3", "prompt": "T3?", "answer": "C3"}
    for number, row in enumerate(rows_of(made.train)):
        assert row["products"][0] == number
        assert row["uids"] == [f"u{product}" for product in row["products"]]
        assert row["conversations"] == [
            turn
            for product in row["products"]
            for turn in ({"role": "user", "content": f"T{product}?"}, {"role": "assistant", "content": f"C{product}"})
        ]
    assert [len(row["conversations"]) for row in rows_of(made.evaluation)] == [2, 2], "evaluation rows have a single turn"
    assert sharegpt.execute(inputs) == made


def test_the_answer_comes_from_the_column_that_is_named() -> None:
    (row,) = rows_of(converse([("Tutu", "Blue")], merged_prompt="{content}", output_column="title").train)
    assert [turn["content"] for turn in row["conversations"]] == ["Blue", "Tutu"]


@given(rows=st.integers(1, 200), extension=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_every_turn_is_a_permutation_of_the_products(rows: int, extension: int, seed: int) -> None:
    turns = turn_products(rows, extension=extension, seed=seed)
    assert turns.shape == (rows, extension)
    assert (np.sort(turns, axis=0) == np.arange(rows)[:, None]).all()
