"""Seeded choice of training and evaluation products.

The document's `shuffle(seed).select(range(rows))` is `default_rng(seed).permutation(n)[:rows]` (Source: datasets 4.8.5,
Dataset.shuffle). Evaluation products are drawn beside it, and no training product equals one of them, whatever the case, the
white space and the Unicode form of its title and content.

    before    permutation(eval_seed) -> evaluation;   the rest, without their equals -> permutation(seed) -> train
    after     permutation(seed) -> train, as in the document;   further on, those that equal none of train -> evaluation

Where evaluation has products of its own (`sample.eval_sources`), its rows are drawn from them in the order of
permutation(eval_seed), and what stands in both is dropped from the same side as above, and counted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.caching.stage import stage
from tasks.caching.store import publish
from tasks.config import SampleConfig
from tasks.refs import Artifact, InputError, Products, Split
from tasks.tables.arrow import Gather, Rows, batch_ranges, is_conversations, read_table, write_table
from tasks.tables.progress import counted
from tasks.tables.streams import in_order

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

FILE = "products.arrow"
GATHER_ROWS = 32_768
"""Rows taken from the input at a time; more of them mean fewer passes over its batches."""
DRAW_ROWS = LOOK_ROWS = 65_536
"""Rows drawn, and looked at for equals, at a time; fewer take longer, as a call of Polars costs as much as a thousand titles."""
IRREGULAR = ("  ", *(chr(code) for code in (*range(0x09, 0x0E), *range(0x1C, 0x20))))
"""White space of ASCII that `normalised` changes within a text."""

Text = tuple[str, str]
"""Title and content, normalised."""


class Chosen(NamedTuple):
    """Row numbers: of products for training, and of products, or of those of evaluation's own, for evaluation."""

    train: Rows
    evaluation: Rows
    equals: int
    """Rows of the pool that equal a held-out one, or looked at to be held out that equal a trained one."""


def permutation(rows: int, seed: int) -> NDArray[np.int64]:
    """Row numbers in the order of `Dataset.shuffle(seed)`.

    >>> permutation(5, 42).tolist()
    [4, 2, 3, 1, 0]
    """
    return np.random.default_rng(seed).permutation(rows)


