"""`amazon-ft peek` and `amazon-ft init`: what a source is, what would be made of it, and the recipe that trains on it.

Only the beginning of the first file is read. Its rows go through the pipeline's own stages, in a root of their own that goes with
the command, so that what is shown is what a run would make.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flows.recipes import build_recipe
from flows.suggest import size_sample, suggest
from tasks.caching.store import publish
from tasks.config import IngestConfig, ModelConfig, Recipe
from tasks.model import base_model
from tasks.reading.cleaning import clean, drop_empty
from tasks.reading.files.blocks import Look, columns_to_read, look, parse_block, read_blocks
from tasks.reading.files.formats import FileFormat
from tasks.reading.rows import ParsedBlock
from tasks.reading.sources import find_files
from tasks.refs import Artifact, InputError, Model, Special, Split
from tasks.sharegpt import sharegpt
from tasks.tables.arrow import is_conversations, list_lengths, read_table, write_table
from tasks.template import template
from tasks.text.encoding import load_tokenizer_json
from tasks.tokenize import tokenize

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1000
"""So many are looked at."""
SHOWN = 3
BLOCK_BYTES = 2**18
CAUTION = 0.9
"""Of an estimated number of rows so many are asked for: asking for more than there are ends a run."""
QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Example:
    """A row as the model will see it: its text in pieces, those that are learnt marked."""

    pieces: tuple[tuple[str, bool], ...]


class Seen(NamedTuple):
    """The rows as the model will see them."""

    examples: tuple[Example, ...]
    unit: str
    """Of the quantiles: tokens, or characters where no tokenizer was at hand."""
    quantiles: Mapping[str, int]
    """{share: length that so many rows stay within}."""


NOTHING = Seen((), "tokens", {})


@dataclass(frozen=True)
class Peeked:
    """A source as its beginning shows it."""

    files: int
    look: Look
    settings: dict[str, Any]
    """A recipe that would train on it."""
    rows: int
    is_counted: bool
    """Else `rows` is estimated from the beginning."""
    looked_at: int
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    rejected: tuple[str, ...] = ()
    """Reasons of the rows that are rejected."""
    seen: Seen = NOTHING

    @property
    def kind(self) -> str:
        """The kind of its rows."""
        return str(self.settings["ingest"]["kind"])


def peek_source(sources: tuple[str, ...], model: str | None = None) -> Peeked:
    """Look at the beginning of a source.

    Args:
        sources: as `ingest.sources`.
        model: whose tokenizer and chat template are used; None to count characters in the document's template.

    Raises:
        InputError: as `locate_source` and `look`; when no row can be read.
    """
    files = find_files(sources)
    found = look(files[0], IngestConfig())
    settings = suggest(sources, files[0], found, model)
    reading = build_recipe(settings, where="peek").ingest.model_copy(update={"block_bytes": BLOCK_BYTES})
    blocks, share = _beginning(files[0], reading)
    table, dropped = _join(blocks, reading)
    lines = sum(block.lines for block in blocks)
    counted = _counted(files, found, lines, share)
    rows = counted if counted is not None else round(lines / max(share, 1e-9) * _weight(files))
    kept = rows * table.num_rows / max(lines, 1)
    size_sample(settings, int(kept if counted is not None else CAUTION * kept))
    rejected = tuple(f"{reject.unit} {reject.line}: {reject.reason}" for block in blocks for reject in block.rejects)
    used = base_model(ModelConfig(id=model)) if model else None
    seen = _seen(table, build_recipe(settings, where="peek"), used) if table.num_rows else NOTHING
    return Peeked(len(files), found, settings, rows, counted is not None, lines, dropped, rejected, seen)


def _beginning(path: Path, reading: IngestConfig) -> tuple[list[ParsedBlock], float]:
    """The first blocks, and the share of the file that they are."""
    wanted, blocks, share = columns_to_read(reading, ()), list[ParsedBlock](), 1.0
    for block, so_far in read_blocks(path, reading, wanted):
        blocks.append(parse_block(block, path.name, reading, wanted))
        if sum(block.lines for block in blocks) >= ROWS:
            share = so_far
            break
    return blocks, share


def _join(blocks: Sequence[ParsedBlock], reading: IngestConfig) -> tuple[pa.Table, dict[str, int]]:
    """The rows that are kept of the first ones, and how many are not, by reason."""
    import polars as pl
    import pyarrow as pa

    dropped = sum((block.dropped for block in blocks), Counter[str]())
    if not blocks:
        raise InputError("peek: no rows: got an empty file; expected at least one row.")
    table = pa.concat_tables([block.table for block in blocks])
    if is_conversations(table.schema):
        return table, dropped
    frame, empty = drop_empty(clean(pl.DataFrame(table), reading), reading)
    kept = frame.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(table.schema)
    return kept, +(dropped + Counter(empty))


def _counted(files: Sequence[Path], found: Look, lines: int, share: float) -> int | None:
    """The rows of all files where that costs nothing to know."""
    import pyarrow.parquet as pq

    if found.format is FileFormat.PARQUET and all(file.suffix == ".parquet" for file in files):
        return sum(pq.read_metadata(file).num_rows for file in files)
    return lines if share >= 1 and len(files) == 1 else None


def _weight(files: Sequence[Path]) -> float:
    """All files' size, in sizes of the first."""
    return sum(file.stat().st_size for file in files) / max(files[0].stat().st_size, 1)


