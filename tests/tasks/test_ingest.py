"""Every line is kept, dropped for a counted reason, or rejected; whatever the file, however it is wrapped and cut."""

from __future__ import annotations

import gzip
import json
import logging
import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.bench.products import product_lines
from tasks.config import IngestConfig
from tasks.ingest import ingest
from tasks.reading.sources import locate_source
from tasks.refs import InputError, Products
from tests.support import fuzz, reference

pytestmark = pytest.mark.heavy

LINES = [
    b'{"uid": "1", "title": "R&amp;D", "content": "Cast iron."}',
    b'{"uid": "2", "title": "", "content": "No title."}',
    b'{"uid": "3", "title": "No content", "content": " "}',
    b'{"uid": "4", "title": "R&#38;D", "content": "Cast iron."}',
    b"",
    b'{"uid": "5", "title": "Lid", "content": "\x93Oak\x94"}'.decode("latin-1").encode(),
]
ROWS = [("1", "R&D", "Cast iron."), ("5", "Lid", "“Oak”")]
BAD = b'{"uid": "6", "title": "Cut off", "con'


def run(*sources: Path | str, **changes: Any) -> Products:
    config = IngestConfig(sources=tuple(map(str, sources)), block_bytes=2**16, **changes)
    return ingest.fn(locate_source(config.sources), config)


def rows(products: Products) -> list[tuple[str, str, str]]:
    data = Dataset.from_file(str(products.data / "products.arrow"))
    assert data.column_names == ["uid", "title", "content"]
    return list(zip(*(data[name][:] for name in data.column_names), strict=True))


