"""The same rows in every format are the same products; what is wrong with a file is said by name before a row is read."""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict

from tasks.config import IngestConfig
from tasks.ingest import ingest
from tasks.reading.columns import to_text
from tasks.reading.files.blocks import look
from tasks.reading.files.formats import KNOWN, Dialect
from tasks.reading.files.tabular import BLOCKS_AHEAD, cut_delimited
from tasks.reading.sources import locate_source
from tasks.refs import InputError, Products
from tests.support.rows import WRITERS

NAMED = {"columns": {"uid": "código", "title": "nome", "content": "descrição"}}
ROWS: list[dict[str, Any]] = [
    {"código": str(number), "nome": f"Pão; {number}", "descrição": f'Linha "um"\nlinha dois, R&amp;D {number}', "marca": "Aurora"}
    for number in range(5000)
]


def run(path: Path, extra: tuple[str, ...] = (), **changes: Any) -> Products:
    config = IngestConfig(sources=(str(path),), block_bytes=2**16, **changes)
    return ingest.fn(locate_source(config.sources), config, extra)


def rows(products: Products) -> list[tuple[str, ...]]:
    data = Dataset.from_file(str(products.data / "products.arrow"))
    return list(zip(*(data[name][:] for name in data.column_names), strict=True))


def refusal(path: Path, **changes: Any) -> str:
    with pytest.raises(InputError) as refused:
        run(path, **changes)
    return str(refused.value)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, ...]]:
    return [(row["código"], row["nome"], row["descrição"].replace("&amp;", "&"), row["marca"]) for row in ROWS]


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_the_same_in_every_format(name: str, tmp_path: Path, expected: list[tuple[str, ...]]) -> None:
    path = WRITERS[name](tmp_path / f"rows.{name}", ROWS)
    products = run(path, ("marca",), **NAMED)
    assert rows(products) == expected
    assert products.lines == len(ROWS)
    (tmp_path / "jsonl").mkdir()
    lines = run(WRITERS["jsonl"](tmp_path / "jsonl" / "rows.jsonl", ROWS), ("marca",), **NAMED)
    assert lines.data.digest == products.data.digest


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "datasets"])
@pytest.mark.parametrize("packing", ["gz", "zst", "zip"])
def test_packing_changes_no_byte_whatever_the_format(name: str, packing: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path / f"rows.{name}", ROWS[:300])
    whole, data = run(path, **NAMED), path.read_bytes()
    packed = tmp_path / f"rows.{name}.{packing}"
    if packing == "zip":
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr(path.name, data)
    else:
        packed.write_bytes(gzip.compress(data) if packing == "gz" else zstandard.compress(data))
    assert run(packed, **NAMED).data == whole.data


def test_row_without_uid_keeps_its_name_in_every_format(tmp_path: Path) -> None:
    bare = [{"title": f"Pan {number}", "content": "Iron."} for number in range(30)]
    found = {tuple(rows(run(write(tmp_path / f"rows.{name}", bare)))) for name, write in WRITERS.items()}
    found |= {tuple(rows(run(WRITERS["csv"](tmp_path / "again.csv", bare))))}
    assert len(found) == 1
    assert len({uid for uid, _, _ in next(iter(found))}) == 30


