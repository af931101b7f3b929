from __future__ import annotations

import re
from base64 import b64decode
from itertools import pairwise
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from tasks.reporting import markdown


def svg(markdown: str) -> ElementTree.Element:
    """The plot in a markdown text."""
    match = re.search(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", markdown)
    assert match
    return ElementTree.fromstring(b64decode(match[1]))


def shapes(element: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return element.findall(f".//{{http://www.w3.org/2000/svg}}{name}")


def test_source_profile_counts_every_line_once() -> None:
    text = markdown.source_profile([("trn.json", 3 * 2**20)], 10, 6, {"duplicate": 1, "empty title": 2, "blank line": 0}, 1)
    assert "| trn.json | 3.0 |" in text
    assert "| kept | 6 | 60.0% |" in text
    assert "| duplicate | 1 | 10.0% |" in text
    assert "| set aside: malformed | 1 | 10.0% |" in text
    assert "blank line" not in text
    assert "| all | 10 |  |" in text


def test_marked_rows_keep_text_that_looks_like_markup() -> None:
    text = markdown.marked_text([[("### Título:\n<b>", False), ("```` | done", True)]])
    assert "### Título:\n<b>⟦'``` | done⟧" in text


@given(st.lists(st.tuples(st.integers(0, 999), st.booleans()), max_size=40))
def test_pieces_put_together_are_the_row(row: list[tuple[int, bool]]) -> None:
    ids = [number for number, _ in row]
    found = markdown.pieces(ids, [number if trained else -100 for number, trained in row])
    assert [number for run, _ in found for number in run] == ids
    assert [trained for run, trained in found for _ in run] == [trained for _, trained in row]
    assert all(one[1] != other[1] for one, other in pairwise(found))


def test_token_lengths_say_what_is_long_and_what_the_limit_is() -> None:
    text = markdown.token_lengths([10, 20, 30, 200], 512, {"dropped": 2.0})
    for line in (
        "| rows | 4 |",
        "| tokens | 260 |",
        "| median | 30 |",
        "| longest | 200 |",
        "| limit | 512 |",
        "| dropped | 2 |",
    ):
        assert line in text


def test_training_without_a_step_says_so() -> None:
    assert "No step was logged yet." in markdown.training_curve([], {"step": "0 of 9"})


def test_training_shows_its_curve_as_an_image() -> None:
    assert shapes(svg(markdown.training_curve([(1, 4.0), (2, 2.0)], {"loss": 2.0})), "path")


def test_evaluation_shows_both_models_in_lines_that_need_no_scrolling() -> None:
    row = {"uid": "B0 | <b>", "prompt": "What | is\nit?", "reference": "A pan.", "base": "word " * 300, "tuned": "A ```` pan."}
    text = markdown.answers_compared("| | base | tuned |", [row])
    assert "What | is\nit?" in text
    assert text.count("word") == 300
    assert "## B0 \\| &lt;b&gt;\n" in text
    assert "**tuned**\n\n````text\nA '``` pan.\n````" in text
    assert max(len(line) for line in text.splitlines()) <= markdown.LINE


def test_lineage_names_state_output_and_reason() -> None:
    done = {
        "name": "ingest",
        "state": "completed",
        "rows": 1200,
        "seconds": 1.25,
        "key": "ab" * 32,
        "path": "artifacts/products/x",
    }
    failed = {"name": "sample", "state": "failed", "key": "cd" * 32, "reason": "config.seed 1 -> 2"}
    text = markdown.stages_table([done | {"reason": "first run"}, failed])
    assert "| ingest | completed | 1,200 | 1.2 | first run | `abababab` | `products/x` |" in text
    assert "| sample | failed |  |  | config.seed 1 -&gt; 2 | `cdcdcdcd` |  |" in text


def test_output_names_host_and_path() -> None:
    text = markdown.model_files("/data/models/demo/mine", "gpu-1", [("adapter_model.safetensors", 2048)])
    assert "On `gpu-1`" in text
    assert "/data/models/demo/mine" in text
    assert "| adapter_model.safetensors | 2.0 |" in text
