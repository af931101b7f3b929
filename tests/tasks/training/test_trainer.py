"""A signal waits for the step at hand, unless there is none to keep or a person asks again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tasks.training import trainer
from tasks.training.trainer import STOPPING, Stop


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """The signals that come to whom they belonged to before."""
    found: list[int] = []
    before = {number: signal.signal(number, lambda number, _: found.append(number)) for number in STOPPING}
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING)
def test_it_is_passed_on_once_and_afterwards(heard: list[int], number: signal.Signals) -> None:
    stop = Stop()
    stop.steps = 1
    for _ in range(2):  # `timeout` sends two
        os.kill(os.getpid(), number)
    assert (stop.number, heard) == (number, [])
    stop.pass_on()
    stop.pass_on()
    assert heard == [number]


def test_before_the_first_step_it_is_passed_on_at_once(heard: list[int]) -> None:
    Stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def test_a_second_ctrl_c_waits_for_no_step_and_a_second_sigterm_does(heard: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "TWICE_SECONDS", 0)
    stop = Stop()
    stop.steps = 1
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == []
    os.kill(os.getpid(), signal.SIGINT)
    assert heard == [signal.SIGINT]


def test_without_a_signal_nothing_is_passed_on(heard: list[int]) -> None:
    Stop().pass_on()
    assert heard == []
