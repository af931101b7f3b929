"""Observers hear of a run in order, and whatever they do, the run goes on."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from tasks.caching.context import observing, open_run, tell
from tasks.caching.events import Detached, Noticed, RowsPassed, RunBegan, RunEnded, StepsLogged
from tests.support.heard import Heard


def step(number: int) -> StepsLogged:
    return StepsLogged(number, 1000, 1.0, 1.0, 1e-4, 100.0, 0.0)


class Slow(Heard):
    """Waits before it takes anything, and fails on what it is told to."""

    def __init__(self, failing: Any = None) -> None:
        super().__init__()
        self.release = threading.Event()
        self.failing = failing

    def hear(self, event: Any) -> None:
        self.release.wait()
        if event is self.failing:
            raise ZeroDivisionError("division by zero")
        super().hear(event)


def test_an_observer_hears_a_run_from_its_beginning_to_its_end() -> None:
    heard = Heard()
    with open_run("demo", {}, observers=[heard]) as run:
        tell(step(1))
        assert not heard.closed
    assert heard.events == [RunBegan(run), step(1), RunEnded(run)]
    assert heard.closed
    assert run.finished


def test_what_is_told_outside_a_run_is_heard_by_those_who_asked() -> None:
    heard = Heard()
    with observing(heard):
        tell(step(1))
    tell(step(2))
    assert heard.events == [step(1)]
    assert heard.closed


def test_a_slow_observer_holds_up_nothing_and_loses_nothing() -> None:
    slow = Slow()
    detached = Detached(slow, "slow", close_seconds=60)
    events = [Noticed("topic", f"{number}", "") for number in range(100)]
    for event in events:
        detached.hear(event)
    assert slow.events == []
    slow.release.set()
    detached.close()
    assert slow.events == events
    assert slow.closed


def test_a_failing_observer_is_a_warning_once_and_hears_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow(failing=step(1))
    slow.failing = first = step(1)
    slow.release.set()
    detached = Detached(slow, "mlflow", close_seconds=60, newest=())
    with caplog.at_level(logging.WARNING):
        for event in (first, step(2), first, step(3)):
            detached.hear(event)
        detached.close()
    assert slow.events == [step(2), step(3)]
    assert caplog.messages == ["mlflow could not be told of this run (ZeroDivisionError: division by zero); the run goes on."]


def test_what_only_counts_while_it_is_new_does_not_pile_up() -> None:
    slow = Slow()
    detached = Detached(slow, "bar", close_seconds=60)
    for number in range(1, 1001):
        detached.hear(step(number))
        detached.hear(RowsPassed("ingest", "", number / 1000))
    assert len(detached._waiting) <= 2
    slow.release.set()
    detached.close()
    assert slow.events[-2:] == [step(1000), RowsPassed("ingest", "", 1.0)]
    assert len(slow.events) <= 4


def test_the_end_of_a_run_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow()
    detached = Detached(slow, "the server", close_seconds=0.1)
    with caplog.at_level(logging.WARNING), open_run("demo", {}, observers=[detached]):
        pass
    assert caplog.messages == ["the server did not take all that it was told within 0 s; the run ends."]
    slow.release.set()


def test_an_observer_that_nothing_is_told_costs_no_thread() -> None:
    before, slow = threading.active_count(), Slow()
    detached = Detached(slow, "idle", close_seconds=60)
    assert threading.active_count() == before
    detached.close()
    assert (slow.events, slow.closed) == ([], False)
