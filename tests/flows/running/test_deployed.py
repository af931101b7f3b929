"""A deployed flow run outlives its worker for as long as it takes to end well."""

from __future__ import annotations

import logging
import os

import pytest

from flows.running.deployed import Unbroken, has_no_state, state_after
from tasks.refs import InputError


def test_stream_to_a_dead_worker_swallows_the_line() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = Unbroken(os.fdopen(writer, "w"))
    assert stream.write("lost\n") == 5
    stream.flush()
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_a_users_mistake_ends_a_run_in_its_own_words() -> None:
    state = state_after(InputError("ingest: a.csv: got none; expected rows.\x1b[2J"))
    assert (state.type, state.message) == ("FAILED", "ingest: a.csv: got none; expected rows.␛[2J")


def test_prefect_logs_a_state_once_and_any_other_error_with_its_trace() -> None:
    from prefect.exceptions import FailedRun

    for error, is_logged in ((FailedRun("told"), False), (OSError("broken"), True), (None, True)):
        caught = (type(error), error, None) if error else None
        assert has_no_state(logging.makeLogRecord({"msg": "ended", "exc_info": caught})) is is_logged
