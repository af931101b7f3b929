"""Files read on their own and joined give what reading them as one gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.pipeline import gather_shards
from flows.running.cluster import CLUSTER, task_runner
from tasks.config import IngestConfig
from tasks.ingest import ingest
from tasks.join import join
from tasks.reading.sources import locate_source
from tasks.refs import ConfigError, InputError, Products, Source
from tests.tasks.test_ingest import BAD, LINES, ROWS, rejects, rows

QUARANTINE = {"on_bad_row": "quarantine", "max_bad_share": 1}


def both(paths: list[Path], **changes: Any) -> tuple[Products, Products]:
    """Read as one, and one by one and then joined."""
    config = IngestConfig(sources=tuple(map(str, paths)), **changes)
    source = locate_source(config.sources)
    parts = [ingest.fn(Source(files=(file,), is_shard=True), config) for file in source.files]
    return ingest.fn(source, config), join.fn(gather_shards(parts), config)


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Two good files that share products, one of rejects alone, one that is empty."""
    contents = [b"\n".join(LINES), b"\n".join([BAD, b"\xff", BAD]), b"", b"\n".join([*LINES[::-1], BAD])]
    paths = [tmp_path / f"{number}.json" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def test_joined_files_equal_one_reading(parts: list[Path]) -> None:
    whole, joined = both(parts, **QUARANTINE)
    assert joined == whole
    assert [row[1:] for row in rows(joined)] == [row[1:] for row in ROWS]
    assert [(entry["file"], entry["line"]) for entry in rejects(joined)] == [
        *(("1.json", line) for line in (1, 2, 3)),
        ("3.json", 7),
    ]


def test_repeats_are_kept_if_so_configured(parts: list[Path]) -> None:
    whole, joined = both(parts, **QUARANTINE, drop_duplicates=False)
    assert joined == whole
    assert joined.data.rows == 6


CONTENTS = st.lists(
    st.lists(st.sampled_from([*LINES, BAD, b'{"title": "a", "content": "b"}']), max_size=9), min_size=2, max_size=4
)


@settings(max_examples=25)
@given(CONTENTS)
def test_joining_is_reading_as_one(contents: list[list[bytes]]) -> None:
    from tasks.refs import home

    home().mkdir(parents=True, exist_ok=True)
    paths = [home() / f"{number}.json" for number in range(len(contents))]
    for path, lines in zip(paths, contents, strict=True):
        path.write_bytes(b"\n".join([LINES[0], *lines]))
    whole, joined = both(paths, **QUARANTINE)
    assert joined == whole


def test_bad_share_is_that_of_all_files(parts: list[Path]) -> None:
    with pytest.raises(InputError) as refused:
        both(parts, on_bad_row="quarantine", max_bad_share=0.2)
    whole = str(refused.value)
    config = IngestConfig(sources=tuple(map(str, parts)), on_bad_row="quarantine", max_bad_share=0.2)
    shards = [ingest.fn(Source(files=(file,), is_shard=True), config) for file in locate_source(config.sources).files]
    with pytest.raises(InputError) as refused:
        join.fn(gather_shards(shards), config)
    assert str(refused.value) == whole
    assert whole.startswith("ingest: bad lines: got 4 of 16; expected at most max_bad_share=20.00%. First: 1.json line 1: ")


def test_nothing_left_in_any_file_fails(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_bytes(LINES[1] + b"\n" + name.encode().join([b'{"uid": "', b'", "title": "t", "content": ""}']))
    config = IngestConfig(sources=(f"{tmp_path}/*.json",))
    shards = [ingest.fn(Source(files=(file,), is_shard=True), config) for file in locate_source(config.sources).files]
    with pytest.raises(InputError) as refused:
        join.fn(gather_shards(shards), config)
    assert str(refused.value) == (
        "ingest: products: got 0 of 4 lines (2 empty content, 2 empty title); expected at least 1. Check ingest.sources."
    )


def test_cluster_without_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CLUSTER, "tcp://nowhere:1")
    monkeypatch.setitem(sys.modules, "prefect_dask.task_runners", None)  # which another test may have imported
    with pytest.raises(ConfigError) as refused:
        task_runner()
    assert str(refused.value) == (
        "AMAZON_FT_DASK: no package for it: got tcp://nowhere:1; expected prefect-dask. Install amazon-ft[dask] or unset it."
    )
