"""Products as the data stages take them, and what the stages make of them as plain lists."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from tasks.caching.store import publish
from tasks.config import SharegptConfig, TemplateConfig, TokenizeConfig
from tasks.refs import Artifact, Special, Split, Texts, Tokenizer
from tasks.sharegpt import sharegpt
from tasks.tables.arrow import read_table, write_table
from tasks.template import template
from tasks.text.encoding import to_ids
from tasks.tokenize import tokenize
from tests.support.tiny import BOS, EOS, make_tiny_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
SPECIAL = Special(bos=BOS, eos=EOS)
AS_WRITTEN = {"fill_question": False}
Pairs = Iterable[tuple[str, str]]


def golden_products() -> list[tuple[str, str]]:
    """Awkward (title, content) pairs."""
    return [(row["title"], row["content"]) for row in json.loads((GOLDEN / "products.json").read_text(encoding="utf-8"))]


def publish_products(rows: Pairs) -> Artifact:
    """products.arrow of (title, content) pairs; row i has the uid `ui`."""
    schema = pa.schema([(name, pa.string()) for name in ("uid", "title", "content")])
    made = [{"uid": f"u{number}", "title": title, "content": content} for number, (title, content) in enumerate(rows)]
    with publish("products") as draft:
        batches = [pa.RecordBatch.from_pylist(made[start : start + 3], schema) for start in range(0, len(made), 3)]
        draft.rows = write_table(draft / "products.arrow", schema, batches)
    return draft.artifact


def split_products(rows: Pairs, evaluation: Pairs = (("Held out", "Kept"),)) -> Split:
    """What the sample stage would hand on."""
    return Split(train=publish_products(rows), evaluation=publish_products(evaluation))


def converse(rows: Pairs, turns: int = 1, **changes: Any) -> Split:
    """Conversations of products."""
    return sharegpt.fn(split_products(rows), SharegptConfig(conversation_extension=turns, **changes))


def render(rows: Pairs, turns: int = 1, special: Special = SPECIAL, **changes: Any) -> Texts:
    """Texts of products; `changes` are of the template section."""
    return template.fn(converse(rows, turns), special, TemplateConfig(**changes))


def encode(texts: Texts, directory: Path, **changes: Any) -> Split:
    """Tokens of texts by the tokenizer of a directory, a tiny one if it is not there yet."""
    if not (directory / "tokenizer.json").exists():
        directory.mkdir(exist_ok=True)
        make_tiny_tokenizer().save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer(path=str(directory), digest="tiny", special=SPECIAL)
    return tokenize.fn(texts, tokenizer, TokenizeConfig(**changes))


def rows_of(artifact: Artifact, name: str | None = None) -> list[dict[str, Any]]:
    """The rows of an artifact's file; its main one bears the name of its kind."""
    return read_table(artifact / f"{name or artifact.kind}.arrow").to_pylist()


def id_rows(column: pa.LargeBinaryArray) -> list[list[int]]:
    """The ids of each text."""
    ids, offsets = to_ids(column)
    return [ids[start:end].tolist() for start, end in pairwise(offsets)]


def lines(rows: Iterable[Any]) -> str:
    """JSON, one row a line, for golden files."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"
