"""Whatever a file holds, every row of it is kept, dropped or rejected, or the file is refused by name."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.config import IngestConfig
from tasks.ingest import ingest
from tasks.reading.sources import locate_source
from tasks.refs import InputError, Products
from tests.support import fuzz
from tests.support.checkout import PROJECT
from tests.support.rows import WRITERS

pytestmark = pytest.mark.heavy

COUNT = 20_000
MAX_MIB = 800
"""Of a process that has read them all, its libraries included."""
FILES = 100
"""Damaged files of a format."""


def run(path: Path, **changes: Any) -> Products:
    config = IngestConfig(sources=(str(path),), on_bad_row="quarantine", max_bad_share=1, **changes)
    return ingest.fn(locate_source(config.sources), config)


def accounted(products: Products) -> int:
    rejected = products.rejects.rows if products.rejects else 0
    return products.data.rows + rejected + sum(products.dropped.values())


def _messages_table(path: Path) -> Path:
    pq.write_table(pa.table({"messages": list(fuzz.odd_conversations(COUNT, seed=7))}), path)
    return path


def _bytes_table(name: str, path: Path) -> Path:
    return WRITERS[name](path, list(fuzz.byte_rows(COUNT, seed=6)))


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


MUTATED: dict[str, Callable[[Path], Path]] = {
    "rows.jsonl": lambda path: _written(path, b"\n".join(fuzz.mutated_lines(COUNT, seed=6)).replace(b"\n\n", b"\n \n")),
    "rows.json": lambda path: _written(path, json.dumps(list(fuzz.odd_rows(COUNT, seed=6))).encode()),
    "rows.csv": lambda path: _written(path, fuzz.delimited_corpus(COUNT, seed=6)[0]),
    "rows.tsv": lambda path: _written(path, fuzz.delimited_corpus(COUNT, seed=6, delimiter=b"\t")[0]),
    **{f"rows.{name}": partial(_bytes_table, name) for name in ("parquet", "arrow", "arrows", "datasets")},
    "messages.jsonl": lambda path: _written(
        path, "".join(f'{{"messages": {text}}}\n' for text in fuzz.odd_conversations(COUNT, seed=7)).encode()
    ),
    "messages.parquet": _messages_table,
}
"""{file: writes mutated rows to it}."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of the rows of each file, read in one process."""
    folder = tmp_path_factory.mktemp("mutated")
    files = [write(folder / name) for name, write in MUTATED.items()]
    env = os.environ | {"AMAZON_FT_HOME": str(folder / "home"), "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.read_files", *files], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(MUTATED, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("file", MUTATED)
def test_mutated_rows_are_all_accounted_for_in_bounded_memory(file: str, told: dict[str, dict[str, Any]]) -> None:
    found = told[file]
    assert found["kept"] + found["rejected"] + sum(found["dropped"].values()) == found["read"]
    assert found["read"] == COUNT
    assert min(found["kept"], found["rejected"]) > COUNT / 50
    assert found["peak_mib"] < MAX_MIB


@pytest.mark.parametrize("block_bytes", [2**16, 2**22])
def test_delimited_rows_are_all_accounted_for(tmp_path: Path, block_bytes: int) -> None:
    data, count = fuzz.delimited_corpus(COUNT, seed=3)
    (tmp_path / "rows.csv").write_bytes(data)
    products = run(tmp_path / "rows.csv", block_bytes=block_bytes)
    assert accounted(products) == products.lines == count
    assert products.data.rows > COUNT / 10
    assert products.rejects is not None
    assert products.rejects.rows > COUNT / 20


def test_rows_of_an_array_are_all_accounted_for_as_those_of_lines(tmp_path: Path) -> None:
    rows = list(fuzz.odd_rows(COUNT, seed=4))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    array, lines = run(tmp_path / "rows.json"), run(tmp_path / "rows.jsonl")
    assert accounted(array) == array.lines == COUNT
    assert array.data == lines.data
    assert (array.dropped, array.rejects and array.rejects.rows) == (lines.dropped, lines.rejects and lines.rejects.rows)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "datasets"])
def test_damaged_file_is_read_or_refused_by_name(tmp_path: Path, name: str) -> None:
    rng = random.Random(5)
    rows = [{"uid": str(row), "title": f"Pan {row}", "content": rng.choice(fuzz.WORDS) + "Iron."} for row in range(200)]
    data, refused = WRITERS[name](tmp_path / f"rows.{name}", rows).read_bytes(), 0
    for number in range(FILES):
        path = tmp_path / f"{number}.{name}"
        path.write_bytes(fuzz.damaged(data, rng))
        try:
            products = run(path)
            assert accounted(products) == products.lines
        except InputError:
            refused += 1
        path.unlink()
    assert refused < FILES
