"""How a terminal shows what comes bit by bit: a bar for a run's stage at hand, its record for the tables, an answer's words."""

from __future__ import annotations

import re
from collections.abc import Callable

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tasks.caching.events import Event, RowsPassed, RunBegan, StageEnded, StepsLogged
from tasks.caching.runs import Run


class LastRun:
    """Keeps the record of the run that was begun."""

    def __init__(self) -> None:
        self.run: Run | None = None

    def hear(self, event: Event) -> None:
        """Take note of a run."""
        if isinstance(event, RunBegan):
            self.run = event.run

    def close(self) -> None:
        """Nothing is left to do."""


class Bar:
    """A bar for what is counted: rows of a stage, steps of a training; gone when the stage is."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def hear(self, event: Event) -> None:
        """Move on."""
        match event:
            case RowsPassed():
                self._show(event.stage, event.speed, event.share, 1.0)
            case StepsLogged():
                rate = f"lr {event.learning_rate:.2e}  |g| {event.grad_norm:.2f}  {event.tokens_per_second:,.0f} tok/s"
                self._show("finetune", f"step {event.step}  loss {event.loss:.4f}  {rate}", event.step, event.steps)
            case StageEnded():
                self.close()
            case _:
                pass

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, stage: str, line: str, done: float, total: float) -> None:
        if self._bar is None:
            told = (TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(TextColumn(stage), BarColumn(), *told, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=total)
            self._bar.start()
        self._bar.update(self._task, description=line, completed=done, total=total)


class WrappedWords:
    """Says a text that comes in pieces of whole words, in lines that break between words."""

    def __init__(self, columns: int, say: Callable[[str], None]) -> None:
        self._columns, self._say = columns, say
        self._column, self._gap = 0, ""

    def __call__(self, text: str) -> None:
        """Say another piece; spaces at its end wait for the word that follows, lest a line begins with them."""
        for gap, word in re.findall(r"(\s*)(\S*)", text):
            lines, newline, self._gap = (self._gap + gap).rpartition("\n")
            if newline:
                self._say(lines + newline)
                self._column = 0
            if word:
                self._say_word(word)

    def _say_word(self, word: str) -> None:
        end = self._column + cell_len(self._gap + word)
        if self._gap and self._column and end > self._columns:
            self._gap, end = "\n", cell_len(word)
        self._say(self._gap + word)
        self._gap, self._column = "", end
