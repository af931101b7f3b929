"""The same rows written in every format that is read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

Rows = Sequence[dict[str, Any]]
BATCH = 1000


def _lines(path: Path, rows: Rows) -> Path:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return path


def _array(path: Path, rows: Rows) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def _delimited(delimiter: str) -> Callable[[Path, Rows], Path]:
    def write(path: Path, rows: Rows) -> Path:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


def _parquet(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=BATCH)
    return path


def _arrow_file(path: Path, rows: Rows) -> Path:
    table = pa.Table.from_pylist(list(rows))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, BATCH)
    return path


def _arrow_stream(path: Path, rows: Rows) -> Path:
    table = pa.Table.from_pylist(list(rows))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, BATCH)
    return path


def _datasets(path: Path, rows: Rows) -> Path:
    Dataset.from_list(list(rows)).save_to_disk(path, num_shards=min(3, len(rows)))
    return path


WRITERS: dict[str, Callable[[Path, Rows], Path]] = {
    "jsonl": _lines,
    "json": _array,
    "csv": _delimited(";"),
    "tsv": _delimited("\t"),
    "parquet": _parquet,
    "arrow": _arrow_file,
    "arrows": _arrow_stream,
    "datasets": _datasets,
}
"""{ending: writes rows to a path}."""
