"""A merged prompt means what Unsloth makes of it, and a wrong one is refused by name."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.refs import ConfigError
from tasks.text.merged_prompt import merge_columns, parse_merged_prompt


def merge(merged_prompt: str, title: str | None, content: str | None = "Blue") -> str:
    products = pa.RecordBatch.from_pylist(
        [{"title": title, "content": content}], pa.schema({"title": pa.string(), "content": pa.string()})
    )
    return merge_columns(products, parse_merged_prompt(merged_prompt, ["title", "content"])).to_pylist()[0]


@pytest.mark.parametrize(
    ("merged_prompt", "title", "content", "expected"),
    [
        ("T {title}", "Tutu", "Blue", "T Tutu"),
        ("T {title}", None, "Blue", "T "),
        ("{{lit}} {title}", "Tutu", "Blue", "{lit} Tutu"),
        ("No column at all", "Tutu", "Blue", "No column at all"),
        ("P[[ {title}]]", "", "Blue", "P"),
        ("P[[ {title} {content}]]!", "Tutu", "", "P Tutu !"),
        ("P[[ {title} {content}]]!", "", "Blue", "P!"),
        ("P[[\n{title}\n]]{content}", "Tutu", "Blue", "P\nTutu\nBlue"),
        ("{title}", "{content} [[x]] {{", "Blue", "{content} [[x]] {{"),
    ],
)
def test_fields_braces_and_optional_blocks(merged_prompt: str, title: str | None, content: str, expected: str) -> None:
    assert merge(merged_prompt, title, content) == expected


@pytest.mark.parametrize(
    ("merged_prompt", "message"),
    [
        (
            "{titulo}",
            "sharegpt.merged_prompt: got {titulo}; expected one of {title}, {content}. Double braces that stand for themselves.",
        ),
        (
            "{title!r}",
            "sharegpt.merged_prompt: got {title!r}; expected one of {title}, {content}. Double braces that stand for themselves.",
        ),
        (
            "{title",
            "sharegpt.merged_prompt: got '{title' (expected '}' before end of string); expected paired braces. "
            "Double braces that stand for themselves.",
        ),
        (
            "P[[ no column ]]",
            "sharegpt.merged_prompt: got [[ no column ]]; expected at least one {column} in an optional block. Name the column.",
        ),
    ],
)
def test_a_wrong_prompt_is_refused_with_what_was_expected(merged_prompt: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_merged_prompt(merged_prompt, ["title", "content"])
    assert str(caught.value) == message


@given(title=st.text(), content=st.text(), literal=st.text().filter(lambda text: "[[" not in text and "]]" not in text))
def test_any_text_is_copied_as_str_format_copies_it(title: str, content: str, literal: str) -> None:
    doubled = literal.replace("{", "{{").replace("}", "}}")
    assert merge(doubled + "|{title}|{content}", title, content) == f"{literal}|{title}|{content}"
