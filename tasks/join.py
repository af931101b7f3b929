"""Products of several files as one, in the order of the files; a product that an earlier file holds is dropped.

The result is, to the byte, that of reading the files as one; so each file is read, and cached, on its own.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from tasks.caching.stage import stage
from tasks.caching.store import publish
from tasks.config import IngestConfig
from tasks.reading.cleaning import hash_rows
from tasks.reading.counts import REJECTS, check_kept, check_rejected
from tasks.reading.distinct import Distinct, Hashes
from tasks.refs import Artifact, Products, Shards
from tasks.tables.arrow import read_table, write_table
from tasks.tables.progress import counted
from tasks.tables.streams import fixed_batches, in_order

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "products.arrow"


def hashed(batch: pa.RecordBatch) -> tuple[pa.Table, Hashes]:
    """A batch and its hashes."""
    import pyarrow as pa

    table = pa.Table.from_batches([batch])
    return table, hash_rows(table)


def distinct_tables(pairs: Iterable[tuple[pa.Table, Hashes]], seen: Distinct, dropped: Counter[str]) -> Iterator[pa.Table]:
    """The rows that were not there before, in order."""
    for table, hashes in pairs:
        new = seen.add(hashes)
        dropped["duplicate"] += int((~new).sum())
        yield table if new.all() else table.filter(new)


def _join_rejects(parts: tuple[Artifact, ...]) -> Artifact | None:
    if not parts:
        return None
    with publish("rejects", need_bytes=sum(part.size_bytes for part in parts)) as draft:
        with (draft / REJECTS).open("wb") as joined:
            for part in parts:
                with (part / REJECTS).open("rb") as file:
                    shutil.copyfileobj(file, joined)
        draft.rows = sum(part.rows for part in parts)
    return draft.artifact


def _tables(shards: Shards, seen: Distinct | None, dropped: Counter[str]) -> Iterator[pa.Table]:
    import pyarrow as pa

    batches = (batch for part in shards.data for batch in read_table(part / FILE).to_batches())
    if seen is None:
        yield from (pa.Table.from_batches([batch]) for batch in batches)
    else:
        with closing(in_order(hashed, batches)) as pairs:
            yield from distinct_tables(pairs, seen, dropped)


@stage(version=1)
def join(shards: Shards, config: IngestConfig) -> Products:
    """Join products of several files, without repeats."""
    check_rejected(shards.rejects, shards.lines, config)
    dropped, rows = Counter(shards.dropped), sum(part.rows for part in shards.data)
    with publish("products", need_bytes=sum(part.size_bytes for part in shards.data)) as draft:
        tables = _tables(shards, Distinct(draft.path) if config.drop_duplicates else None, dropped)
        schema = read_table(shards.data[0] / FILE).schema
        draft.rows = write_table(draft / FILE, schema, counted("join", fixed_batches(tables), rows))
        check_kept(draft.rows, shards.lines, dropped)
    rejects = _join_rejects(shards.rejects)
    return Products(data=draft.artifact, rejects=rejects, lines=shards.lines, dropped=dict(sorted((+dropped).items())))
