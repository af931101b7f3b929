"""A product catalogue in the form of AmazonTitles-1.3MM's `trn.json`, generated, with facts that can be learnt.

    {"uid": "C000000017", "title": "Aurora Brushed Kettle 15 cm", "content": "...", "target_ind": [3], "target_rel": [1.0]}

Three facts follow from a title: its line belongs to one brand (Aurora -> Norvik), its finish tells the material
(Brushed -> stainless steel), its size is copied. A line, a finish and a size are drawn for each row, so a held-out
title combines known words anew. The defects are the true file's: a third of the contents and 6 % of the titles empty,
entities in a fifth of the contents, code points of Windows-1252, exact duplicates, broken lines.

`facts`, `title_in`, `states_facts` and `count_right` read a title or a prompt and judge answers.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tasks.caching.files import file_digest
from tasks.caching.stage import stage
from tasks.caching.store import publish
from tasks.config import CatalogueConfig
from tasks.refs import Source, SourceFile

FILE = "trn.json"
BYTES_A_ROW = 240

EMPTY_CONTENTS = 0.333
EMPTY_TITLES = 0.056
ENTITIES = 0.2
WINDOWS_1252 = 0.01
DUPLICATES = 0.05

BRANDS = {
    "Aurora": "Norvik",
    "Boreal": "Castello",
    "Cascade": "Norvik",
    "Delta": "Okafor",
    "Ember": "Tanaka",
    "Fjord": "Castello",
    "Garnet": "Okafor",
    "Horizon": "Tanaka",
}
"""Product line -> brand."""

MATERIALS = {
    "Brushed": "stainless steel",
    "Glazed": "ceramic",
    "Grained": "oak wood",
    "Clear": "glass",
    "Woven": "cotton",
    "Supple": "leather",
}
"""Finish -> material."""

TITLE = re.compile(rf"\b(?:{'|'.join(BRANDS)}) (?:{'|'.join(MATERIALS)}) \w+ \d+ cm\b")

KINDS = ("Tray", "Box", "Bowl", "Basket", "Lamp", "Clock", "Vase", "Frame", "Stool", "Planter")
SIZES_CM = range(10, 60)

SENTENCES = (
    "This {line} {kind} is {brand}'s. Its {finish} look is {material}, and it measures {size} cm.",
    "The {line} line is {brand}'s. A {kind} in {finish} {material}, {size} cm wide.",
    "{line} stands for {brand}'s work: a {kind} of {finish} {material}, {size} cm across.",
)
"""Forms of an answer; each kind of product keeps to one."""


@dataclass(frozen=True)
class Facts:
    """All that can be known of a product from its title."""

    brand: str
    material: str
    size_cm: int


def facts(title: str) -> Facts:
    """The facts that follow from a title of the catalogue.

    >>> facts("Aurora Brushed Tray 15 cm")
    Facts(brand='Norvik', material='stainless steel', size_cm=15)

    Raises:
        ValueError: for a title that is none of the catalogue's.
    """
    try:
        line, finish, _, size, _ = title.split()
        return Facts(BRANDS[line], MATERIALS[finish], int(size))
    except (KeyError, ValueError):
        raise ValueError(f"title {title!r}: expected LINE FINISH KIND SIZE cm, as the catalogue writes it") from None


def title_in(prompt: str) -> str:
    r"""The title that a prompt asks about: the last one in it.

    >>> title_in("### Título do produto:\nTítulo do produto: Aurora Brushed Tray 15 cm\n\n### Pergunta:")
    'Aurora Brushed Tray 15 cm'

    Raises:
        ValueError: when there is none.
    """
    if not (found := TITLE.findall(prompt)):
        raise ValueError(f"prompt {prompt!r}: expected a title of the form LINE FINISH KIND SIZE cm in it")
    return found[-1]


def states_facts(title: str, answer: str) -> bool:
    """Whether an answer names the title's brand and material and no other.

    >>> states_facts("Aurora Brushed Tray 15 cm", "Norvik's Aurora tray is made of stainless steel.")
    True
    >>> states_facts("Aurora Brushed Tray 15 cm", "Norvik's Aurora tray is made of glass.")
    False
    """
    known = facts(title)
    return _named(BRANDS, answer) == {known.brand} and _named(MATERIALS, answer) == {known.material}


def count_right(generations: Iterable[Mapping[str, str]], model: str) -> int:
    """How many of a model's answers, `base` or `tuned`, state the facts of the title in their prompt.

    >>> count_right([{"prompt": "Aurora Brushed Tray 15 cm: ", "base": "A tray.", "tuned": "Norvik, stainless steel."}], "tuned")
    1
    """
    titled = (asked for asked in generations if TITLE.search(asked["prompt"]))
    return sum(states_facts(title_in(asked["prompt"]), asked[model]) for asked in titled)


def _named(words: dict[str, str], answer: str) -> set[str]:
    return {word for word in words.values() if word in answer}


def product(rng: random.Random) -> tuple[str, str]:
    """A drawn title and the content that states its facts."""
    line, finish, kind = (rng.choice(words) for words in (tuple(BRANDS), tuple(MATERIALS), KINDS))
    size = rng.choice(SIZES_CM)
    sentence = SENTENCES[KINDS.index(kind) % len(SENTENCES)]
    content = sentence.format(
        line=line, brand=BRANDS[line], finish=finish.lower(), material=MATERIALS[finish], kind=kind.lower(), size=size
    )
    return f"{line} {finish} {kind} {size} cm", content


def blemished(title: str, content: str, rng: random.Random) -> tuple[str, str]:
    """The pair with at most one of the true file's defects in each text."""
    if rng.random() < EMPTY_TITLES:
        title = ""
    draw = rng.random()
    if draw < EMPTY_CONTENTS:
        return title, ""
    if draw < EMPTY_CONTENTS + ENTITIES * (1 - EMPTY_CONTENTS):
        return title, content.replace("'", "&#39;")
    if draw < EMPTY_CONTENTS + (ENTITIES + WINDOWS_1252) * (1 - EMPTY_CONTENTS):
        return title, content.replace("'", "\x92")
    return title, content


def lines(config: CatalogueConfig) -> Iterator[str]:
    """The lines of the file: `config.rows` of them, `config.malformed_lines` cut off in the middle."""
    rng = random.Random(config.seed)
    broken = {(index + 1) * config.rows // (config.malformed_lines + 1) for index in range(config.malformed_lines)}
    title, content = "", ""
    for row in range(config.rows):
        if not row or rng.random() >= DUPLICATES:
            title, content = blemished(*product(rng), rng)
        line = _line(row, title, content, rng)
        yield line[: len(line) // 2] if row in broken else line


def _line(row: int, title: str, content: str, rng: random.Random) -> str:
    targets = sorted({rng.randrange(row + 1) for _ in range(3)})
    fields = {"uid": f"C{row:09d}", "title": title, "content": content, "target_ind": targets, "target_rel": [1.0] * len(targets)}
    return json.dumps(fields)


@stage(version=1)
def catalogue(config: CatalogueConfig) -> Source:
    """Generate the catalogue as `trn.json`; the same bytes for the same settings."""
    with publish("catalogue", need_bytes=BYTES_A_ROW * config.rows) as draft:
        with (draft / FILE).open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines(config))
        draft.rows = config.rows
        digest = file_digest(draft / FILE)
        size = (draft / FILE).stat().st_size
    path = draft.artifact / FILE
    return Source(files=(SourceFile(url=str(path), digest=digest, size_bytes=size),), artifact=draft.artifact)
