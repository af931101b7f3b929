"""A terminal shows a bar of what is counted while it is counted."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from flows.cli.terminal import Bar, LastRun, WrappedWords
from tasks.caching.context import observing, open_run
from tasks.caching.events import RowsPassed, StageEnded, StepsLogged
from tests.support.checkout import PROJECT


def test_bar_shows_rows_and_steps_and_goes_with_the_stage() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    bar = Bar(console)
    bar.hear(RowsPassed("tokenize", "3,000 rows, 1,000 a second", 0.5))
    bar.hear(StageEnded({}, {}, None))
    bar.hear(StepsLogged(5, 20, 2.5, 1.0, 1e-4, 1234.0, 7.0))
    bar.close()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("tokenize", "3,000 rows, 1,000 a second", " 50%", "step 5  loss 2.5000", "1,234 tok/s", " 25%"):
        assert text in shown
    assert bar._bar is None


def test_last_run_is_the_one_that_was_begun() -> None:
    last = LastRun()
    with observing(last):
        assert last.run is None
        with open_run("demo", {}) as run:
            pass
    assert last.run is run


ANSWER = "tuned: This Aurora tray is Norvik's. Its brushed look is stainless steel, and it measures 15 cm.\nThe end"


@given(cuts=st.lists(st.integers(0, ANSWER.count(" ")), max_size=9), columns=st.integers(1, 60))
@example(cuts=[], columns=20)
def test_an_answer_breaks_between_words_however_it_comes(cuts: list[int], columns: int) -> None:
    words = re.findall(r"\S+\s*", ANSWER)
    ends = sorted({0, *cuts, len(words)})
    heard: list[str] = []
    say = WrappedWords(columns, heard.append)
    for start, end in pairwise(ends):
        say("".join(words[start:end]))
    text = "".join(heard)
    assert text.split() == ANSWER.split()
    assert all(len(line) <= columns or " " not in line for line in text.split("\n"))
    assert "cm.\nThe" in text


def test_help_waits_for_no_heavy_library() -> None:
    heavy = "{'flows.recipes', 'httpx', 'numpy', 'prefect', 'pyarrow', 'pydantic', 'torch', 'yaml'}"
    code = f"import sys\nfrom flows.cli.main import main\ntry: main()\nfinally: print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "From a product file to a fine-tuned language model." in done.stdout
