"""A run ends with base against tuned, and for the generated catalogue with how many answers are right."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from flows import show
from flows.recipes import load_recipe
from tasks.refs import home
from tasks.store import publish

METRICS = {"rows": 2, "tokens": 9, "base": {"nll": 3.5, "perplexity": 33.1}, "tuned": {"nll": 0.25, "perplexity": 1.284}}
ASKED = {"prompt": "Título do produto: Aurora Brushed Tray 15 cm\n", "base": "A tray.", "tuned": "Norvik, stainless steel."}


def evaluated(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of a run that evaluated so."""
    with publish("evaluation") as draft:
        (draft / "metrics.json").write_text(json.dumps(metrics | {"per_row": []}))
        (draft / "generations.jsonl").write_text(f"{json.dumps(ASKED)}\n" * 2)
    return [{"name": "evaluate", "path": str(draft.artifact.path.relative_to(home()))}]


def printed(entries: list[dict[str, Any]], recipe: str) -> list[list[str]]:
    """The words of each line."""
    console = Console(file=io.StringIO(), width=100)
    show.outcome(entries, load_recipe(recipe), None, console)
    return [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_the_demo_ends_with_base_against_tuned_and_the_facts() -> None:
    assert printed(evaluated(METRICS), "demo") == [
        ["held-out", "answers", "base", "tuned"],
        ["nats", "per", "token", "3.5000", "0.2500"],
        ["perplexity", "33.10", "1.28"],
        ["brand", "and", "material", "right", "0", "of", "2", "2", "of", "2"],
    ]


def test_real_products_have_no_known_facts_to_count() -> None:
    assert len(printed(evaluated(METRICS), "default")) == 3


@pytest.mark.parametrize("entries", [[], [{"name": "evaluate", "state": "failed"}]])
def test_without_an_evaluation_nothing_is_compared(entries: list[dict[str, Any]]) -> None:
    assert printed(entries, "demo") == []


def test_a_skipped_evaluation_is_not_compared() -> None:
    assert printed(evaluated({"rows": 0, "skipped": "no held-out rows"}), "demo") == []


def test_the_json_has_the_same_numbers() -> None:
    told = show.summary(evaluated(METRICS), load_recipe("demo"), None)
    assert told["metrics"]["base"] == {"nll": 3.5, "perplexity": 33.1, "right": 0}
    assert told["metrics"]["tuned"] == {"nll": 0.25, "perplexity": 1.284, "right": 2}
    assert (told["metrics"]["rows"], told["metrics"]["generations"]) == (2, 2)
