"""Curves and histograms as SVG text, drawn by matplotlib; equal numbers give equal bytes.

Axes and text are GREY, which can be read on white and on black; a page that knows its own colour puts it in GREY's place.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[float, float]]
"""(x, y), x ascending."""

INCHES = (5.2, 2.5)
GREY = "#8a8f98"
COLOURS = ("#3b82f6", "#f97316")
BINS = 24
POINTS = 400
"""That a curve is drawn through, about; more would only make the page slow."""
HEADROOM = 1.1
"""The axes' top over the highest point: the room left by itself is a share of what a curve spans, which may be nothing."""
MARKED = 40
"""Up to so many points are marked, so that a single one can be seen."""
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "amazon-ft",
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def curves(series: Mapping[str, Points], across: str, up: str) -> str:
    """A line for each named series that has points; with a legend where there are several."""
    drawn = {name: thinned(points) for name, points in series.items() if points}

    def draw(axes: Axes) -> None:
        for (name, points), colour in zip(drawn.items(), COLOURS, strict=False):
            marker = "o" if len(points) <= MARKED else ""
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3, linewidth=1.6, label=name, gid=name)
        heights = [y for points in drawn.values() for _, y in points]
        if min(heights, default=0.0) >= 0:
            axes.set_ylim(0, HEADROOM * max(heights, default=0.0) or None)
        if len(drawn) > 1:
            axes.legend()

    return _svg(draw, across, up)


def histogram(numbers: Sequence[int], across: str, up: str, *, limit: int | None = None) -> str:
    """Counts of whole numbers in at most BINS equal bins; a dashed line stands at the limit if that is near."""
    counts = bins(numbers)

    def draw(axes: Axes) -> None:
        lefts, widths = [left for left, _, _ in counts], [right - left for left, right, _ in counts]
        bars = axes.bar(lefts, [count for _, _, count in counts], width=widths, align="edge", color=COLOURS[0], linewidth=0)
        for index, bar in enumerate(bars):
            bar.set_gid(f"bar-{index}")
        if limit is not None and limit <= 2 * max(numbers):
            axes.axvline(limit, color=COLOURS[1], linestyle="--", linewidth=1, label=f"limit {limit:,}")
            axes.legend()

    return _svg(draw, across, up)


def bins(numbers: Sequence[int]) -> list[tuple[int, int, int]]:
    """(from, below, count) of at most BINS equal bins.

    >>> bins([3, 3, 5])
    [(3, 4, 2), (4, 5, 0), (5, 6, 1)]
    """
    low, high = min(numbers), max(numbers)
    width = max(1, -(-(high - low + 1) // BINS))
    counts = dict.fromkeys(range(low, high + 1, width), 0)
    for number in numbers:
        counts[low + (number - low) // width * width] += 1
    return [(start, start + width, count) for start, count in counts.items()]


def thinned(points: Points) -> Points:
    """About POINTS of the points, the last one among them."""
    return [*points[:: max(1, len(points) // POINTS)], points[-1]] if len(points) > POINTS else points


def _svg(draw: Any, across: str, up: str) -> str:
    """One <svg> element of what `draw` puts on a pair of axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), io.StringIO() as text:
        figure = Figure(figsize=INCHES, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", integer=True, nbins=7)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return text.getvalue()[text.getvalue().index("<svg") :]
