r"""Texts to token ids and labels.

    text     <BOS> ... ### Answer:\n   3 layers  <EOS>
    ids      0     ... 17            88 12     1
    labels   -100  ... -100          88 12     1          loss on answers; with loss on everything they are the ids

Exactly one BOS, at the start, and EOS after every answer. How texts become ids is in tasks/text/turn_encoding.py, what becomes
of rows that are too long in tasks/text/overlength.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.caching.stage import stage
from tasks.caching.store import publish
from tasks.config import TokenizeConfig
from tasks.refs import Artifact, Split, Texts, Tokenizer
from tasks.tables.arrow import (
    Gather,
    bounded_ranges,
    list_lengths,
    list_sums,
    one_batch,
    read_table,
    text_bytes,
    write_scratch,
    write_table,
)
from tasks.tables.progress import counted
from tasks.tables.streams import in_order
from tasks.text.encoding import Encoded, special_id, take_tokenizer, to_ids
from tasks.text.overlength import RowCounts, check_counts, check_ends, count_bos, fit
from tasks.text.turn_encoding import (
    Bodies,
    TurnEncoder,
    choose_encoder,
    encode_conversations,
    encode_whole,
    refuse_specials,
    without_specials,
)
from tasks.text.turns import Template, conversation_head

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer as Backend

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of what is not learnt; torch's cross entropy leaves it out."""
MAX_ROWS, MAX_BYTES = 1024, 8 * 2**20
"""Conversations, and bytes of their text, encoded and written at a time: words, ids and labels are many times their text."""
SAMPLE_ROWS = 64
"""Conversations on which the fast way is compared with encoding the whole text."""

Assembler = Callable[["pa.RecordBatch"], Encoded]
"""From rows of texts.arrow."""


