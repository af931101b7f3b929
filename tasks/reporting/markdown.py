"""Numbers to markdown: tables, plots as images inside it. Pure; what the Prefect UI shows of a run is made here.

Every function returns markdown that stands alone. Plots are data URIs, which the UI shows without fetching anything.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import PurePosixPath as Path
from shlex import quote
from textwrap import wrap
from typing import Any

from tasks.reporting import plots
from tasks.reporting.visible import visible

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
    """Tables of the source's files, and of what became of their lines.

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


def marked_text(rows: Sequence[Sequence[tuple[str, bool]]]) -> str:
    """Rendered rows as (text, trained on) pieces, with what is trained on in brackets.

    >>> print(marked_text([[("Title? ", False), ("A pan.<eos>", True)]]))
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
        text = "".join(f"⟦{piece}⟧" if trained else piece for piece, trained in row)
        text = visible(text).replace("````", "'```")
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
    rows = [(name, number(value)) for name, value in (figures | dict(counts)).items()]
    plot = _image("rows by tokens in a row", plots.histogram(order, "tokens in a row", "rows", limit=limit))
    return f"# Token lengths\n\n{plot}\n\n{table(['training rows', ''], rows, numbers=[1])}\n"


def training_curve(points: Sequence[tuple[int, float]], figures: Mapping[str, object]) -> str:
    """The loss so far and how the training stands.

    Args:
        points: (step, mean loss).
        figures: what to list below the curve.
    """
    listed = table(["training", ""], [(name, number(value)) for name, value in figures.items()], numbers=[1])
    return f"# Training\n\n{curve(points, 'step', 'loss')}\n\n{listed}\n"


def answers_compared(comparison: str, generations: Sequence[Mapping[str, Any]]) -> str:
    """Base against tuned model: the table of numbers, and answers below each other, in lines that need no scrolling."""
    names = ("reference", "base", "tuned")
    answers = [
        "\n\n".join(
            [f"## {_cell(row['uid'])}", _fenced(row["prompt"]), *(f"**{name}**\n\n{_fenced(row[name])}" for name in names)]
        )
        for row in generations
    ]
    return "\n\n".join(["# Base against tuned", comparison, *(answers or ["No answers were generated."])]) + "\n"


def stages_table(stages: Sequence[Mapping[str, Any]]) -> str:
    """A table of a run's stages: entries of its run record."""
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


def model_files(path: str, host: str, files: Sequence[tuple[str, int]]) -> str:
    """Where the model lies and what belongs to it."""
    listed = table(["file", "KiB"], [(name, f"{size / 2**10:,.1f}") for name, size in files], numbers=[1])
    return f"# Model\n\nOn `{host}`:\n\n````text\n{path}\n````\n\n{listed}\n\nIts README.md says how to load it.\n"


def report_file(path: str, host: str) -> str:
    """Where report.html lies, and how to get it: no browser follows a page of a server to a file.

    >>> print(report_file("/data/my report.html", "gpu-1"))
    # Report
    <BLANKLINE>
    Everything about this run on one page, a file that needs no network. On `gpu-1`, open:
    <BLANKLINE>
    ````text
    /data/my report.html
    ````
    <BLANKLINE>
    From elsewhere, fetch it first:
    <BLANKLINE>
    ````bash
    scp gpu-1:'/data/my report.html' .
    ````
    <BLANKLINE>
    """
    opened = f"On `{host}`, open:\n\n````text\n{path}\n````"
    fetched = f"From elsewhere, fetch it first:\n\n````bash\nscp {host}:{quote(path)} .\n````"
    return f"# Report\n\nEverything about this run on one page, a file that needs no network. {opened}\n\n{fetched}\n"


def verdict_lines(told: str, reasons: Sequence[str], against: Sequence[str]) -> str:
    """Whether a model was promoted, why, and what it was compared with.

    >>> print(verdict_lines("promoted", ["better than the base model"], ["base"]))
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
    return _image(up, plots.curves({up: points}, across, up)) if points else "No step was logged yet."


def _image(alt: str, svg: str) -> str:
    return f"![{alt}](data:image/svg+xml;base64,{b64encode(svg.encode()).decode()})"


def number(value: object) -> str:
    """A number as short as it can be read.

    >>> number(12345), number(0.000012), number(2.5), number("cpu")
    ('12,345', '1.2e-05', '2.5', 'cpu')
    """
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _fenced(*texts: str) -> str:
    """Texts as they are, in lines of at most LINE characters."""
    lines = [part for text in texts for line in text.splitlines() for part in wrap(line, LINE) or [""]]
    body = visible("\n".join(lines)).replace("````", "'```")
    return f"````text\n{body}\n````"


def _shown(text: str) -> str:
    return text if len(text) <= LINE else f"{text[:LINE]}..."


def _cell(value: object) -> str:
    """Text that can't end its cell or start markup of its own."""
    text = visible(str(value)).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(text.split())
