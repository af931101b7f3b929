"""A product file of the true shape, any number of rows, made in seconds and always the same.

    {"uid": "000000000A", "title": "...", "content": "...", "target_ind": [17, 4], "target_rel": [1.0, 1.0]}

The shape is that of AmazonTitles-1.3MM's `trn.json` (2,248,619 rows, 1.7 GB): 5.6 % of the titles and 33.3 % of the contents
empty, HTML references in 20 % of the contents, contents spread as a log-normal around 80 words, the longest of about 200,000
characters, some 20 targets a row. Words are drawn by Zipf's law, so that a sample of any size goes on to meet new ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from tasks.caching.files import space_checked

if TYPE_CHECKING:
    import pyarrow as pa

TRUE_ROWS = 2_248_619
ROW_BYTES = 810
"""About the mean length of a line."""
SEED = 1300
CHUNK_ROWS = 65_536
"""Rows drawn at a time."""

EMPTY_TITLES = 0.056
EMPTY_CONTENTS = 0.333
REFERENCES = 0.2
"""Share of the contents that hold an HTML reference."""
DUPLICATES = 0.01
CONTENT_WORDS = (80, 0.79)
"""Median, and standard deviation of the logarithm. Source: 700 real rows: median 477 characters, mean 654."""
TITLE_WORDS = (6, 0.5)
TARGETS = (12, 1.0)
LONG_SHARE = 1e-4
"""Contents of a different kind, whole books, up to the longest."""
LONGEST_WORDS = 32_000

COMMON = """
the and a of to in is for with this that on it are as you from by an your or be his has at book can not have was but all will
her their more one he which who its new they about we when how into our out up so if there what these been also were other
time than first my some life over most like world use only after through them years many made it's would us two great just
where no any well between make work best story each may people way including features before him then very she while such
even music your own set easy guide American most both history series during high size find family love because book, author
author's design day use, power home back much quality every cover it, children them, including, look black perfect take used
art must off long little through, color under around need good don't water made, small light old school full same help inches
learn written young part those should women edition being give three without together stories second live available man
right here game three, pages place experience house white body heart collection available. women's different order end get
want down several within live, simple system information real modern want, complete includes God product war original place,
classic hand against free provides child never city special early last another today case now know see large next published
still recipes change important always top line features, natural keep own, once true free, English themselves self often
material cotton steel blue red green silver leather plastic glass wooden stainless battery cable screen camera phone wireless
adapter charger warranty package weight height width length dimension bottle kitchen garden bedroom bathroom outdoor travel
protect protection durable lightweight comfortable adjustable removable washable machine dry wash design, style fashion gift
birthday Christmas holiday party wedding baby toddler boys girls men's kids adult dog cat pet food tea coffee sugar organic
skin hair face oil cream shampoo vitamin health medical doctor science scientific theory practice research university
professor Paperback Hardcover illustrated photographs map maps volume novel fiction mystery romance adventure poetry essays
biography memoir album songs track recording guitar piano drum band rock jazz classical orchestra opera film movie season
episode DVD VHS director actor cast scene action comedy drama horror thriller documentary animation cartoon puzzle toy doll
train truck car engine motor brake wheel tire vehicle replacement install installation tool drill saw screw bolt metal wood
paint brush paper pen pencil ink printer computer laptop software Windows driver memory disk drive USB port network internet
website review reviews award winning bestselling author, editor publisher Times York London Paris Japan China Germany France
Italian Spanish French Latin Greek Roman ancient medieval century king queen empire battle soldier army navy ship sea ocean
river mountain forest desert animal bird fish horse wolf bear dragon magic witch ghost vampire hero legend myth folk tale
philosophy religion Christian Jewish Buddhist Bible prayer faith spirit soul mind psychology therapy relationship marriage
parent mother father daughter son brother sister friend teacher student class lesson exercise test exam study course workbook
business management marketing finance investment economy market company leadership strategy success career job money price
"""
STEMS = """
light water stone fire wind moon star sun night day book hand foot head eye heart hair bone blood wood iron gold silver glass
paper cloth thread needle wheel road bridge tower castle garden field river lake shore wave storm cloud rain snow frost smoke
dust sand salt sugar honey bread cake wine beer milk cheese apple berry rose leaf root seed grass tree branch bird wing
feather nest horse hound wolf fox bear lion tiger snake fish whale shell pearl crown throne sword shield arrow spear horn drum
bell song dance play game toy doll box case bag pack lock key door gate wall floor roof room house shop store market trade
craft smith wright mill forge press print type script letter word page chapter verse rhyme tale myth dream sleep wake walk run
jump climb swim fly ride drive steer sail row pull push lift carry hold catch throw kick strike cut carve shape form mold cast
melt pour mix stir boil bake roast grill fry smoke cure dry wash clean brush comb paint draw sketch trace mark sign stamp seal
"""
PREFIXES = ("", "re", "un", "over", "under", "out", "fore", "cross")
SUFFIXES = ("", "s", "ed", "ing", "er", "ers", "ly", "less", "ful", "man", "ton", "ville", "berg", "son", "'s", ",", ".", "-")
SYLLABLES = ("ka", "lo", "mi", "ren", "sha", "tor", "vel", "na", "ji", "do", "bru", "chen", "fa", "gri", "hol", "ster")
ODD = (
    r"caf\u00e9", "café", "naïve", r"\u2014", r"\"Best", r"edition\"", "\\\\", r"Sr.\t", "™", "“new”", "東京", r"\u0092s",
    "<b>", "</p>", "(p)", "...", "--", "*", "/", "100%",
)  # fmt: skip
"""Words that need an escape or lie outside ASCII, as JSON."""
REFERENCE_WORDS = ("&amp;", "&quot;new&quot;", "author&#8217;s", "day&#8212;and", "&lt;br&gt;", "Jos&eacute;", "&reg;", "&#x27;t")
CONSONANTS = "BCDFGHJKLMNPRSTVWXZ"
CODES = 40_000
ZIPF = (100, 2.1)
"""Offset and exponent by which words grow rarer: with them, a text has as many Llama 3 tokens a character as a real one."""
DRAWS = 2**22


class Words(NamedTuple):
    """The vocabulary of texts: plain words by falling frequency, each with a space; at the end the references."""

    spaced: pa.StringArray
    last: pa.StringArray
    """The same without the space: how a text ends."""
    plain: int
    """How many there are before the references."""
    drawn: NDArray[np.int32]
    """Numbers of plain words, each as often as it is likely: an element drawn evenly is a word drawn by its chance."""


def product_file(rows: int, directory: Path) -> Path:
    """The file of so many rows; made in the directory unless it is there."""
    path = directory / f"trn-{rows}-{_version()}.json"
    if not path.exists():
        draft = path.with_name(f".{path.name}-{uuid4().hex}")
        try:
            with space_checked(draft, rows * ROW_BYTES):
                directory.mkdir(parents=True, exist_ok=True)
                with draft.open("wb") as file:
                    for chunk in product_lines(rows):
                        file.write(chunk)
                draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    return path


def table_file(lines: Path, ending: str) -> Path:
    """The file's uids, titles and contents as CSV or Parquet, beside it; made unless it is there."""
    import polars as pl

    path = lines.with_suffix(f".{ending}")
    if not path.exists():
        draft = path.with_name(f".{path.name}-{uuid4().hex}")
        texts = pl.scan_ndjson(lines, schema=dict.fromkeys(("uid", "title", "content"), pl.String))
        try:
            with space_checked(draft, lines.stat().st_size):
                texts.sink_csv(draft) if ending == "csv" else texts.sink_parquet(draft)
                draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    return path


