"""An observer that keeps what it hears."""

from __future__ import annotations

from typing import Any


class Heard:
    def __init__(self) -> None:
        self.events: list[Any] = []
        self.closed = False

    def hear(self, event: Any) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed = True
