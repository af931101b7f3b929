"""Texts to token ids and labels.

    text     <BOS> ... ### Answer:\\n  3 layers  <EOS>
    ids      0     ... 17            88 12     1
    labels   -100  ... -100          88 12     1          loss on answers; with loss on everything they are the ids

Exactly one BOS, at the start, and EOS after every answer. Encoding is in tasks/encode.py, conversations are put together in
tasks/assemble.py; here rows that are too long are dealt with, and everything is checked and counted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.assemble import Bodies, Encoded, Template, TurnEncoder, choose_encoder, encode_whole, special_pattern
from tasks.config import TokenizeConfig
from tasks.encode import Ids, from_ids, load_tokenizer, to_ids
from tasks.refs import Artifact, InputError, Split, Texts, Tokenizer
from tasks.stage import stage
from tasks.store import publish
from tasks.stream import in_order
from tasks.tables import BATCH_ROWS, Gather, batch_ranges, one_batch, read_table, write_table

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer as Backend

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of what is not learnt; torch's cross entropy leaves it out."""
SAMPLE_ROWS = 64
"""Conversations on which the fast way is compared with encoding the whole text."""

Assembler = Callable[[NDArray[np.integer], int], Encoded]
"""Conversations of products, so many a row."""


@dataclass
class Tally:
    """What became of the rows of one file."""

    rows: int = 0
    tokens: int = 0
    learnt: int = 0
    kept: int = 0
    overlong: int = 0
    longest: int = 0
    unlearnable: int = 0
    """Rows within max_tokens, or cut to it, without a single label."""
    stray_bos: int = 0
    """BOS tokens inside products' texts."""

    @property
    def affected_share(self) -> float:
        """Of all rows, those that were too long or have no label."""
        return (self.overlong + self.unlearnable) / max(self.rows, 1)


def shorten(ids: Ids, learnt: NDArray[np.bool_], max_tokens: int, eos: int) -> tuple[Ids, NDArray[np.bool_]]:
    """A row cut in its last answer that has room for a token and EOS, and ended there; empty if no answer has.

    >>> ids, learnt = np.array([0, 5, 8, 9, 1, 5, 8, 1], np.int32), np.array([0, 0, 1, 1, 1, 0, 1, 1], bool)
    >>> [shorten(ids, learnt, most, 1)[0].tolist() for most in (4, 6, 3)]
    [[0, 5, 8, 1], [0, 5, 8, 9, 1], []]
    """
    last = max_tokens - 1
    if learnt[last] and learnt[last - 1] and ids[last - 1] != eos:
        return np.append(ids[:last], np.int32(eos)), learnt[: last + 1]
    ended = np.flatnonzero(learnt[:max_tokens] & ~np.append(learnt[1:], False)[:max_tokens])
    end = int(ended[-1]) + 1 if len(ended) else 0
    return ids[:end], learnt[:end]


def fit(encoded: Encoded, uids: pa.ListArray, config: TokenizeConfig, eos: int) -> tuple[Encoded, NDArray[np.int64]]:
    """Rows of at most max_tokens ids, and which rows they were.

    Raises:
        InputError: naming the first row that is too long, with on_overlength=error.
    """
    flat, offsets = to_ids(encoded.ids)
    overlong = np.flatnonzero(np.diff(offsets) > config.max_tokens)
    if not len(overlong):
        return encoded, np.arange(len(encoded.ids))
    if config.on_overlength == "error":
        raise _overlong_error(uids[int(overlong[0])].as_py(), int(np.diff(offsets)[overlong[0]]), config.max_tokens)
    rows = [(flat[start:end], encoded.learnt[start:end]) for start, end in pairwise(offsets)]
    for row in overlong:
        rows[row] = _shortened(*rows[row], config, eos)
    kept = np.array([row for row, (ids, _) in enumerate(rows) if len(ids)], np.int64)
    lengths = np.cumsum([0, *(len(rows[row][0]) for row in kept)])
    ids = np.concatenate([np.zeros(0, np.int32), *(rows[row][0] for row in kept)])
    learnt = np.concatenate([np.zeros(0, bool), *(rows[row][1] for row in kept)])
    return Encoded(from_ids(ids, lengths), learnt), kept


def _shortened(ids: Ids, learnt: NDArray[np.bool_], config: TokenizeConfig, eos: int) -> tuple[Ids, NDArray[np.bool_]]:
    match config.on_overlength:
        case "truncate":
            return shorten(ids, learnt, config.max_tokens, eos)
        case "cut":
            return ids[: config.max_tokens], learnt[: config.max_tokens]
        case _:
            return ids[:0], learnt[:0]


def _overlong_error(uids: list[str], tokens: int, max_tokens: int) -> InputError:
    return InputError(
        f"products {', '.join(uids)}: too long: got {tokens} tokens; expected at most {max_tokens} (tokenize.max_tokens). "
        "Raise it, or set tokenize.on_overlength to drop, truncate or cut."
    )