def _version() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def product_lines(rows: int) -> Iterator[memoryview]:
    """The file's bytes, many whole lines at a time; the rows of a smaller file are the first of a larger one."""
    words = make_words()
    for start in range(0, rows, CHUNK_ROWS):
        chunk = _chunk(np.random.default_rng([SEED, start]), words, start)
        lines = chunk.slice(0, min(CHUNK_ROWS, rows - start))
        end = lines.offset + len(lines)
        _, offsets, data = lines.buffers()
        yield memoryview(data)[: int(np.frombuffer(offsets, np.int64)[end])]


def _chunk(rng: np.random.Generator, words: Words, start: int) -> pa.LargeStringArray:
    """Lines of rows `start` and on."""
    import pyarrow as pa
    from pyarrow import compute

    titles = _texts(rng, words, _lengths(rng, TITLE_WORDS, EMPTY_TITLES), references=0)
    contents = _texts(rng, words, _content_lengths(rng, start), REFERENCES)
    copied = np.arange(CHUNK_ROWS)
    again = np.flatnonzero(rng.random(CHUNK_ROWS) < DUPLICATES)
    copied[again] = rng.integers(0, again + 1)
    uids = pa.array([f"{row:010X}" for row in range(start, start + CHUNK_ROWS)], pa.large_string())
    counts = np.maximum(_lengths(rng, TARGETS, 0), 1)
    pieces = [
        '{"uid": "', uids, '", "title": "', titles.take(pa.array(copied)), '", "content": "', contents.take(pa.array(copied)),
        '", "target_ind": [', _numbers(rng, counts), '], "target_rel": [',
        compute.call_function("binary_repeat", [pa.scalar("1.0, ", pa.large_string()), pa.array(counts - 1)]), "1.0]}\n",
    ]  # fmt: skip
    texts = [pa.scalar(piece, pa.large_string()) if isinstance(piece, str) else piece for piece in pieces]
    return compute.call_function("binary_join_element_wise", [*texts, pa.scalar("", pa.large_string())])