def test_format_shows_in_the_content_not_in_the_name(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        if name != "datasets":
            path = write(tmp_path / f"rows.{name}", ROWS[:5])
            other = path.rename(tmp_path / f"{name}-rows.bin")
            assert look(other, IngestConfig()).columns == ("código", "nome", "descrição", "marca")


def test_semicolons_and_a_windows_encoding_are_found_or_set(tmp_path: Path) -> None:
    text = "código;nome;descrição\r\n7;Pão;De trigo.\r\n"
    (tmp_path / "utf16.csv").write_bytes(text.encode("utf-16"))
    assert rows(run(tmp_path / "utf16.csv", **NAMED)) == [("7", "Pão", "De trigo.")]
    (tmp_path / "windows.csv").write_bytes(text.encode("cp1252"))
    assert rows(run(tmp_path / "windows.csv", csv={"encoding": "cp1252"}, **NAMED)) == [("7", "Pão", "De trigo.")]
    assert refusal(tmp_path / "windows.csv", **NAMED) == (
        "windows.csv: column 'código' is not there: got columns c\ufffddigo, nome, descri\ufffd\ufffdo; expected one for uid. "
        "Set ingest.columns.uid to one of these. If they look wrong, set ingest.csv.encoding or ingest.csv.delimiter."
    )


def test_wrong_encoding_below_a_plain_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("uid,title,content\n7,Pão,De trigo.\n".encode("cp1252"))
    assert refusal(tmp_path / "rows.csv") == (
        'rows.csv row 2: "title" is no UTF-8; expected text, in delimited text by ingest.csv.encoding. '
        "Set ingest.on_bad_row=quarantine to set such rows aside."
    )


def test_ragged_rows_are_rejected_by_number(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("uid,title,content\n1,Pan,Iron.\n2,Lid\n\n3,Cup,Clay.,extra\n4,Mug,Tin.\n")
    products = run(tmp_path / "rows.csv", on_bad_row="quarantine", max_bad_share=1)
    assert [row[0] for row in rows(products)] == ["1", "4"]
    assert products.lines == 4
    assert products.rejects is not None
    told = [json.loads(line) for line in (products.rejects / "rejects.jsonl").read_text().splitlines()]
    assert told == [
        {"file": "rows.csv", "row": 3, "reason": "2 fields; expected 3, as in the header", "raw": "2,Lid"},
        {"file": "rows.csv", "row": 4, "reason": "4 fields; expected 3, as in the header", "raw": "3,Cup,Clay.,extra"},
    ]


def test_quotes_may_be_text(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text('uid\ttitle\tcontent\n1\t15" screen\t"Iron.\n')
    assert rows(run(tmp_path / "rows.tsv", csv={"quote": None})) == [("1", '15" screen', '"Iron.')]


def test_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    for name in ("jsonl", "json", "csv", "parquet", "arrow"):
        path = WRITERS[name](tmp_path / f"rows.{name}", ROWS[:5])
        assert refusal(path, columns={"title": "name"}).startswith(
            f"rows.{name}: column 'name' is not there: got columns código, nome, descrição, marca; expected one for title. "
            "Set ingest.columns.title to one of these."
        )
    with pytest.raises(InputError, match=r"column 'cor' is not there: .* sharegpt.merged_prompt names it"):
        run(tmp_path / "rows.csv", ("cor",), **NAMED)


@pytest.mark.parametrize("data", [b"\x7fELF\x02\x01", b"\x89PNG\r\n\x1a\n", b"Just a text.\nAnd more.\n", b"PK\x03\x05abc"])
def test_unknown_format_is_refused_naming_those_that_are_known(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.dat").write_bytes(data)
    assert refusal(tmp_path / "file.dat") == (
        f"file.dat: unknown format: got a file in that format; expected {KNOWN}. Convert it first."
    )


@pytest.mark.parametrize("name", ["parquet", "arrow", "arrows"])
def test_file_cut_short_is_named(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path / f"rows.{name}", ROWS)
    path.write_bytes(path.read_bytes()[:-1000])
    assert refusal(path, **NAMED).startswith(f"rows.{name}: damaged: got ")


def test_array_that_breaks_off_is_named_by_row(tmp_path: Path) -> None:
    path = WRITERS["json"](tmp_path / "rows.json", ROWS)
    path.write_bytes(path.read_bytes()[:-30])
    assert refusal(path, **NAMED).startswith(
        "JSON array, row 5000: malformed, or longer than max_line_bytes=16,777,216; expected ["
    )


def test_values_become_text_as_documented(tmp_path: Path) -> None:
    table = pa.table(
        {
            "uid": pa.array([7, None], pa.int32()),
            "title": pa.array([12.5, float("nan")]),
            "content": pa.array([True, None]),
            "day": pa.array([dt.date(2024, 5, 1), None]),
            "at": pa.array([dt.datetime.fromisoformat("2024-05-01T12:30:00.25"), None]),
            "price": pa.array([decimal.Decimal("12.50"), None]),
            "kind": pa.array(["pan", None]).dictionary_encode(),
            "nothing": pa.nulls(2),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    off = {"drop_empty_title": False, "drop_empty_content": False}
    found = rows(run(tmp_path / "rows.parquet", ("day", "at", "price", "kind", "nothing"), **off))
    assert found[0] == ("7", "12.5", "true", "2024-05-01", "2024-05-01T12:30:00.25", "12.50", "pan", "")
    assert set(found[1][1:]) == {""}
    with pytest.raises(InputError, match="x: a column of list<item: int64> has no text"):
        to_text(pa.array([[1]]), "x")


def test_several_splits_stand_for_train(tmp_path: Path) -> None:
    split = DatasetDict({"train": Dataset.from_list(ROWS[:9]), "test": Dataset.from_list(ROWS[9:12])})
    split.save_to_disk(tmp_path / "saved")
    assert len(rows(run(tmp_path / "saved", **NAMED))) == 9
    assert len(rows(run(tmp_path / "saved" / "test", **NAMED))) == 3


def test_parquet_bomb_is_refused(tmp_path: Path) -> None:
    column = pa.array(["a" * 2**16] * 4096).dictionary_encode()
    pq.write_table(pa.table({"title": column, "content": column}), tmp_path / "rows.parquet")
    assert "a decompression bomb" in refusal(tmp_path / "rows.parquet", drop_duplicates=False)


def test_quote_that_is_never_closed_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('uid,title,content\n1,Pan,Iron.\n2,"Lid,Oak.\n' + "3,Cup,Clay.\n" * 100_000)
    message = refusal(tmp_path / "rows.csv", max_line_bytes=2**16)
    assert message.startswith("rows.csv: from row 3 on: got ")
    assert "each quote closed" in message


class Counted(io.BytesIO):
    """Counts how many bytes were read."""

    taken = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data


def test_delimited_text_is_not_read_far_ahead() -> None:
    stream, row_bytes = Counted(b"uid,title,content\n" + b"7,Pan,Iron.\n" * 2**20), 2**18
    blocks = cut_delimited(stream, "rows.csv", Dialect(",", '"', "utf-8"), ["title"], row_bytes)
    next(blocks)
    before = -1
    while before != stream.taken:
        before = stream.taken
        time.sleep(0.2)
    assert before < row_bytes * (BLOCKS_AHEAD + 3)
    blocks.close()
    assert (
        sum(
            block.batch.num_rows
            for block in cut_delimited(Counted(stream.getvalue()), "rows.csv", Dialect(",", '"', "utf-8"), ["title"], row_bytes)
        )
        == 2**20
    )
