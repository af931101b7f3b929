"""Progress tells rows, their speed and the time left, on a terminal and in the log."""

from __future__ import annotations

import logging

import pyarrow as pa
import pytest

from tasks.caching.context import observing
from tasks.tables import progress
from tasks.tables.progress import counted, metered
from tests.support.heard import Heard


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times that the clock tells, one after the other."""
    times = list[float]()
    monkeypatch.setattr(progress.time, "monotonic", lambda: times.pop(0))
    return times


def test_log_gets_a_line_every_few_seconds(seconds: list[float], caplog: pytest.LogCaptureFixture) -> None:
    seconds += [100, 104, 110, 111, 120]
    with caplog.at_level(logging.INFO, "tasks.tables.progress"), metered("ingest", "lines") as count:
        for rows in (4000, 10_000, 11_000, 20_000):
            count(rows, rows / 40_000)
    assert caplog.messages == [
        "ingest: 10,000 lines, 1,000 a second, 30 s left",
        "ingest: 20,000 lines, 1,000 a second, 20 s left",
    ]


def test_observers_hear_of_rows_as_they_pass() -> None:
    heard = Heard()
    batches = [pa.record_batch({"a": [1, 2]}), pa.record_batch({"a": [3]})]
    with observing(heard):
        assert list(counted("tokenize", batches, total=3)) == batches
    assert [(event.stage, event.speed.split(",")[0], event.share) for event in heard.events] == [
        ("tokenize", "2 rows", 2 / 3),
        ("tokenize", "3 rows", 1.0),
    ]


def test_file_gets_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(counted("tokenize", [pa.record_batch({"a": [1]})], total=1))
    assert capsys.readouterr().err == ""