def _batch(encoded: Encoded, uids: pa.Array, config: TokenizeConfig, counts: RowCounts) -> pa.RecordBatch:
    """A record batch of tokens.arrow; adds its numbers to `counts`."""
    import pyarrow as pa

    flat, offsets = to_ids(encoded.ids)
    labels = flat if config.loss_on == "everything" else np.where(encoded.learnt, flat, np.int32(IGNORED))
    seen = np.concatenate([[0], np.cumsum(labels != IGNORED)])
    counts.kept += len(uids)
    counts.tokens += len(flat)
    counts.learnt += int(seen[-1])
    counts.unlearnable += int((np.diff(seen[offsets]) == 0).sum())
    ends = pa.array(offsets, pa.int32())
    lists = [pa.ListArray.from_arrays(ends, pa.array(values, pa.int32())) for values in (flat, labels)]
    return pa.RecordBatch.from_arrays([uids, *lists], schema=_schema())


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema({"uids": pa.list_(pa.string()), "input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})


class TokenBatches:
    """The batches of tokens.arrow, and counts of what became of their rows."""

    def __init__(self, conversations: pa.Table, sizes: NDArray[np.int64], assemble: Assembler, method: Method) -> None:
        self.counts = RowCounts()
        self._conversations = conversations
        self._ranges = bounded_ranges(list_sums(sizes, conversations["products"]), max_rows=MAX_ROWS, max_bytes=MAX_BYTES)
        self._assemble = assemble
        self._config = method.config
        bos, eos = method.template["bos"], method.template["eos"]
        self._bos = special_id(method.backend, bos) if bos else None
        self._eos = special_id(method.backend, eos)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for uids, encoded in in_order(self._encoded, self._ranges):
            lengths = np.diff(to_ids(encoded.ids)[1])
            self.counts.rows += len(uids)
            self.counts.longest = max(self.counts.longest, int(lengths.max(initial=0)))
            self.counts.overlong += int((lengths > self._config.max_tokens).sum())
            self.counts.stray_bos += count_bos(encoded, self._bos)
            check_ends(encoded, self._eos)
            fitting, kept = fit(encoded, uids, self._config, self._eos)
            yield _batch(fitting, uids if len(kept) == len(uids) else uids.take(kept), self._config, self.counts)

    def _encoded(self, span: tuple[int, int]) -> tuple[pa.ListArray, Encoded]:
        batch = one_batch(self._conversations.slice(span[0], span[1] - span[0]))
        return batch["uids"], self._assemble(batch)


@dataclass(frozen=True)
class Method:
    """How texts become ids: by turns where that is exact, else as wholes."""

    backend: Backend
    template: Template
    turns: TurnEncoder | None
    config: TokenizeConfig

    def write(self, texts: Artifact, draft: Path) -> RowCounts:
        """tokens.arrow (tasks/refs.py) of texts; the turns' bodies lie in a scratch file meanwhile."""
        turns, scratch = read_table(texts / "turns.arrow"), draft / "bodies.arrow"
        sizes = text_bytes(turns, "prompt", "answer")
        table = read_table(texts / "texts.arrow").drop_columns(["text"])
        if "system" in table.column_names:
            assemble = self._as_they_are(turns)
        else:
            assemble = self._by_wholes(turns) if self.turns is None else self._by_turns(self.turns, turns, sizes, scratch)
        batches = TokenBatches(table, sizes, assemble, self)
        write_table(draft / "tokens.arrow", _schema(), batches)
        scratch.unlink(missing_ok=True)
        return batches.counts

    def _by_turns(self, encoder: TurnEncoder, turns: pa.Table, sizes: NDArray[np.int64], scratch: Path) -> Assembler:
        import pyarrow as pa

        def encode(span: tuple[int, int]) -> pa.RecordBatch:
            bodies = encoder.encode(one_batch(turns.slice(span[0], span[1] - span[0])))
            return pa.RecordBatch.from_arrays([bodies.ids, pa.array(bodies.unlearnt)], schema=schema)

        schema = pa.schema({"ids": pa.large_binary(), "unlearnt": pa.int64()})
        encoded = in_order(encode, bounded_ranges(sizes, max_bytes=MAX_BYTES))
        write_scratch(scratch, schema, counted("tokenize", encoded, turns.num_rows))
        gather = Gather(read_table(scratch))

        def assemble(batch: pa.RecordBatch) -> Encoded:
            bodies = gather(_products(batch))
            return encoder.join(Bodies(bodies["ids"], bodies["unlearnt"].to_numpy()), len(bodies) // len(batch))

        return assemble

    def _by_wholes(self, turns: pa.Table) -> Assembler:
        gather = Gather(turns)

        def assemble(batch: pa.RecordBatch) -> Encoded:
            taken = gather(_products(batch))
            if self.config.special_tokens_in_products == "text":
                refuse_specials(self.backend, taken)
            return encode_whole(self.backend, taken, len(taken) // len(batch), self.template)

        return assemble

    def _as_they_are(self, turns: pa.Table) -> Assembler:
        gather = Gather(turns)

        def assemble(batch: pa.RecordBatch) -> Encoded:
            taken, widths = gather(_products(batch)), list_lengths(pa.chunked_array([batch["products"]])).tolist()
            if self.config.special_tokens_in_products == "text":
                refuse_specials(self.backend, taken)
            heads = [conversation_head(system, self.template) for system in batch["system"].to_pylist()]
            return encode_conversations(self.backend, taken, widths, heads, self.template)

        import pyarrow as pa

        return assemble


def _products(batch: pa.RecordBatch) -> NDArray[np.integer]:
    return batch["products"].flatten().to_numpy()


def choose_method(texts: Artifact, backend: Backend, template: Template, config: TokenizeConfig) -> Method:
    """By turns if that equals encoding whole texts on a sample, else by wholes."""
    table = read_table(texts / "texts.arrow")
    if "system" in table.column_names:
        return Method(backend, template, None, config)
    table = table.select(["products"])
    rows = np.unique(np.linspace(0, table.num_rows - 1, SAMPLE_ROWS).astype(np.int64))
    lists = one_batch(table.take(rows))["products"]
    sample = Gather(read_table(texts / "turns.arrow"))(lists.flatten().to_numpy())
    plain = config.special_tokens_in_products == "text"
    if plain:
        sample = without_specials(backend, sample)  # whole texts can't hold them as plain text
    turns = choose_encoder(backend, sample, sample.num_rows // len(lists), template, plain=plain)
    if turns is None:
        logger.warning("tokenize: turns can't be encoded on their own with this tokenizer and template; whole texts are, slowly")
    return Method(backend, template, turns, config)


def _tokenize(name: str, texts: Artifact, method: Method) -> tuple[Artifact, RowCounts]:
    with publish("tokens", need_bytes=3 * texts.size_bytes) as draft:
        counts = method.write(texts, draft.path)
        check_counts(f"tokenize {name}", counts, method.config)
        draft.rows = counts.kept
    return draft.artifact, counts


@stage(version=1)
def tokenize(texts: Texts, tokenizer: Tokenizer, config: TokenizeConfig) -> Split:
    """Ids and labels of both splits; BOS once, EOS after every answer, at most max_tokens a row."""
    template = json.loads((texts.template / "template.json").read_text(encoding="utf-8"))
    method = choose_method(texts.train, take_tokenizer(tokenizer), template, config)
    train, counts = _tokenize("training rows", texts.train, method)
    evaluation, _ = _tokenize("evaluation rows", texts.evaluation, method)
    logger.info("tokenize: %s rows, %s tokens, %s of them learnt", f"{counts.kept:,}", f"{counts.tokens:,}", f"{counts.learnt:,}")
    return Split(train=train, evaluation=evaluation, counts={**asdict(counts), "evaluation": evaluation.rows})
