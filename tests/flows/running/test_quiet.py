"""A server that is away and a busy database are a line in the log; what may be a fault keeps its trace."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from flows.running.quiet import ADVICE, log_briefly


@pytest.fixture(autouse=True)
def briefly() -> Iterator[None]:
    before = logging.getLogRecordFactory()
    log_briefly()
    yield
    logging.setLogRecordFactory(before)


def logged(caplog: pytest.LogCaptureFixture, name: str, error: BaseException) -> logging.LogRecord:
    try:
        raise error
    except type(error):
        logging.getLogger(name).exception("Consumer %s failed", "task")
    return caplog.records[-1]


def test_a_server_that_is_away_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    from httpx import ConnectError
    from websockets.exceptions import InvalidMessage

    for error in (ConnectionRefusedError(111, "refused"), EOFError("cut"), ConnectError("no"), InvalidMessage("none")):
        record = logged(caplog, "prefect.workers", error)
        assert record.getMessage() == f"Consumer task failed ({type(error).__name__}: {error})"
        assert record.exc_info is None


def test_a_busy_database_is_told_with_advice_once(caplog: pytest.LogCaptureFixture) -> None:
    import sqlite3

    locked = sqlite3.OperationalError("database is locked")
    first, second = (logged(caplog, "prefect.server", locked).getMessage() for _ in range(2))
    assert first == f"Consumer task failed (database is locked). {ADVICE}"
    assert second == "Consumer task failed (database is locked)"


@pytest.mark.parametrize(("name", "error"), [("prefect.server", ValueError("broken")), ("tasks.pack", ConnectionError("gone"))])
def test_what_may_be_a_fault_keeps_its_trace(caplog: pytest.LogCaptureFixture, name: str, error: BaseException) -> None:
    assert logged(caplog, name, error).exc_info is not None
