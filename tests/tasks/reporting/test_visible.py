"""What a product says commands no terminal that shows the log."""

from __future__ import annotations

import logging

import pytest

from tasks.reporting.visible import log_visibly


def test_our_log_lines_show_what_others_keep(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    log_visibly()
    try:
        logging.getLogger("tasks.template").warning("training row %s:\n%s", 1, "\x1b[2J")
        logging.getLogger("other").warning("\x1b[0m %s", 1)
    finally:
        logging.setLogRecordFactory(before)
    assert caplog.messages == ["training row 1:\n\u241b[2J", "\x1b[0m 1"]
