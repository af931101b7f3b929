"""Products to conversations: a prompt merged from the columns, the answer, and further turns from other products.

    uid  title  content                 uids       conversations
    u1   Tutu   3 layers        ->      [u1, u2]   [user: T Tutu, assistant: 3 layers, user: T Mug, assistant: Blue]
    u2   Mug    Blue                    [u2, u1]   [user: T Mug, assistant: Blue, user: T Tutu, assistant: 3 layers]

Source: unsloth 2026.10.9, `chat_templates.to_sharegpt` and `standardize_sharegpt`, whose results these equal to the byte.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.caching.stage import stage
from tasks.caching.store import publish
from tasks.config import SharegptConfig
from tasks.refs import Artifact, Split
from tasks.tables.arrow import (
    Gather,
    bounded_ranges,
    is_conversations,
    list_lengths,
    one_batch,
    read_table,
    row_lists,
    text_bytes,
    write_table,
)
from tasks.tables.progress import counted
from tasks.tables.streams import in_order
from tasks.text.merged_prompt import PromptBlock, merge_columns, parse_merged_prompt

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

ROLES = ("user", "assistant")


def turn_products(rows: int, *, extension: int, seed: int) -> NDArray[np.int32]:
    """(rows, extension): the product of each turn; the first turn's is the row's own.

    >>> turn_products(3, extension=2, seed=3407).tolist()
    [[0, 0], [1, 1], [2, 2]]
    """
    first = np.arange(rows, dtype=np.int32)
    further = [np.random.default_rng(seed + turn).permutation(rows).astype(np.int32) for turn in range(1, extension)]
    return np.stack([first, *further], axis=1)


def conversation_lists(turns: pa.RecordBatch, width: int) -> pa.ListArray:
    """Prompts and answers, `width` turns a conversation, as `list<struct<role, content>>`."""
    import pyarrow as pa

    count = turns.num_rows
    both = pa.chunked_array([turns["prompt"], turns["answer"]]).combine_chunks()
    content = both.take(pa.array(np.arange(2 * count).reshape(2, count).T.ravel()))
    roles = pa.array(ROLES).take(pa.array(np.tile(np.array([0, 1]), count)))
    return row_lists(pa.StructArray.from_arrays([roles, content], ["role", "content"]), 2 * width)


def write_conversations(products: Path, draft: Path, config: SharegptConfig, *, extension: int) -> int:
    """turns.arrow and conversations.arrow (tasks/refs.py) of a product file; how many conversations."""
    import pyarrow as pa

    table = read_table(products)
    if is_conversations(table.schema):
        return write_as_they_are(table, draft)
    blocks = parse_merged_prompt(config.merged_prompt, [name for name in table.column_names if name != "uid"])
    write_table(draft / "turns.arrow", _turns_schema(), _turns(table, blocks, config.output_column))
    turns = read_table(draft / "turns.arrow")
    rows = turn_products(table.num_rows, extension=extension, seed=config.seed)
    schema = pa.schema(
        {
            "uids": pa.list_(pa.string()),
            "products": pa.list_(pa.int32()),
            "conversations": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        }
    )
    conversations = _conversations(turns, rows, schema)
    return write_table(draft / "conversations.arrow", schema, counted("sharegpt", conversations, len(rows)))


def write_as_they_are(table: pa.Table, draft: Path) -> int:
    """turns.arrow and conversations.arrow of rows that are conversations already: each has its own turns, and a system text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    turns = list_lengths(table["prompts"])
    ends = np.cumsum(turns)

    def flat(batch: pa.RecordBatch) -> pa.RecordBatch:
        uids = batch["uid"].take(pc.list_parent_indices(batch["prompts"]))
        return pa.RecordBatch.from_arrays([uids, batch["prompts"].flatten(), batch["answers"].flatten()], schema=_turns_schema())

    write_table(draft / "turns.arrow", _turns_schema(), map(flat, table.to_batches()))
    schema = pa.schema({"uids": pa.list_(pa.string()), "products": pa.list_(pa.int32()), "system": pa.string()})

    def listed(span: tuple[int, int]) -> pa.RecordBatch:
        batch, start = one_batch(table.slice(span[0], span[1] - span[0])), int(ends[span[0]] - turns[span[0]])
        offsets = np.concatenate([[0], np.cumsum(turns[slice(*span)])]).astype(np.int32)
        numbers = pa.ListArray.from_arrays(offsets, pa.array(np.arange(start, start + offsets[-1]), pa.int32()))
        return pa.RecordBatch.from_arrays([row_lists(batch["uid"], 1), numbers, batch["system"]], schema=schema)

    spans = bounded_ranges(text_bytes(table, "system", "prompts", "answers"))
    return write_table(draft / "conversations.arrow", schema, counted("sharegpt", map(listed, spans), table.num_rows))


def _turns_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema({"uid": pa.string(), "prompt": pa.string(), "answer": pa.string()})


def _turns(products: pa.Table, blocks: Sequence[PromptBlock], output_column: str) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.compute as pc

    def turns(span: tuple[int, int]) -> pa.RecordBatch:
        batch = one_batch(products.slice(span[0], span[1] - span[0]))
        columns = [batch["uid"], merge_columns(batch, blocks), pc.fill_null(batch[output_column], "")]
        return pa.RecordBatch.from_arrays(columns, schema=_turns_schema())

    return in_order(turns, bounded_ranges(text_bytes(products, "title", "content")))


def _conversations(turns: pa.Table, rows: NDArray[np.int32], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    width, gather = rows.shape[1], Gather(turns)

    def conversations(span: tuple[int, int]) -> pa.RecordBatch:
        flat = rows[slice(*span)].ravel()
        taken = gather(flat)
        columns = [row_lists(taken["uid"], width), row_lists(pa.array(flat), width), conversation_lists(taken, width)]
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    return in_order(conversations, bounded_ranges(text_bytes(turns, "prompt", "answer")[rows].sum(axis=1)))


def _convert(products: Artifact, config: SharegptConfig, *, extension: int) -> Artifact:
    with publish("conversations", need_bytes=(2 + extension) * products.size_bytes) as draft:
        draft.rows = write_conversations(products / "products.arrow", draft.path, config, extension=extension)
    return draft.artifact


@stage(version=1)
def sharegpt(split: Split, config: SharegptConfig) -> Split:
    """Conversations of `conversation_extension` turns for training, of a single turn for evaluation; own ones as they are."""
    train = _convert(split.train, config, extension=config.conversation_extension)
    evaluation = _convert(split.evaluation, config, extension=1)
    logger.info("sharegpt: %s conversations, %s to evaluate on", f"{train.rows:,}", f"{evaluation.rows:,}")
    return Split(train=train, evaluation=evaluation, counts={"train": train.rows, "evaluation": evaluation.rows})
