"""Kept out of logs: the libraries' progress bars, which make one endless line of it, and stack traces that nobody can mend.

Prefect logs one, or several, for a server that is away and for a busy SQLite; here each is a line.
"""

from __future__ import annotations

import logging
import os
from typing import Any

SWITCHES = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
"""Of huggingface_hub, which transformers asks too; of datasets; of tqdm itself, which transformers' GGUF reader calls."""

LOGGERS = ("asyncio", "prefect", "uvicorn", "websockets")
FLEETING = {"CancelledError", "ConnectionError", "EOFError", "TimeoutError", "TransportError", "WebSocketException"}
"""Names of errors, or of what they derive from, of a connection that ends; by name, for most processes import few of them."""
LOCKED = "database is locked"
ADVICE = (
    "SQLite lets one write at a time, and what waits too long is tried again; a server with much to do is faster with "
    "PostgreSQL: amazon-ft up --database-url postgresql+asyncpg://..."
)


def hide_bars() -> None:
    """Keep bars out of what this process and those it starts print; before the libraries are imported, which look once."""
    for name in SWITCHES:
        os.environ.setdefault(name, "1")


def log_briefly() -> None:
    """Let this process log such errors without their traces, and advise once what helps a busy database."""
    make, advice = logging.getLogRecordFactory(), [f". {ADVICE}"]

    def made(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        error = record.exc_info[1] if record.exc_info else None
        if error is None or str(record.name).partition(".")[0] not in LOGGERS:
            return record
        if LOCKED in str(error):
            _shorten(record, LOCKED, advice.pop() if advice else "")
        elif is_fleeting(error):
            _shorten(record, f"{type(error).__name__}: {error}".partition("\n")[0])
        return record

    logging.setLogRecordFactory(made)


def _shorten(record: logging.LogRecord, reason: str, advice: str = "") -> None:
    record.msg, record.args, record.exc_info = f"{record.getMessage()} ({reason}){advice}", (), None


def is_fleeting(error: BaseException) -> bool:
    """Whether it tells of nothing but a connection that ended."""
    return not FLEETING.isdisjoint(kind.__name__ for kind in type(error).__mro__)