def rejects(products: Products) -> list[dict[str, Any]]:
    assert products.rejects is not None
    return [json.loads(line) for line in (products.rejects / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


def refusal(*sources: Path | str, **changes: Any) -> str:
    with pytest.raises(InputError) as refused:
        run(*sources, **changes)
    return str(refused.value)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "trn.json"
    path.write_bytes(b"\n".join(LINES) + b"\n")
    return path


def test_lines_become_clean_distinct_products(source: Path) -> None:
    products = run(source)
    assert rows(products) == ROWS
    assert products.data.rows == 2
    assert products.lines == 6
    assert products.dropped == {"blank line": 1, "duplicate": 1, "empty content": 1, "empty title": 1}
    assert products.rejects is None


def test_rules_are_switches(source: Path) -> None:
    off = dict.fromkeys(("drop_empty_title", "drop_empty_content", "drop_duplicates", "decode_entities", "decode_c1"), False)
    assert rows(run(source, **off)) == [tuple(json.loads(line).values()) for line in LINES if line]
    assert [uid for uid, _, _ in rows(run(source, drop_duplicates=False))] == ["1", "4", "5"]
    assert [uid for uid, _, _ in rows(run(source, drop_empty_title=False))] == ["1", "2", "5"]


def test_wrapping_changes_no_byte(source: Path, tmp_path: Path) -> None:
    data = source.read_bytes()
    (tmp_path / "trn.json.gz").write_bytes(gzip.compress(data))
    (tmp_path / "trn.json.zst").write_bytes(zstandard.compress(data))
    (tmp_path / "crlf.json").write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        archive.writestr("LF-Amazon-1.3M.raw/trn.json.gz", gzip.compress(data))
        archive.writestr("LF-Amazon-1.3M.raw/tst.json.gz", b"")
    names = ("trn.json.gz", "trn.json.zst", "crlf.json", "raw.zip")
    assert {run(tmp_path / name).data.digest for name in names} == {run(source).data.digest}


def test_several_files_are_one(source: Path, tmp_path: Path) -> None:
    for number, line in enumerate(LINES):
        (tmp_path / f"part-{number}.json").write_bytes(line)
    products, whole = run(tmp_path / "part-*.json"), run(source)
    assert products.data == whole.data
    assert products.dropped == Counter(whole.dropped) - Counter({"blank line": 1})  # an empty file has no line


def test_bad_line_stops_the_run_by_default(source: Path) -> None:
    source.write_bytes(source.read_bytes() + BAD)
    assert refusal(source) == (
        "trn.json line 7: malformed JSON at character 34: Unterminated string starting at; expected one object a line. "
        "Set ingest.on_bad_row=quarantine to set such rows aside."
    )


def test_bad_lines_are_set_aside_with_number_and_reason(source: Path) -> None:
    source.write_bytes(b"\n".join([BAD, *LINES, b'{"uid": "7", "title": "\xff"}', b'{"uid": "8"}']))
    products = run(source, on_bad_row="quarantine", max_bad_share=1)
    assert rows(products) == ROWS
    assert (products.lines, products.rejects and products.rejects.rows) == (9, 3)
    assert rejects(products) == [
        {
            "file": "trn.json",
            "line": 1,
            "reason": "malformed JSON at character 34: Unterminated string starting at; expected one object a line",
            "raw": BAD.decode(),
        },
        {
            "file": "trn.json",
            "line": 8,
            "reason": "invalid UTF-8 at byte 24; expected UTF-8",
            "raw_base64": "eyJ1aWQiOiAiNyIsICJ0aXRsZSI6ICL/In0=",
        },
        {"file": "trn.json", "line": 9, "reason": 'missing "title"; expected uid, title, content', "raw": '{"uid": "8"}'},
    ]


def test_rejects_do_not_count_downstream(source: Path) -> None:
    whole = run(source)
    source.write_bytes(source.read_bytes() + BAD)
    assert run(source, on_bad_row="quarantine", max_bad_share=1).data == whole.data


def test_too_many_bad_lines_fail(source: Path, home: Path) -> None:
    source.write_bytes(b"\n".join([*LINES, BAD, BAD]))
    assert refusal(source, on_bad_row="quarantine", max_bad_share=0.2) == (
        "ingest: bad lines: got 2 of 8; expected at most max_bad_share=20.00%. "
        "First: trn.json line 7: malformed JSON at character 34: Unterminated string starting at; expected one object a line; "
        "trn.json line 8: malformed JSON at character 34: Unterminated string starting at; expected one object a line. "
        "Mend the file or raise ingest.max_bad_share."
    )
    assert not list((home / "drafts").iterdir())


@pytest.mark.parametrize(
    ("data", "counted"),
    [(b"", "0 lines (nothing dropped)"), (b"\n\n", "2 lines (2 blank line)"), (LINES[1], "1 lines (1 empty title)")],
)
def test_nothing_left_fails(source: Path, data: bytes, counted: str) -> None:
    source.write_bytes(data)
    assert refusal(source) == f"ingest: products: got 0 of {counted}; expected at least 1. Check ingest.sources."


@pytest.mark.timeout(120)
def test_source_that_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    assert "is a named pipe; expected a file" in refusal(tmp_path / "pipe.json")
    assert "is a directory; expected a file" in refusal(tmp_path)


@pytest.mark.timeout(120)
def test_bomb_leaves_no_bytes_behind(tmp_path: Path, home: Path) -> None:
    with gzip.open(tmp_path / "trn.json.gz", "wb") as file:
        file.writelines(bytes(2**20) for _ in range(400))
    assert "a decompression bomb" in refusal(tmp_path / "trn.json.gz")
    assert not [file for file in home.rglob("*.arrow*") if file.is_file()]


def test_file_that_changes_while_it_is_read_is_refused(source: Path) -> None:
    config = IngestConfig(sources=(str(source),))
    located = locate_source(config.sources)
    source.write_bytes(source.read_bytes() + LINES[0])
    with pytest.raises(InputError) as refused:
        ingest.fn(located, config)
    assert str(refused.value) == "trn.json: changed while it was read; expected a file that stays as it is. Run again."


def test_progress_is_logged(source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("tasks.tables.progress.REPORT_SECONDS", -1)
    with caplog.at_level(logging.INFO, "tasks.tables.progress"):
        run(source)
    assert "ingest: 6 lines, " in caplog.text
    assert " a second, 0 s left" in caplog.text


@settings(max_examples=25)
@given(st.lists(st.sampled_from([*LINES, BAD, b"\xff", b'{"title": "a"}', b" "]), max_size=40), st.data())
def test_cutting_into_files_and_blocks_changes_nothing(lines: list[bytes], data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        folder = Path(os.environ["AMAZON_FT_HOME"]) / "cut"
        folder.mkdir(parents=True, exist_ok=True)
        patch.setattr("tasks.reading.files.blocks.HEAD_BYTES", data.draw(st.integers(16, 200)))
        path = folder / "trn.json"
        path.write_bytes(b"\n".join([LINES[0], *lines]))
        config = IngestConfig(sources=(str(path),), on_bad_row="quarantine", max_bad_share=1)
        config = config.model_copy(update={"block_bytes": data.draw(st.integers(1, 300))})
        check(ingest.fn(locate_source(config.sources), config), path.read_bytes())


def check(products: Products, data: bytes, max_line_bytes: int = 16 * 2**20) -> None:
    """The result is the reference's, to the byte, and no line is lost."""
    expected = reference.ingest(data.removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n").split(b"\n"), max_line_bytes)
    assert rows(products) == expected.rows
    found = rejects(products) if products.rejects else []
    assert [reject["line"] for reject in found] == expected.rejected
    assert products.dropped == +expected.dropped
    assert products.lines == expected.lines
    assert products.data.rows + len(found) + sum(products.dropped.values()) == products.lines


@pytest.fixture(scope="module")
def fuzzed() -> bytes:
    return fuzz.corpus(20_000, seed=11)


@pytest.mark.parametrize("block_bytes", [2**16, 2**22])
def test_fuzz_corpus_is_read_as_by_the_reference(tmp_path: Path, fuzzed: bytes, block_bytes: int) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(fuzzed)
    config = IngestConfig(
        sources=(str(path),), on_bad_row="quarantine", max_bad_share=1, max_line_bytes=11_000_000, block_bytes=block_bytes
    )
    check(ingest.fn(locate_source(config.sources), config), fuzzed, config.max_line_bytes)


def test_generated_rows_are_read_as_by_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "trn.json"
    path.write_bytes(b"".join(product_lines(30_000)))
    check(run(path), path.read_bytes())


@pytest.mark.parametrize("wrap", ["plain", "gz", "zip"])
def test_real_rows_are_read_as_by_the_reference(shared: Path, tmp_path: Path, wrap: str) -> None:
    for name in ("trn_head.jsonl", "products_700.jsonl"):
        data = (shared / "data" / name).read_bytes()
        path = tmp_path / name
        if wrap == "zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("trn.json.gz", gzip.compress(data))
        else:
            path.write_bytes(gzip.compress(data) if wrap == "gz" else data)
        check(run(path), data)
