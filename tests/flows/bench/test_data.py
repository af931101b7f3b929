"""The generated file has the true shape, and whole processes are measured as they are."""

from __future__ import annotations

import json
import os
import sys
from itertools import chain, islice
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.bench.processes import run_process
from flows.bench.products import product_file, product_lines, table_file
from flows.cli.bench import app
from tasks.config import IngestConfig
from tasks.ingest import ingest
from tasks.reading.sources import locate_source
from tasks.refs import PipelineError
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.heavy

MB = 2**20


@pytest.fixture(scope="module")
def chunk() -> bytes:
    """65,536 rows."""
    return b"".join(product_lines(65_536))


def test_generated_file_has_the_true_shape(chunk: bytes) -> None:
    rows = [json.loads(line) for line in chunk.splitlines()]
    assert len(rows) == 65_536
    assert list(rows[0]) == ["uid", "title", "content", "target_ind", "target_rel"]
    assert len({row["uid"] for row in rows}) == len(rows)
    assert all(len(row["target_ind"]) == len(row["target_rel"]) for row in rows)
    contents = [row["content"] for row in rows if row["content"]]
    assert sum(not row["title"] for row in rows) / len(rows) == pytest.approx(0.056, abs=0.005)
    assert len(contents) / len(rows) == pytest.approx(1 - 0.333, abs=0.01)
    assert sum("&" in text for text in contents) / len(contents) == pytest.approx(0.2, abs=0.01)
    assert max(map(len, contents)) == pytest.approx(197_622, rel=0.1)
    assert sum(map(len, contents)) / len(contents) == pytest.approx(654, rel=0.1)  # of 700 real rows


def test_smaller_file_is_the_beginning_of_a_larger_one(chunk: bytes) -> None:
    assert b"".join(product_lines(1000)) == b"\n".join(chunk.split(b"\n")[:1000]) + b"\n"
    more = b"".join(map(bytes, islice(chain(product_lines(70_000)), 1)))
    assert more == chunk


def test_file_is_made_once(tmp_path: Path) -> None:
    path = product_file(1000, tmp_path)
    before = path.stat()
    assert product_file(1000, tmp_path) == path
    assert path.stat() == before
    assert list(tmp_path.iterdir()) == [path]


def test_cost_is_of_the_whole_process_tree(tmp_path: Path) -> None:
    held = "import time; held = bytearray(b'x') * (100 * 2**20); time.sleep(0.5); print('done')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}], check=True)"
    cost = run_process([sys.executable, "-c", code], tmp_path, os.environ)
    assert cost.output == "done\n"
    assert cost.seconds > 0.5
    assert 100 * MB < cost.peak_anonymous_bytes < 200 * MB
    assert cost.peak_rss_bytes > cost.peak_anonymous_bytes
    assert 0 < cost.cpu_seconds < cost.seconds + 1


def test_failure_shows_the_end_of_the_log(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"exit code 1; expected 0\.\n(.*\n)*.*no such thing"):
        run_process([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path, os.environ)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_other_formats_hold_the_same_texts(ending: str, tmp_path: Path) -> None:
    lines = product_file(1000, tmp_path)
    path = table_file(lines, ending)
    assert table_file(lines, ending) == path
    config = IngestConfig()
    made = {ingest.fn(locate_source((str(file),)), config).data.digest for file in (lines, path)}
    assert len(made) == 1


def test_command_measures_one_turn_and_three(tmp_path: Path, home: Path) -> None:
    tokenizer = make_tiny_model(tmp_path / "model")
    arguments = ["data", "--rows", "5000", "--tokenizer", str(tokenizer), "--json", str(tmp_path / "out" / "found.json")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "rows/s" in done.stdout
    found = json.loads((tmp_path / "out" / "found.json").read_text(encoding="utf-8"))
    assert (found["rows"], found["conversations"], found["ratio"]) == (5000, 2272, {})
    assert [(run["side"], run["turns"]) for run in found["runs"]] == [("ours", 1), ("ours", 3)]
    for measured in found["runs"]:
        assert list(measured["steps"]) == ["digest of the source", "ingest", "sample", "sharegpt", "template", "tokenize"]
        assert 0 < sum(measured["steps"].values()) < measured["seconds"]
        assert measured["peak_anonymous_bytes"] > 10 * MB
    assert found["machine"]["cores"] >= 1
    assert found["versions"]["polars"]
    assert [file.name.split("-")[:2] for file in (home / "bench").iterdir()] == [["trn", "5000"]]
