"""No text of a product, a model or a file name commands the terminal that it is shown on."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Progress
from rich.table import Table

from flows.cli.options import SafeConsole, echo
from flows.cli.tables import print_stages
from tests.support.checkout import PROJECT

CLEAR, TITLE, TURN = "\x1b[2J", "\x1b]0;owned\x07", "\u202etxt"
HOSTILE = f"{CLEAR}{TITLE}\x9b2J{TURN}\ud800\0\x7f"


def shown(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def is_tame(text: str) -> bool:
    """Whether only Rich's own commands, colours, are in a text."""
    rest = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return all(character.isprintable() or character in "\n\t" for character in rest)


@pytest.fixture
def console() -> SafeConsole:
    return SafeConsole(file=io.StringIO(), force_terminal=True, width=120, highlight=False)


def test_whatever_is_printed_is_tame_and_coloured(console: SafeConsole, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(HOSTILE)
    table.add_row(f"[red]{HOSTILE}[/]")
    for thing in (table, HOSTILE):
        console.print(thing)
    logger = logging.getLogger("tasks.test_options")
    monkeypatch.setattr(logger, "propagate", False)  # pytest would send it from one of its processes to another
    logger.addHandler(handler := RichHandler(console=console, show_path=False))
    logger.error("training row %s", HOSTILE)
    logger.removeHandler(handler)
    entry = {"name": "ingest", "state": "failed", "reason": HOSTILE}
    print_stages([entry], console)
    text = shown(console)
    assert is_tame(text)
    assert text.count("␛[2J␛]0;owned") >= 4
    assert text.count("\\u202etxt") >= 4
    assert "\x1b[31m" in text


def test_richs_own_commands_of_the_terminal_stay(console: SafeConsole) -> None:
    with Progress(console=console) as progress:
        progress.add_task(CLEAR)
    assert "\x1b[?25l" in shown(console)  # hides the cursor
    assert CLEAR not in shown(console)


def test_json_stays_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    echo(json.dumps({"answer": HOSTILE}, ensure_ascii=False))
    printed = capsys.readouterr().out
    assert is_tame(printed)
    assert json.loads(printed) == {"answer": HOSTILE}


def test_an_error_that_quotes_what_it_was_given_is_tame(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "plan", f"{CLEAR}{TURN}.yaml"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "␛[2J" in done.stderr
    assert is_tame(done.stderr)
