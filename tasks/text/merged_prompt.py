"""The language of merged prompts: text, {column} fields, and `[[optional {column}]]` blocks.

    "T {title}[[, {content}]]"     Tutu, 3 layers      ->      T Tutu, 3 layers
                                   Tutu, (empty)       ->      T Tutu

Source: unsloth 2026.10.9, `chat_templates.to_sharegpt`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING

from tasks.refs import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

OPTIONAL_BLOCK = re.compile(r"\[\[(.+?)\]\]", re.DOTALL)


@dataclass(frozen=True)
class Column:
    """Stands for a product's value in a merged prompt."""

    name: str


@dataclass(frozen=True)
class PromptBlock:
    """A stretch of a merged prompt; with a gate it is left out where that column is empty."""

    parts: tuple[str | Column, ...]
    gate: Column | None = None


def prompt_columns(merged_prompt: str) -> tuple[str, ...]:
    """The columns that a merged prompt names, in its order.

    >>> prompt_columns("{brand}: {title}[[, {color}]] {{x}} {brand}")
    ('brand', 'title', 'color')

    Raises:
        ConfigError: as parse_merged_prompt, but for a column of any name.
    """
    parts = (part for block in parse_merged_prompt(merged_prompt, None) for part in block.parts)
    return tuple(dict.fromkeys(part.name for part in parts if isinstance(part, Column)))


def parse_merged_prompt(merged_prompt: str, columns: Sequence[str] | None) -> tuple[PromptBlock, ...]:
    """A merged prompt's blocks: text with {column} fields, braces doubled for themselves, `[[optional {column}]]`.

    >>> parse_merged_prompt("{{T}} {title}[[, {content}]]", ["title", "content"])  # doctest: +NORMALIZE_WHITESPACE
    (PromptBlock(parts=('{T} ', Column(name='title')), gate=None),
     PromptBlock(parts=(', ', Column(name='content')), gate=Column(name='content')))

    Args:
        merged_prompt: as described above.
        columns: those that there are; None for any.

    Raises:
        ConfigError: for an unknown column, a stray brace, or an optional block without a column.
    """
    blocks: list[PromptBlock] = []
    for index, text in enumerate(OPTIONAL_BLOCK.split(merged_prompt)):
        parts = _fields(text, columns)
        gate = next((part for part in parts if isinstance(part, Column)), None)
        if index % 2 == 0:
            blocks.append(PromptBlock(parts))
        elif gate is None:
            raise _prompt_error(f"got [[{text}]]; expected at least one {{column}} in an optional block. Name the column")
        else:
            blocks.append(PromptBlock(parts, gate))
    return tuple(block for block in blocks if block.parts)


def _fields(text: str, columns: Sequence[str] | None) -> tuple[str | Column, ...]:
    """A format string's literals and fields; `{lit}` that is no column is refused, `{{lit}}` is the text {lit}."""
    parts: list[str | Column] = []
    try:
        for literal, name, spec, conversion in Formatter().parse(text):
            if literal and parts and isinstance(parts[-1], str):
                parts[-1] += literal  # the parser ends a literal at each doubled brace
            elif literal:
                parts.append(literal)
            if name is None:
                continue
            if (columns is not None and name not in columns) or not name or spec or conversion:
                field = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                raise _prompt_error(f"got {{{field}}}; expected {_braced(columns)}. Double braces that stand for themselves")
            parts.append(Column(name))
    except ValueError as error:
        raise _prompt_error(f"got {text!r} ({error}); expected paired braces. Double braces that stand for themselves") from error
    return tuple(parts)


def _braced(columns: Sequence[str] | None) -> str:
    return "a column's name" if columns is None else "one of " + ", ".join(f"{{{name}}}" for name in columns)


def _prompt_error(what: str) -> ConfigError:
    return ConfigError(f"sharegpt.merged_prompt: {what}.")


def merge_columns(products: pa.RecordBatch, blocks: Sequence[PromptBlock]) -> pa.Array:
    """The prompt of each product.

    >>> import pyarrow as pa
    >>> products = pa.RecordBatch.from_pydict({"title": ["Tutu", ""], "content": ["3 layers", "Blue"]})
    >>> merge_columns(products, parse_merged_prompt("T[[ {title}]]", ["title"])).to_pylist()
    ['T Tutu', 'T']
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    def column(name: str) -> pa.Array:
        return pc.fill_null(products[name], "")

    def render(block: PromptBlock) -> pa.Array:
        parts = [part if isinstance(part, str) else column(part.name) for part in block.parts]
        text = pc.binary_join_element_wise(*parts, "")
        if block.gate is None:
            return text
        return pc.if_else(pc.not_equal(column(block.gate.name), ""), text, "")

    anchor = pa.repeat("", products.num_rows)  # gives a prompt without any column its length
    return pc.binary_join_element_wise(anchor, *map(render, blocks), "")
