"""A deployed flow run outlives its worker for as long as it takes to end well."""

from __future__ import annotations

import os

import pytest

from flows.running.deployed import Unbroken


def test_stream_to_a_dead_worker_swallows_the_line() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = Unbroken(os.fdopen(writer, "w"))
    assert stream.write("lost\n") == 5
    stream.flush()
    with pytest.raises(BrokenPipeError):
        stream.close()
