"""A run ends with base against tuned, and for the generated catalogue with how many answers are right."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from flows.cli import tables
from flows.recipes import load_recipe
from tasks.caching.runs import Run
from tasks.caching.stage import Plan, Step
from tasks.caching.store import publish
from tasks.refs import home

TEXT = {"rougeL": 0.25, "chrf": 31.5}
BASE = {"nll": 3.5, "perplexity": 33.1, "perplexity_low": 30.25, "perplexity_high": 36.0, **TEXT}
TUNED = {"nll": 0.25, "perplexity": 1.284, "perplexity_low": 1.2, "perplexity_high": 1.37, **TEXT}
DIFFERENCE = {"nll": -3.25, "nll_low": -3.5, "nll_high": -3.0}
METRICS = {"rows": 2, "tokens": 9, "base": BASE, "tuned": TUNED, "difference": DIFFERENCE}
NO_REASON = "not better than the base model for certain: +0.0012 nats per token (95 % interval -0.0100 to +0.0124)"
ASKED = {"prompt": "Título do produto: Aurora Brushed Tray 15 cm\n", "base": "A tray.", "tuned": "Norvik, stainless steel."}


def evaluated(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of a run that evaluated so."""
    with publish("evaluation") as draft:
        (draft / "metrics.json").write_text(json.dumps(metrics | {"per_row": []}))
        (draft / "generations.jsonl").write_text(f"{json.dumps(ASKED)}\n" * 2)
    return [{"name": "evaluate", "path": str(draft.artifact.path.relative_to(home()))}]


def printed(entries: list[dict[str, Any]], recipe: str, verdict: dict[str, Any] | None = None) -> list[str]:
    """The lines on a terminal of 80 columns."""
    console = Console(file=io.StringIO(), width=80)
    tables.print_outcome(Run(recipe, {}, stages=entries, verdict=verdict), load_recipe(recipe), None, console)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_what_looks_like_markup_in_a_setting_is_shown_as_it_is() -> None:
    reason = "config.chat_template [INST] {INPUT} [/INST] -> [bold]x"
    console = Console(file=io.StringIO(), width=120)
    tables.print_stages([{"name": "template", "state": "completed", "reason": reason}], console)
    tables.print_plan(Plan("demo", [Step("template", "run", reason)]), console)
    assert console.file.getvalue().count(reason) == 2  # type: ignore[attr-defined]


def words(lines: list[str]) -> list[list[str]]:
    return [line.split() for line in lines]


def test_the_demo_ends_with_base_against_tuned_and_the_facts() -> None:
    assert words(printed(evaluated(METRICS), "demo")) == [
        ["held-out", "answers", "base", "tuned"],
        ["nats", "per", "token", "3.5000", "0.2500"],
        ["perplexity", "(95", "%)", "33.10", "(30.25", "to", "36.00)", "1.28", "(1.20", "to", "1.37)"],
        ["ROUGE-L", "0.250", "0.250"],
        ["chrF", "31.5", "31.5"],
        ["brand", "and", "material", "right", "0", "of", "2", "2", "of", "2"],
    ]


def test_the_verdict_stands_below_with_its_reasons_in_80_columns() -> None:
    verdict = {"promoted": False, "reasons": [NO_REASON, "[bold] is no markup"], "against": ["base"]}
    lines = printed(evaluated(METRICS), "demo", verdict)
    assert lines[-4] == "verdict: not promoted"
    assert " ".join(lines[-3].split() + lines[-2].split()) == f"- {NO_REASON}"
    assert lines[-1].strip() == "- [bold] is no markup"
    assert max(map(len, lines)) <= 80


def test_real_products_have_no_known_facts_to_count() -> None:
    assert "brand and material right" not in "\n".join(printed(evaluated(METRICS), "default"))


@pytest.mark.parametrize("entries", [[], [{"name": "evaluate", "state": "failed"}]])
def test_without_an_evaluation_nothing_is_compared(entries: list[dict[str, Any]]) -> None:
    assert printed(entries, "demo") == []


def test_a_skipped_evaluation_is_not_compared() -> None:
    assert printed(evaluated({"rows": 0, "skipped": "no held-out rows"}), "demo") == []


def test_the_json_has_the_same_numbers() -> None:
    verdict = {"promoted": True, "reasons": ["better"], "against": ["base"]}
    told = tables.summarize_run(Run("demo", {}, stages=evaluated(METRICS), verdict=verdict), load_recipe("demo"), None)
    assert told["verdict"] == verdict
    assert told["metrics"]["base"] == BASE | {"right": 0}
    assert told["metrics"]["tuned"] == TUNED | {"right": 2}
    assert told["metrics"]["difference"] == DIFFERENCE
    assert (told["metrics"]["rows"], told["metrics"]["generations"]) == (2, 2)


def test_the_json_is_json_for_a_ruined_model_too() -> None:
    ruined = METRICS | {"tuned": TUNED | {"nll": float("nan"), "perplexity_high": float("inf")}}
    told = tables.summarize_run(Run("demo", {}, stages=evaluated(ruined)), load_recipe("demo"), None)
    assert json.loads(json.dumps(told, allow_nan=False))["metrics"]["tuned"]["perplexity_high"] is None
