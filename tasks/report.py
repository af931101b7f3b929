"""Numbers to markdown: tables, plots as SVG images inside it. Pure; what the Prefect UI shows of a run is made here.

Every function returns markdown that stands alone. Plots are data URIs, which the UI shows without fetching anything.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import PurePosixPath as Path
from textwrap import wrap
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 260, 64, 36, 16
"""Of a plot, in pixels; the last three are its margins."""
BLUE, GREY = "#2563eb", "#8a8f98"
BINS = 24
POINTS = 400
"""That a curve is drawn through, about; more would only make the page slow."""
LINE = 110
"""Characters of a line that the UI shows without scrolling."""


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = ()) -> str:
    """A markdown table; the columns named by `numbers` are set flush right.

    >>> print(table(["what", "rows"], [["kept", 3]], numbers=[1]))
    | what | rows |
    |---|---:|
    | kept | 3 |
    """
    rule = "|".join("---:" if index in numbers else "---" for index in range(len(head)))
    lines = [f"| {' | '.join(head)} |", f"|{rule}|"]
    return "\n".join([*lines, *(f"| {' | '.join(_cell(value) for value in row)} |" for row in rows)])


def source_profile(files: Sequence[tuple[str, int]], lines: int, kept: int, dropped: Mapping[str, int], rejected: int) -> str:
    """What became of the source's lines.

    Args:
        files: (name, bytes) of each.
        lines: that were read.
        kept: rows that go on.
        dropped: rows by reason.
        rejected: lines set aside because they are no products.
    """
    share = {"kept": kept, **dropped, "set aside: malformed": rejected}
    rows = [(what, f"{count:,}", f"{count / max(lines, 1):.1%}") for what, count in share.items() if count or what == "kept"]
    sizes = table(["file", "MiB"], [(name, f"{size / 2**20:,.1f}") for name, size in files], numbers=[1])
    return f"# Source\n\n{sizes}\n\n{table(['lines', 'count', 'share'], [*rows, ('all', f'{lines:,}', '')], numbers=[1, 2])}\n"


def marked_rows(rows: Sequence[Sequence[tuple[str, bool]]]) -> str:
    """Rendered rows as (text, trained on) pieces, with what is trained on in brackets.

    >>> print(marked_rows([[("Title? ", False), ("A pan.<eos>", True)]]))
    # Rendered rows
    <BLANKLINE>
    What the model is trained to say stands in ⟦ ⟧; the rest is only read.
    <BLANKLINE>
    ## Row 1
    <BLANKLINE>
    ````text
    Title? ⟦A pan.<eos>⟧
    ````
    <BLANKLINE>
    """
    parts = ["# Rendered rows\n\nWhat the model is trained to say stands in ⟦ ⟧; the rest is only read.\n"]
    for number, row in enumerate(rows, start=1):
        text = "".join(f"⟦{piece}⟧" if trained else piece for piece, trained in row).replace("````", "'```")
        parts.append(f"## Row {number}\n\n````text\n{text}\n````\n")
    return "\n".join(parts)


def pieces(ids: Sequence[int], labels: Sequence[int]) -> list[tuple[list[int], bool]]:
    """Runs of ids that are trained on and that are not.

    >>> pieces([0, 5, 6, 1], [-100, -100, 6, 1])
    [([0, 5], False), ([6, 1], True)]
    """
    marked = zip(ids, (label >= 0 for label in labels), strict=True)
    return [([number for number, _ in run], trained) for trained, run in groupby(marked, key=lambda item: item[1])]


def token_lengths(lengths: Sequence[int], limit: int, counts: Mapping[str, float]) -> str:
    """How long the training rows are.

    Args:
        lengths: tokens of each row.
        limit: tokenize.max_tokens.
        counts: what else tokenizing counted.
    """
    if not lengths:
        return "# Token lengths\n\nNo rows.\n"
    order = sorted(lengths)
    figures = {
        "rows": len(order),
        "tokens": sum(order),
        "shortest": order[0],
        "median": order[len(order) // 2],
        "95 of 100 have at most": order[int(len(order) * 0.95)],
        "longest": order[-1],
        "limit": limit,
    }
    rows = [(name, _number(value)) for name, value in (figures | dict(counts)).items()]
    plot = bars(_histogram(order), "tokens in a row", "rows")
    return f"# Token lengths\n\n{plot}\n\n{table(['training rows', ''], rows, numbers=[1])}\n"


def training(points: Sequence[tuple[int, float]], figures: Mapping[str, object]) -> str:
    """The loss so far and how the training stands.

    Args:
        points: (step, mean loss).
        figures: what to list below the curve.
    """
    listed = table(["training", ""], [(name, _number(value)) for name, value in figures.items()], numbers=[1])
    return f"# Training\n\n{curve(points, 'step', 'loss')}\n\n{listed}\n"


def evaluation(comparison: str, generations: Sequence[Mapping[str, Any]]) -> str:
    """Base against tuned model: the table of numbers, and answers below each other, in lines that need no scrolling."""
    names = ("reference", "base", "tuned")
    answers = [
        f"## {number}\n\n{_fenced(row['prompt'])}\n\n{_fenced(*(f'{name}: {row[name]}' for name in names))}"
        for number, row in enumerate(generations, start=1)
    ]
    return "\n\n".join(["# Base against tuned", comparison, *(answers or ["No answers were generated."])]) + "\n"


def lineage(stages: Sequence[Mapping[str, Any]]) -> str:
    """What each stage of a run did: entries of its run record."""
    head = ["stage", "state", "rows", "seconds", "why", "key", "output"]
    rows = [
        (
            entry["name"],
            entry["state"],
            f"{entry['rows']:,}" if "rows" in entry else "",
            f"{entry['seconds']:.1f}" if "seconds" in entry else "",
            _shown(entry["reason"]),
            f"`{entry['key'][:8]}`",
            f"`{Path(entry['path']).parent.name}/{Path(entry['path']).name[:8]}`" if "path" in entry else "",
        )
        for entry in stages
    ]
    return f"# Stages\n\n{table(head, rows, numbers=[2, 3])}\n"


def output(path: str, host: str, files: Sequence[tuple[str, int]]) -> str:
    """Where the model lies and what belongs to it."""
    listed = table(["file", "KiB"], [(name, f"{size / 2**10:,.1f}") for name, size in files], numbers=[1])
    return f"# Model\n\nOn `{host}`:\n\n````text\n{path}\n````\n\n{listed}\n\nIts README.md says how to load it.\n"


def verdict(told: str, reasons: Sequence[str], against: Sequence[str]) -> str:
    """Whether a model was promoted, why, and what it was compared with.

    >>> print(verdict("promoted", ["better than the base model"], ["base"]))
    # Verdict: promoted
    <BLANKLINE>
    - better than the base model
    <BLANKLINE>
    Compared with: base.
    <BLANKLINE>
    """
    compared = f"Compared with: {', '.join(against)}." if against else "Compared with nothing."
    return "\n".join([f"# Verdict: {told}", "", *(f"- {_cell(reason)}" for reason in reasons), "", compared, ""])


def curve(points: Sequence[tuple[int, float]], across: str, up: str) -> str:
    """A line through the points; a note while there are none."""
    if not points:
        return "No step was logged yet."
    points = [*points[:: max(1, len(points) // POINTS)], points[-1]]
    high, low = max(value for _, value in points), min(0.0, *(value for _, value in points))
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    spots = [(_x((step - first) / (last - first)), _y((value - low) / (high - low or 1))) for step, value in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{BLUE}"/>' for x, y in spots) if len(spots) < 40 else ""
    line = f'<polyline fill="none" stroke="{BLUE}" stroke-width="2" points="{path}"/>{dots}'
    return _image(up, _frame(line, (first, last), (low, high), across, up))


def bars(bins: Sequence[tuple[float, float, int]], across: str, up: str) -> str:
    """A bar for each (from, to, count)."""
    high = max(count for _, _, count in bins)
    start, end = bins[0][0], bins[-1][1]
    drawn: list[str] = []
    for left, right, count in bins:
        x, width = _x((left - start) / (end - start or 1)), (right - left) / (end - start or 1) * (WIDTH - LEFT - 16)
        y = _y(count / high)
        height = HEIGHT - BOTTOM - y
        drawn.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(1, width - 1):.1f}" height="{height:.1f}" fill="{BLUE}"/>')
    return _image(f"{up} by {across}", _frame("".join(drawn), (start, end), (0, high), across, up))


def _histogram(order: Sequence[int]) -> list[tuple[float, float, int]]:
    """At most BINS equal bins over sorted numbers."""
    width = max(1, -(-(order[-1] - order[0] + 1) // BINS))
    counts = dict.fromkeys(range(order[0], order[-1] + 1, width), 0)
    for length in order:
        counts[order[0] + (length - order[0]) // width * width] += 1
    return [(start, start + width, count) for start, count in counts.items()]


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - 16)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def _frame(drawing: str, across: tuple[float, float], up: tuple[float, float], x_name: str, y_name: str) -> str:
    """The drawing with axes, their ends and their names."""
    base = HEIGHT - BOTTOM
    texts = [
        (LEFT, base + 16, "start", _number(across[0])),
        (WIDTH - 16, base + 16, "end", _number(across[1])),
        ((LEFT + WIDTH - 16) / 2, base + 30, "middle", x_name),
        (LEFT - 6, base, "end", _number(up[0])),
        (LEFT - 6, TOP + 8, "end", _number(up[1])),
        (LEFT - 6, (base + TOP) / 2, "end", y_name),
    ]
    written = "".join(f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{text}</text>' for x, y, anchor, text in texts)
    axes = f'<path d="M{LEFT} {TOP}V{base}H{WIDTH - 16}" fill="none" stroke="{GREY}"/>'
    style = f'font-family="sans-serif" font-size="12" fill="{GREY}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"<g {style}>{axes}{written}</g>{drawing}</svg>"
    )


def _image(alt: str, svg: str) -> str:
    return f"![{alt}](data:image/svg+xml;base64,{b64encode(svg.encode()).decode()})"


def _number(value: object) -> str:
    """A number as short as it can be read.

    >>> _number(12345), _number(0.000012), _number(2.5), _number("cpu")
    ('12,345', '1.2e-05', '2.5', 'cpu')
    """
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _fenced(*texts: str) -> str:
    """Texts as they are, in lines of at most LINE characters."""
    lines = [part for text in texts for line in text.splitlines() for part in wrap(line, LINE) or [""]]
    body = "\n".join(lines).replace("````", "'```")
    return f"````text\n{body}\n````"


def _shown(text: str) -> str:
    return text if len(text) <= LINE else f"{text[:LINE]}..."


def _cell(value: object) -> str:
    """Text that can't end its cell or start markup of its own."""
    text = str(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(text.split())


__all__ = [
    "bars",
    "curve",
    "evaluation",
    "lineage",
    "marked_rows",
    "output",
    "pieces",
    "source_profile",
    "table",
    "token_lengths",
    "training",
    "verdict",
]
