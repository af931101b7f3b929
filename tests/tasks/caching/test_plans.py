"""What differs between two calls of a stage is said in words."""

from __future__ import annotations

from typing import Any

from tasks.caching.identity import canonical
from tasks.caching.plans import GivenInputs, changes, sizes
from tasks.refs import Artifact, Source, SourceFile


def given(**inputs: Any) -> GivenInputs:
    return GivenInputs(canonical(inputs), sizes("", inputs))


def source(*names: str, size: int = 1000, digest: str = "a") -> Source:
    return Source(files=tuple(SourceFile(url=f"/data/{name}", digest=digest * 64, size_bytes=size) for name in names))


def test_a_changed_file_is_named_with_its_growth() -> None:
    before = given(source=source("trn.json"))
    assert changes(before, given(source=source("trn.json", size=31_000, digest="b"))) == [
        "source trn.json changed (30,000 bytes more)"
    ]
    assert changes(before, given(source=source("trn.json", size=998, digest="b"))) == ["source trn.json changed (2 bytes fewer)"]


def test_another_number_of_files_or_parts_is_told_as_such() -> None:
    assert changes(given(source=source("a")), given(source=source("a", "b"))) == ["source.files: 2 instead of 1"]
    one, other = (Artifact(kind="products", digest=digit * 64) for digit in "ab")
    assert changes(given(data=(one,)), given(data=(one, other))) == ["data: 2 instead of 1"]


def test_settings_are_told_with_both_values() -> None:
    assert changes(given(questions=("a",), seed=1), given(questions=("a", "b"), seed=2)) == [
        'questions ["a"] -> ["a", "b"]',
        "seed 1 -> 2",
    ]


def test_a_call_that_an_earlier_release_recorded_is_compared_without_sizes() -> None:
    before = GivenInputs(canonical({"source": source("trn.json")}), {})
    assert changes(before, given(source=source("trn.json", digest="b"))) == ["source trn.json changed"]