def check_ends(encoded: Encoded, eos: int) -> None:
    """Assert that every answer is followed by EOS.

    Raises:
        InputError: when the tokenizer doesn't encode its EOS as one token of its own.
    """
    flat, _ = to_ids(encoded.ids)
    last = encoded.learnt & ~np.append(encoded.learnt[1:], False)
    wrong = int((flat[last] != eos).sum())
    if wrong:
        raise InputError(
            f"tokenizer.json: EOS: got {wrong} answers without EOS (id {eos}) behind them; expected it to be an added token. "
            "Choose a tokenizer whose EOS is one."
        )


def count_bos(encoded: Encoded, bos: int | None) -> int:
    """How many BOS there are beyond the one that every row must begin with.

    Raises:
        InputError: when a row doesn't begin with BOS.
    """
    flat, offsets = to_ids(encoded.ids)
    if bos is None or not len(encoded.ids):
        return 0
    if (flat[offsets[:-1]] != bos).any():
        raise InputError(f"tokenizer.json: BOS: got a row without BOS (id {bos}) in front; expected it to be an added token.")
    return int((flat == bos).sum()) - len(encoded.ids)


def _batch(encoded: Encoded, uids: pa.Array, config: TokenizeConfig, tally: Tally) -> pa.RecordBatch:
    """A record batch of tokens.arrow; adds its numbers to the tally."""
    import pyarrow as pa

    flat, offsets = to_ids(encoded.ids)
    labels = flat if config.loss_on == "everything" else np.where(encoded.learnt, flat, np.int32(IGNORED))
    seen = np.concatenate([[0], np.cumsum(labels != IGNORED)])
    tally.kept += len(uids)
    tally.tokens += len(flat)
    tally.learnt += int(seen[-1])
    tally.unlearnable += int((np.diff(seen[offsets]) == 0).sum())
    ends = pa.array(offsets, pa.int32())
    lists = [pa.ListArray.from_arrays(ends, pa.array(values, pa.int32())) for values in (flat, labels)]
    return pa.RecordBatch.from_arrays([uids, *lists], schema=_schema())


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema({"uids": pa.list_(pa.string()), "input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})


class Stream:
    """The batches of tokens.arrow, and the tally of what they went through."""

    def __init__(self, table: pa.Table, assemble: Assembler, special: tuple[int | None, int], config: TokenizeConfig) -> None:
        self.tally = Tally()
        self._table = table
        self._assemble = assemble
        self._bos, self._eos = special
        self._config = config

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        ranges = batch_ranges(self._table.num_rows, BATCH_ROWS // 4)
        for uids, encoded in in_order(self._encoded, ranges):
            lengths = np.diff(to_ids(encoded.ids)[1])
            self.tally.rows += len(uids)
            self.tally.longest = max(self.tally.longest, int(lengths.max(initial=0)))
            self.tally.overlong += int((lengths > self._config.max_tokens).sum())
            self.tally.stray_bos += count_bos(encoded, self._bos)
            check_ends(encoded, self._eos)
            fitting, kept = fit(encoded, uids, self._config, self._eos)
            yield _batch(fitting, uids if len(kept) == len(uids) else uids.take(kept), self._config, self.tally)

    def _encoded(self, span: tuple[int, int]) -> tuple[pa.ListArray, Encoded]:
        batch = one_batch(self._table.slice(span[0], span[1] - span[0]))
        products = batch["products"].flatten().to_numpy()
        return batch["uids"], self._assemble(products, len(products) // batch.num_rows)


@dataclass(frozen=True)
class Method:
    """How texts become ids: by turns where that is exact, else as wholes."""

    backend: Backend
    template: Template
    turns: TurnEncoder | None
    config: TokenizeConfig

    def write(self, texts: Artifact, draft: Path) -> Tally:
        """tokens.arrow (tasks/refs.py) of texts; the turns' bodies lie in a scratch file meanwhile."""
        gather = Gather(read_table(texts / "turns.arrow"))
        scratch = draft / "bodies.arrow"
        assemble = self._by_wholes(gather) if self.turns is None else self._by_turns(self.turns, texts, scratch)
        bos, eos = (self.template[name] and self.backend.token_to_id(self.template[name]) for name in ("bos", "eos"))
        stream = Stream(read_table(texts / "texts.arrow").select(["uids", "products"]), assemble, (bos, eos), self.config)
        write_table(draft / "tokens.arrow", _schema(), stream)
        scratch.unlink(missing_ok=True)
        return stream.tally

    def _by_turns(self, encoder: TurnEncoder, texts: Artifact, scratch: Path) -> Assembler:
        import pyarrow as pa

        def encode(span: tuple[int, int]) -> pa.RecordBatch:
            bodies = encoder.encode(one_batch(turns.slice(span[0], span[1] - span[0])))
            return pa.RecordBatch.from_arrays([bodies.ids, pa.array(bodies.unlearnt)], schema=schema)

        turns = read_table(texts / "turns.arrow")
        schema = pa.schema({"ids": pa.large_binary(), "unlearnt": pa.int64()})
        write_table(scratch, schema, in_order(encode, batch_ranges(turns.num_rows)))
        gather = Gather(read_table(scratch))

        def assemble(products: NDArray[np.integer], width: int) -> Encoded:
            bodies = gather(products)
            return encoder.join(Bodies(bodies["ids"], bodies["unlearnt"].to_numpy()), width)

        return assemble

    def _by_wholes(self, gather: Gather) -> Assembler:
        def assemble(products: NDArray[np.integer], width: int) -> Encoded:
            turns = gather(products)
            if self.config.special_tokens_in_products == "text":
                _refuse_specials(self.backend, turns)
            return encode_whole(self.backend, turns, width, self.template)

        return assemble


def _has_special(backend: Backend, turns: pa.RecordBatch) -> NDArray[np.bool_]:
    special = special_pattern(backend)
    columns = (turns[name].to_pylist() for name in ("prompt", "question", "answer"))
    return np.array([any(map(special.search, texts)) for texts in zip(*columns, strict=True)], bool)


def _refuse_specials(backend: Backend, turns: pa.RecordBatch) -> None:
    found = np.flatnonzero(_has_special(backend, turns))
    if len(found):
        raise InputError(
            f"product {turns['uid'][int(found[0])].as_py()}: special token in its text: this tokenizer can't take it for plain "
            "text. Set tokenize.special_tokens_in_products=control to let it be the token, or remove the product."
        )


def choose_method(texts: Artifact, backend: Backend, template: Template, config: TokenizeConfig) -> Method:
    """By turns if that equals encoding whole texts on a sample, else by wholes."""
    table = read_table(texts / "texts.arrow").select(["products"])
    plain = config.special_tokens_in_products == "text"
    rows = np.unique(np.linspace(0, table.num_rows - 1, SAMPLE_ROWS).astype(np.int64))
    lists = one_batch(table.take(rows))["products"]
    products = lists.flatten().to_numpy()
    width = len(products) // len(lists)
    sample = Gather(read_table(texts / "turns.arrow"))(products)
    if plain:
        clean = ~_has_special(backend, sample).reshape(-1, width).any(axis=1)
        sample = sample.filter(np.repeat(clean, width))
    turns = choose_encoder(backend, sample, width, template, plain=plain) if sample.num_rows else None
    if turns is None:
        logger.warning("tokenize: turns can't be encoded on their own with this tokenizer and template; whole texts are, slowly")
    return Method(backend, template, turns, config)


def check_tally(name: str, tally: Tally, config: TokenizeConfig) -> None:
    """Warn with numbers when rows were changed or have no label.

    Raises:
        InputError: when they are more than max_affected_share of all, or nothing is left.
    """
    if not tally.overlong + tally.unlearnable:
        return
    what = (
        f"{tally.overlong:,} of {tally.rows:,} rows are longer than {config.max_tokens} tokens (the longest has "
        f"{tally.longest:,}; {config.on_overlength}), {tally.unlearnable:,} have no label"
    )
    if tally.affected_share > config.max_affected_share or not tally.kept:
        raise InputError(
            f"{name}: too many rows affected: got {what}; expected at most {config.max_affected_share:.1%} of the rows "
            "(tokenize.max_affected_share). Raise tokenize.max_tokens, set on_overlength=truncate, or raise the share."
        )
    logger.warning("%s: %s", name, what)


def _tokenize(name: str, texts: Artifact, method: Method) -> tuple[Artifact, Tally]:
    with publish("tokens", need_bytes=3 * texts.size_bytes) as draft:
        tally = method.write(texts, draft.path)
        check_tally(f"tokenize {name}", tally, method.config)
        draft.rows = tally.kept
    return draft.artifact, tally


@stage(version=1)
def tokenize(texts: Texts, tokenizer: Tokenizer, config: TokenizeConfig) -> Split:
    """Ids and labels of both splits; BOS once, EOS after every answer, at most max_tokens a row."""
    template = json.loads((texts.template / "template.json").read_text(encoding="utf-8"))
    method = choose_method(texts.train, load_tokenizer(Path(tokenizer.path)), template, config)
    train, counted = _tokenize("training rows", texts.train, method)
    evaluation, _ = _tokenize("evaluation rows", texts.evaluation, method)
    logger.info(
        "tokenize: %s rows, %s tokens, %s of them learnt", f"{counted.kept:,}", f"{counted.tokens:,}", f"{counted.learnt:,}"
    )
    return Split(train=train, evaluation=evaluation, counts={**asdict(counted), "evaluation": evaluation.rows})


__all__ = ["Method", "Tally", "check_ends", "check_tally", "choose_method", "count_bos", "fit", "shorten", "tokenize"]
