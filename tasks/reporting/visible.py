"""Text that is only read: no character in it commands a terminal, or turns around what stands beside it."""

from __future__ import annotations

import logging
from typing import Any

PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
"""Unicode's control pictures: ␛ for ESC."""
ESCAPED = (
    range(0x7F, 0xA0),  # DEL, and C1, which terminals take for ESC and a letter
    (0x061C, 0x200E, 0x200F),  # marks of direction
    range(0x2028, 0x202F),  # ends of lines and paragraphs, embeddings and overrides of direction
    range(0x2066, 0x206A),  # isolates of direction
    range(0xD800, 0xE000),  # halves of surrogate pairs, which can't be printed at all
)
SHOWN = PICTURES | {code: f"\\u{code:04x}" for codes in ESCAPED for code in codes}


def visible(text: str) -> str:
    r"""The text with its controls to be seen: by their pictures, or as JSON escapes them, so that JSON stays what it is.

    >>> print(visible("\x1b[2J bad \u202e txt.exe"))
    ␛[2J bad \u202e txt.exe
    """
    return text.translate(SHOWN)


def log_visibly() -> None:
    """Let no text of a product that is logged command a terminal: of the run, of a worker, of who reads its log later."""
    make = logging.getLogRecordFactory()

    def made(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if str(record.name).partition(".")[0] in ("tasks", "flows"):  # None until logging.makeLogRecord has filled it in
            record.msg, record.args = visible(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(made)