@contextmanager
def _scratch_root() -> Generator[None]:
    """A root of its own while the block lives."""
    before = os.environ.get("AMAZON_FT_HOME")
    with tempfile.TemporaryDirectory() as root:
        os.environ["AMAZON_FT_HOME"] = root
        try:
            yield
        finally:
            os.environ.pop("AMAZON_FT_HOME")
            if before is not None:
                os.environ["AMAZON_FT_HOME"] = before


def _seen(table: pa.Table, recipe: Recipe, model: Model | None) -> Seen:
    """Examples and lengths of the rows, by the stages that a run would take."""
    special = model.tokenizer.special if model else Special(bos=None, eos="</s>")
    own = model.tokenizer.chat_template if model and recipe.template.source == "model" else None
    with _scratch_root():
        split = Split(train=_published(table.slice(0, ROWS)), evaluation=_published(table.slice(0, 1)))
        texts = template.fn(sharegpt.fn(split, recipe.sharegpt), special, recipe.template, own)
        if model is None:
            shown: list[str] = read_table(texts.train / "texts.arrow")["text"].to_pylist()
            examples = tuple(Example(((text, False),)) for text in shown[:SHOWN])
            return Seen(examples, "characters", quantiles([len(text) for text in shown]))
        config = recipe.tokenize.model_copy(update={"max_affected_share": 1.0, "max_tokens": 131_072})
        tokens = read_table(tokenize.fn(texts, model.tokenizer, config).train / "tokens.arrow")
        examples = tuple(_example(row, model) for row in tokens.slice(0, SHOWN).to_pylist())
        return Seen(examples, "tokens", quantiles(list_lengths(tokens["input_ids"]).tolist()))


def _published(table: pa.Table) -> Artifact:
    with publish("sample") as draft:
        draft.rows = write_table(draft / "products.arrow", table.schema, table.combine_chunks().to_batches())
    return draft.artifact


def _example(row: Mapping[str, list[int]], model: Model) -> Example:
    """A row of tokens.arrow, its ids decoded run by run."""
    backend = load_tokenizer_json(Path(model.tokenizer.path))
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    runs = [(learnt, [token for token, _ in run]) for learnt, run in groupby(pairs, key=lambda pair: pair[1] != -100)]
    return Example(tuple((backend.decode(ids, skip_special_tokens=False), learnt) for learnt, ids in runs))


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Lengths that so many of the rows stay within.

    >>> quantiles([1, 2, 3])
    {'50 %': 2, '90 %': 3, '99 %': 3, '100 %': 3}
    """
    found = np.quantile(np.array(lengths), QUANTILES, method="higher")
    return {f"{100 * share:.0f} %": int(length) for share, length in zip(QUANTILES, found, strict=True)}


def as_json(found: Peeked) -> str:
    """One JSON object."""
    told = {
        "format": found.look.format.value,
        "columns": list(found.look.columns),
        "kind": found.kind,
        "rows": found.rows,
        "is_counted": found.is_counted,
        "dropped": found.dropped,
        "rejected": list(found.rejected),
        "examples": [[{"text": text, "learnt": learnt} for text, learnt in example.pieces] for example in found.seen.examples],
        found.seen.unit: dict(found.seen.quantiles),
        "recipe": found.settings,
    }
    return json.dumps(told, ensure_ascii=False)
