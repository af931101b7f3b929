"""Conversations of any author come to one form; those that nothing can be learnt from are counted, or end the run."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.config import IngestConfig
from tasks.ingest import ingest
from tasks.reading.conversations import FURTHER, NEEDED, Kind, Unfit, read_conversation
from tasks.reading.sources import locate_source
from tasks.refs import InputError, Products
from tasks.tables.arrow import read_table
from tests.support.rows import WRITERS

ASKED, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def run(rows: list[dict[str, Any]], path: Path, name: str = "jsonl", **changes: Any) -> Products:
    WRITERS[name](path / f"rows.{name}", rows)
    config = IngestConfig(sources=(str(path / f"rows.{name}"),), **changes)
    return ingest.fn(locate_source(config.sources), config)


def conversations(products: Products) -> list[tuple[Any, ...]]:
    return [tuple(row.values())[1:] for row in read_table(products.data / "products.arrow").to_pylist()]


LONG = {"messages": [turn("system", "Be brief."), ASKED, SAID, turn("user", "And?"), turn("assistant", "No.")]}
SAME: dict[str, dict[str, Any]] = {
    "messages": {"messages": [ASKED, SAID]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    "completion": {"prompt": "Hi", "completion": "Ho"},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Ho"},
}


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("csv", "tsv")])
def test_every_kind_is_found_by_its_columns_in_every_format(kind: str, name: str, tmp_path: Path) -> None:
    assert conversations(run([SAME[kind]], tmp_path, name)) == [("", ["Hi"], ["Ho"])]


@pytest.mark.parametrize("name", ["csv", "tsv"])
def test_delimited_text_holds_them_as_text_or_as_json(name: str, tmp_path: Path) -> None:
    assert conversations(run([SAME["alpaca"]], tmp_path, name)) == [("", ["Hi"], ["Ho"])]
    rows = [{"messages": json.dumps(LONG["messages"])}]
    assert conversations(run(rows, tmp_path, name)) == [("Be brief.", ["Hi", "And?"], ["Ho", "No."])]


def test_several_turns_and_a_system_text_are_kept(tmp_path: Path) -> None:
    assert conversations(run([LONG], tmp_path)) == [("Be brief.", ["Hi", "And?"], ["Ho", "No."])]
    assert conversations(run([LONG], tmp_path, conversations={"system": "drop"})) == [("", ["Hi", "And?"], ["Ho", "No."])]


def test_completion_may_be_messages(tmp_path: Path) -> None:
    row = {"prompt": [turn("system", "Be brief."), ASKED], "completion": [SAID]}
    assert conversations(run([row], tmp_path)) == [("Be brief.", ["Hi"], ["Ho"])]


def test_text_parts_are_one_text_and_texts_stay_as_they_are(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "&lt;b"}, {"type": "text", "text": ">"}]
    assert conversations(run([{"messages": [turn("user", parts), SAID]}], tmp_path)) == [("", ["&lt;b>"], ["Ho"])]


UNFIT: dict[str, tuple[list[dict[str, Any]], str]] = {
    "role_order": ([SAID, ASKED], "roles assistant, user; expected user and assistant by turns"),
    "unanswered": ([ASKED, SAID, ASKED], "no answer at the end; expected the assistant's turn last"),
    "empty_turn": ([ASKED, turn("assistant", " ")], "an empty turn; expected text in every one"),
    "tool_calls": ([ASKED, SAID | {"tool_calls": [{"id": "1"}]}], "a call of a tool; expected text alone"),
    "images": (
        [turn("user", [{"type": "image_url", "image_url": "x"}]), SAID],
        "a part that is no text, such as an image; expected text alone",
    ),
}


@pytest.mark.parametrize("switch", UNFIT)
def test_what_can_not_be_learnt_is_counted_or_ends_the_run(switch: str, tmp_path: Path) -> None:
    messages, reason = UNFIT[switch]
    rows = [LONG, {"messages": messages}]
    products = run(rows, tmp_path)
    assert (products.data.rows, products.lines, products.dropped) == (1, 2, {switch.replace("_", " "): 1})
    with pytest.raises(InputError) as refused:
        run(rows, tmp_path, conversations={switch: "fail"})
    assert str(refused.value) == (
        f"rows.jsonl line 2: {reason}. Set ingest.conversations.{switch}=drop to leave such rows out, counted."
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": None}, 'missing "messages"; expected messages'),
        ({"messages": "Hi"}, '"messages" is text and no JSON; expected a list of messages'),
        ({"messages": 7}, '"messages" is no list; expected a list of messages'),
        ({"messages": ["Hi"]}, '"messages" holds what is no object; expected messages of role and content'),
        ({"messages": [turn("user", 7.5), turn("assistant", {})]}, '"messages" is an object; expected text'),
    ],
)
def test_row_that_is_no_conversation_is_a_bad_row(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        run([LONG, row], tmp_path)
    assert str(refused.value) == f"rows.jsonl line 2: {reason}. Set ingest.on_bad_row=quarantine to set such rows aside."


def test_repeats_are_dropped_and_names_are_the_content(tmp_path: Path) -> None:
    products = run([LONG, SAME["messages"], LONG], tmp_path)
    assert products.dropped == {"duplicate": 1}
    again = read_table(run([LONG], tmp_path, "parquet").data / "products.arrow")["uid"].to_pylist()
    assert read_table(products.data / "products.arrow")["uid"].to_pylist()[:1] == again


def test_nothing_left_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        run([{"messages": [ASKED]}], tmp_path)
    assert str(refused.value) == "ingest: products: got 0 of 1 lines (1 unanswered); expected at least 1. Check ingest.sources."


def test_kind_that_the_columns_do_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"column 'instruction' is not there: got columns messages; .* ingest.kind=alpaca needs it"
    ):
        run([LONG], tmp_path, kind="alpaca")


TEXTS = st.text(max_size=5) | st.sampled_from(["user", "assistant", "text", "tool"])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.binary(max_size=2)
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "text", "tool"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.sampled_from(sorted(NEEDED)), st.dictionaries(st.sampled_from([*sum(NEEDED.values(), ()), *FURTHER, "uid"]), JSON))
def test_any_row_is_a_conversation_or_says_why_not(kind: Kind, row: dict[str, Any]) -> None:
    with suppress(ValueError):
        found = read_conversation(row, kind, IngestConfig())
        assert isinstance(found, Unfit) or len(found.prompts) == len(found.answers) > 0