def _lengths(rng: np.random.Generator, spread: tuple[float, float], empty: float) -> NDArray[np.int64]:
    """Words of each text: log-normal, at least 1, or 0 for an empty one."""
    median, sigma = spread
    lengths = np.maximum(rng.lognormal(np.log(median), sigma, CHUNK_ROWS).astype(np.int64), 1)
    return np.where(rng.random(CHUNK_ROWS) < empty, 0, lengths)


def _content_lengths(rng: np.random.Generator, start: int) -> NDArray[np.int64]:
    lengths = _lengths(rng, CONTENT_WORDS, EMPTY_CONTENTS)
    long = np.flatnonzero(rng.random(CHUNK_ROWS) < LONG_SHARE)
    lengths[long] = np.minimum(2000 / np.maximum(rng.random(len(long)), 1e-9), LONGEST_WORDS).astype(np.int64)
    if start == 0:
        lengths[17] = LONGEST_WORDS
    return lengths


def _texts(rng: np.random.Generator, words: Words, lengths: NDArray[np.int64], references: float) -> pa.LargeStringArray:
    """A text of so many words for each length; words run from one text to the next, so a text is a slice of them all."""
    import pyarrow as pa

    ends = np.cumsum(lengths)
    drawn = words.drawn[rng.integers(0, DRAWS, ends[-1], np.uint32)]
    held = np.flatnonzero((rng.random(len(lengths)) < references) & (lengths > 0))
    places = (ends - lengths)[held] + rng.integers(0, lengths[held])
    drawn[places] = words.plain + rng.integers(0, len(words.spaced) - words.plain, len(places))
    drawn[ends[lengths > 0] - 1] += len(words.spaced)
    both = pa.concat_arrays([words.spaced, words.last]).cast(pa.large_string())
    text = both.take(pa.array(drawn))
    _, starts, data = text.buffers()
    offsets = np.frombuffer(starts, np.int64)[np.concatenate([[0], ends])]
    return pa.LargeStringArray.from_buffers(len(lengths), pa.py_buffer(offsets), data)


def _numbers(rng: np.random.Generator, counts: NDArray[np.int64]) -> pa.LargeStringArray:
    """So many target numbers, parted by commas, for each row."""
    import pyarrow as pa
    from pyarrow import compute

    numbers = pa.array(rng.integers(0, 1_305_265, counts.sum()))
    lists = pa.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(counts)]), numbers.cast(pa.large_string()))
    return compute.call_function("binary_join", [lists, pa.scalar(", ", pa.large_string())])


@cache
def make_words() -> Words:
    """A vocabulary: common English words, then derived and compound ones, names, numbers and codes, rarer and rarer."""
    import pyarrow as pa

    rng, common, stems = np.random.default_rng(SEED), COMMON.split(), STEMS.split()
    derived = [a + stem + b for a, stem, b in product(PREFIXES, stems, SUFFIXES)]
    compound = ["".join(pair) for pair in product(stems, stems)]
    names = ["".join(parts).capitalize() for size in (2, 3, 4) for parts in product(SYLLABLES, repeat=size)]
    letters, digits = rng.choice(list(CONSONANTS), (2, CODES)), rng.integers(10, 9999, CODES)
    codes = [f"{a}{b}-{number}" for a, b, number in zip(*letters, digits, strict=True)]
    numbers = [*map(str, range(3000)), *(f"{n / 10:.1f}" for n in range(2000))]
    rare = sorted({*derived, *(word.capitalize() for word in derived), *compound, *names, *codes, *numbers} - {*common, *ODD})
    rare = [rare[at] for at in rng.permutation(len(rare))]
    plain = list(dict.fromkeys([*common, *ODD, *rare]))
    chances = np.cumsum((np.arange(len(plain)) + ZIPF[0]) ** -ZIPF[1])
    drawn = np.searchsorted(chances, (np.arange(DRAWS) + 0.5) * (chances[-1] / DRAWS)).astype(np.int32)
    every = [*plain, *REFERENCE_WORDS]
    return Words(pa.array([f"{word} " for word in every]), pa.array(every), len(plain), drawn)
