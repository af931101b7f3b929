"""Plots are drawn from every number that they are given, in bytes that depend on nothing else."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.reporting import plots

SVG = "{http://www.w3.org/2000/svg}"


def group(svg: str, name: str) -> ElementTree.Element:
    """The drawn thing of that name."""
    return next(element for element in ElementTree.fromstring(svg).iter(f"{SVG}g") if element.get("id") == name)


def points(svg: str, name: str) -> list[tuple[float, float]]:
    """The corners of a line, in the picture's own units: y grows downwards."""
    path = next(group(svg, name).iter(f"{SVG}path")).get("d", "")
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


def test_a_curve_falls_where_the_loss_falls() -> None:
    line = points(plots.curves({"loss": [(1, 4.0), (2, 2.0), (3, 1.0)]}, "step", "loss"), "loss")
    assert [y for _, y in line] == sorted(y for _, y in line)
    assert line[0][1] < line[-1][1]


def test_a_curve_that_hardly_moves_keeps_away_from_the_top() -> None:
    drawn = plots.curves({"memory": [(1, 1.52), (2, 1.5), (3, 1.53)]}, "step", "GiB")
    frame = [y for _, y in points(drawn, "patch_2")]
    highest = min(y for _, y in points(drawn, "memory"))
    assert highest - min(frame) > 0.05 * (max(frame) - min(frame))


def test_two_curves_are_told_apart_and_one_without_points_is_left_out() -> None:
    both = plots.curves({"training": [(1, 4.0), (2, 2.0)], "held out": [(2, 3.0)]}, "step", "loss")
    alone = plots.curves({"training": [(1, 4.0), (2, 2.0)], "held out": []}, "step", "loss")
    assert points(both, "held out") != []
    assert ">held out</text>" in both
    assert "held out" not in alone


def test_a_curve_of_a_long_training_stays_small_and_ends_with_the_last_step() -> None:
    steps = [(step, 1 / (step + 1)) for step in range(100_000)]
    kept = plots.thinned(steps)
    assert len(kept) <= plots.POINTS + 2
    assert (kept[0], kept[-1]) == (steps[0], steps[-1])


def test_equal_numbers_are_equal_bytes() -> None:
    drawn = [plots.curves({"loss": [(1, 4.0), (2, 2.0)]}, "step", "loss") for _ in range(2)]
    assert drawn[0] == drawn[1]


@settings(max_examples=10)
@given(st.floats(allow_nan=False, allow_infinity=False, width=32), st.integers(1, 10**6))
def test_any_one_point_can_be_drawn(loss: float, step: int) -> None:
    assert points(plots.curves({"loss": [(step, loss)]}, "step", "loss"), "loss")


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_bins_hold_every_number_once(numbers: list[int]) -> None:
    found = plots.bins(numbers)
    assert len(found) <= plots.BINS
    assert [sum(left <= number < right for number in numbers) for left, right, _ in found] == [count for _, _, count in found]
    assert sum(count for _, _, count in found) == len(numbers)


def test_a_histogram_has_a_bar_a_bin_and_the_limit_only_where_it_is_near() -> None:
    near = plots.histogram([1, 2, 2], "tokens", "rows", limit=4)
    assert len([element for element in ElementTree.fromstring(near).iter(f"{SVG}g") if "bar-" in element.get("id", "")]) == 2
    assert "limit 4" in near
    assert "limit" not in plots.histogram([1, 2, 2], "tokens", "rows", limit=4000)