def normalised(text: str) -> str:
    r"""The text by which two products count as equal.

    >>> normalised("  \uff30an  & LID\xa0")
    'pan & lid'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def compared(table: pa.Table) -> pa.Table:
    """The title and the content by which rows count as equal; of conversations digests of all that is asked and all that is said.

    >>> import pyarrow as pa
    >>> row = {"uid": "7", "system": "", "prompts": ["Hi  ALL"], "answers": ["Yes."]}
    >>> compared(pa.Table.from_pylist([row])).equals(compared(pa.Table.from_pylist([row | {"prompts": ["hi all"]}])))
    True
    """
    import pyarrow as pa

    if not is_conversations(table.schema):
        return table

    def digests(batch: pa.RecordBatch) -> pa.RecordBatch:
        asked, said = batch["prompts"].to_pylist(), batch["answers"].to_pylist()
        asked = ([system, *prompts] for system, prompts in zip(batch["system"].to_pylist(), asked, strict=True))
        columns = [pa.array(map(_digest, texts), pa.string()) for texts in (asked, said)]
        return pa.RecordBatch.from_arrays(columns, names=["title", "content"])

    schema = pa.schema({"title": pa.string(), "content": pa.string()})
    return pa.Table.from_batches(in_order(digests, table.to_batches()), schema)


def _digest(texts: list[str]) -> str:
    return hashlib.sha256(json.dumps([normalised(text) for text in texts]).encode()).hexdigest()


def choose_before(table: pa.Table, config: SampleConfig, others: pa.Table | None = None) -> Chosen:
    """Rows for training and for evaluation; the latter and their equals leave the pool that the former are drawn from.

    Raises:
        InputError: when there are fewer rows than asked for.
    """
    told = compared(table)
    held_out = told if others is None else compared(others)
    drawn = draw(held_out, permutation(held_out.num_rows, config.eval_seed), config.eval_rows)
    free = np.ones(table.num_rows, np.bool_)
    free[[row for row, _ in equal_rows(told, drawn)]] = False  # in one table the drawn rows themselves are among them
    pool = np.flatnonzero(free)
    less = f"{table.num_rows:,} products less {len(drawn):,} for evaluation and their equals"
    _enough("sample.rows", config.rows, len(pool), less)
    train = pool[permutation(len(pool), config.seed)[: config.rows]]
    return Chosen(train, _rows(drawn), table.num_rows - len(pool))


def choose_after(table: pa.Table, config: SampleConfig, others: pa.Table | None = None) -> Chosen:
    """Rows for training, exactly the document's, and rows for evaluation that come later in its order, or of another table.

    Raises:
        InputError: when there are fewer rows than asked for.
    """
    _enough("sample.rows", config.rows, table.num_rows, "products")
    order = permutation(table.num_rows, config.seed)
    trained = np.zeros(table.num_rows, np.bool_)
    trained[order[: config.rows]] = True
    told, equals = compared(table), set[Text]()

    def seen(texts: Collection[Text]) -> set[Text]:
        found = {text for row, text in equal_rows(told, texts) if trained[row]}
        equals.update(found)
        return found

    if others is None:
        drawn = draw(told, order[config.rows :], config.eval_rows, seen)
    else:
        drawn = draw(compared(others), permutation(others.num_rows, config.eval_seed), config.eval_rows, seen)
    return Chosen(order[: config.rows], _rows(drawn), len(equals))


def _rows(drawn: Mapping[Text, int]) -> Rows:
    return np.fromiter(drawn.values(), np.int64)


def draw(
    table: pa.Table, order: Rows, count: int, refused: Callable[[Collection[Text]], set[Text]] = lambda _: set()
) -> dict[Text, int]:
    """The first `count` rows in that order that have a title and a content, differ, and are not refused.

    Raises:
        InputError: when there are fewer.
    """
    drawn, gather, start, size = dict[Text, int](), Gather(table), 0, count + 64
    while len(drawn) < count and start < len(order):
        rows = order[start : start + size]
        new = dict[Text, int]()
        for row, text in zip(rows.tolist(), _texts(gather(rows)), strict=True):
            if all(text) and text not in drawn:
                new.setdefault(text, row)
        unwanted = refused(new)
        drawn |= {text: row for text, row in new.items() if text not in unwanted}
        start, size = start + size, min(2 * size, DRAW_ROWS)
    _enough("sample.eval_rows", count, len(drawn), "distinct products with a title and a content that training leaves over")
    return dict(islice(drawn.items(), count))


def equal_rows(table: pa.Table, texts: Collection[Text]) -> Iterator[tuple[int, Text]]:
    """Rows whose normalised title and content are among the texts, each with its text."""
    import pyarrow as pa

    titles = {title for title, _ in texts}

    def look(span: tuple[int, int]) -> list[tuple[int, Text]]:
        start, end = span
        part = table.slice(start, end - start)
        rows = _maybe_titled(part["title"], titles)
        found = list[tuple[int, Text]]()
        for row, title in zip(rows.tolist(), part["title"].take(pa.array(rows)).to_pylist(), strict=True):
            normal = normalised(title)
            if normal in titles and (text := (normal, normalised(part["content"][row].as_py()))) in texts:
                found.append((start + row, text))
        return found

    return chain.from_iterable(in_order(look, batch_ranges(table.num_rows if texts else 0, LOOK_ROWS)))


def _maybe_titled(titles: pa.ChunkedArray, wanted: Collection[str]) -> Rows:
    """Row numbers of the titles that may be among the wanted ones once normalised.

    A regular ASCII title only needs its case folded; the others are for the caller to look at.
    """
    import polars as pl

    title = pl.Series(titles)
    ends = title.str.starts_with(" ") | title.str.ends_with(" ")
    regular = (title.str.len_bytes() == title.str.len_chars()) & ~ends & ~title.str.contains_any(list(IRREGULAR))
    return (~regular | title.str.to_lowercase().is_in(list(wanted))).arg_true().to_numpy()


def _texts(batch: pa.RecordBatch) -> Iterator[Text]:
    columns = (batch[name].to_pylist() for name in ("title", "content"))
    return ((normalised(title), normalised(content)) for title, content in zip(*columns, strict=True))


def _enough(field: str, wanted: int, there: int, what: str) -> None:
    if wanted > there:
        raise InputError(f"{field}: got {wanted:,}; expected at most {there:,} ({what}). Lower {field} or give more data.")


def _publish(table: pa.Table, rows: Rows) -> Artifact:
    gather = Gather(table)
    with publish("sample", need_bytes=table.nbytes * len(rows) // max(table.num_rows, 1)) as draft:
        taken = in_order(lambda span: gather(rows[slice(*span)]), batch_ranges(len(rows), GATHER_ROWS))
        batches = (batch.slice(start, end - start) for batch in taken for start, end in batch_ranges(batch.num_rows))
        draft.rows = write_table(draft / FILE, table.schema, counted("sample", batches, len(rows)))
    return draft.artifact


@stage(version=1)
def sample(products: Products, config: SampleConfig, others: Products | None = None) -> Split:
    """Choose training and evaluation products; the latter among `others` where there are some."""
    table = read_table(products.data / FILE)
    held_out = read_table(others.data / FILE) if others else None
    if held_out is not None and not held_out.schema.equals(table.schema):
        raise InputError(
            f"sample.eval_sources: got rows with {', '.join(held_out.column_names)}; expected {', '.join(table.column_names)}, "
            "as those of ingest.sources are read. Name files of the same kind of rows."
        )
    choose = choose_before if config.eval_split == "before" else choose_after
    chosen = choose(table, config, held_out)
    counts: dict[str, float] = {"products": table.num_rows, "train": len(chosen.train), "evaluation": len(chosen.evaluation)}
    if held_out is not None:
        counts |= {"in both": chosen.equals}
        side = "training" if config.eval_split == "before" else "held-out"
        logger.info("sample: %s %s rows stand in the other source too, and are left out", f"{chosen.equals:,}", side)
    evaluation = _publish(table if held_out is None else held_out, chosen.evaluation)
    return Split(train=_publish(table, chosen.train), evaluation=evaluation, counts=counts)
