"""The report holds what the run's record and artifacts say, escapes what products say, and never fails a run."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from flows.recipes import load_recipe
from flows.reports.page import (
    choose_answers,
    compare_figures,
    compared_settings,
    drawings,
    funnel,
    page_facts,
    render,
    speeds,
    write_report,
)
from flows.reports.results import Results, read_lines
from tasks.caching import runs
from tasks.caching.context import open_run
from tasks.refs import Adapter, Artifact, Evaluation, Products, SavedModel, Split, home
from tests.support.records import write_record
from tests.support.tiny import make_tiny_tokenizer, tiny_tokens
from tests.support.tuned import METRICS, artifact_of

HOSTILE = "<script>alert('tuned')</script>\0\x1b]0;title\x07\u202efdp.exe"
INTERVAL = {"nll_low": 0.125, "nll_high": 0.375}
RECIPE = load_recipe("demo", ["finetune.batch_size=4"])


def saved_model() -> SavedModel:
    made = {"lineage.json": json.dumps({"adapter": "ad" * 32, "base_model": {"name": "org/tiny"}, "versions": {"torch": "2.13"}})}
    make_tiny_tokenizer().save(str(home() / "tokenizer.json"))
    return SavedModel(
        data=artifact_of("saved-model", {**made, "tokenizer.json": (home() / "tokenizer.json").read_bytes()}), name="m"
    )


def note(run: runs.Run, name: str, value: Any, main: Artifact) -> None:
    """Put a stage into a run as the engine does: its record, and its entry."""
    key = f"{name:x<64}"
    write_record(key, value, seconds=1.5)
    entry = {"name": name, "key": key, "state": "completed", "reason": f"why {name}", "rows": main.rows, "seconds": 1.5}
    run.stages.append({**entry, "digest": main.digest})


@pytest.fixture
def run(home: Path) -> Iterator[runs.Run]:
    """A run with an outcome of each kind."""
    with open_run("demo", RECIPE.model_dump(mode="json")) as run:
        products, tokens = artifact_of("products", {"a": ""}, 60), tiny_tokens(40)
        note(run, "ingest", Products(data=products, lines=100, dropped={"duplicate": 37, "blank line": 0}), products)
        note(run, "tokenize", Split(train=tokens, evaluation=tokens, counts={"overlong": 2.0}), tokens)
        steps = [
            {"step": step, "loss": 4.0 / step, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 50, "seconds": 2.0 * step}
            for step in range(1, 6)
        ]
        log = artifact_of("log", {"train_log.jsonl": "\n".join(map(json.dumps, steps)), "resolved.json": '{"dtype": "bfloat16"}'})
        note(run, "finetune", Adapter(data=artifact_of("adapter", {"w": "w"}), log=log), log)
        metrics = METRICS | {
            "tuned": METRICS["tuned"] | INTERVAL,
            "difference": {"nll": -3.25, "nll_low": -3.5, "nll_high": -3.0},
        }
        said = [{"uid": f"u{row}", "prompt": "What?", "reference": "A pan.", "base": "?", "tuned": HOSTILE} for row in range(2)]
        lines = "".join(f"{json.dumps(line)}\n" for line in said)
        evaluation = artifact_of("evaluation", {"metrics.json": json.dumps(metrics), "generations.jsonl": lines})
        note(run, "evaluate", Evaluation(data=evaluation), evaluation)
        yield run


def test_the_page_holds_every_part(run: runs.Run) -> None:
    text = render(page_facts(run, RECIPE, saved_model()))
    for title in ("Loss", "Learning rate", "Speed", "Length of the training rows"):
        assert f"<figcaption>{title}</figcaption><svg" in text
    for words in ("0.125 to 0.375", "-3.250 nats per token", "why tokenize", "37 duplicate", "0.50 epochs", "org/tiny", "2.13"):
        assert words in text
    assert re.search(r"<mark>[^<]+", text)


def test_the_page_needs_no_network_and_runs_no_script(run: runs.Run) -> None:
    text = render(page_facts(run, RECIPE, saved_model()))
    assert "&lt;script&gt;alert" in text
    assert "<script" not in text
    fetched = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import (.*)""", text)
    links = {reference for found in fetched for reference in found if reference[:1] not in ("", "#")}
    assert links == {"m/README.md", f"../../runs/{run.id}.json"}  # of what lies beside it


def test_the_page_holds_no_control_and_lets_the_browser_run_and_fetch_nothing(run: runs.Run) -> None:
    text = render(page_facts(run, RECIPE, saved_model()))
    assert "␀␛]0;title␇\\u202efdp.exe" in text
    assert not [character for character in text if not character.isprintable() and character != "\n"]
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    assert policy[1].startswith("default-src 'none'; style-src 'unsafe-inline';")
    assert text.index(policy[0]) < text.index("<style>")


def test_its_contents_lead_to_every_heading(run: runs.Run) -> None:
    text = render(page_facts(run, RECIPE, saved_model()))
    assert re.findall(r'<a href="#([a-z]+)">([^<]*)', text) == re.findall(r'<h2 id="([a-z]+)">([^<]*)', text)


def test_figures_of_a_row_have_equally_many_decimals_and_say_which_are_better(run: runs.Run) -> None:
    facts = page_facts(run, RECIPE, saved_model())
    both = {"base": {"nll": 4.4213, "copies_title": 0.65, "chrf": 16.3}, "tuned": {"nll": 0.5, "copies_title": 0.0, "chrf": 9.0}}
    text = render(facts | {"comparison": compare_figures(both)})
    cells = re.findall(r'<td class="n(?: good| bad)?">([0-9.]+)\n', text)
    assert cells[:6] == ["4.421", "0.500", "16.3", "9.0", "0.650", "0.000"]
    assert "lower is better; to repeat the title tells nothing of the product" in text


def test_a_verdict_comes_first(run: runs.Run) -> None:
    verdict = {"promoted": False, "reasons": ["the interval holds <zero>"], "against": ["base", "saved-model/ab"]}
    text = render(page_facts(run, RECIPE, saved_model()) | {"verdict": verdict})
    assert (
        text.index("Not promoted")
        < text.index("against base, saved-model/ab")
        < text.index("holds &lt;zero&gt;")
        < text.index("<h2")
    )


def test_a_run_that_measured_and_trained_nothing_has_a_page_too(home: Path) -> None:
    with open_run("demo", {}) as empty:
        text = render(page_facts(empty, RECIPE, saved_model()))
    assert "No rows were held out" in text
    assert "<figure>" not in text


def test_it_is_written_beside_the_model_in_one_step(run: runs.Run, home: Path) -> None:
    path = write_report(RECIPE, saved_model())
    assert path == home / "models" / "demo" / "report.html"
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_report_that_fails_is_a_warning_and_leaves_none_of_another_run(
    run: runs.Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved = saved_model()
    path = write_report(RECIPE, saved)
    monkeypatch.setattr("flows.reports.page.page_facts", lambda *_: 1 / 0)
    with caplog.at_level(logging.WARNING):
        assert write_report(RECIPE, saved) is None
    assert caplog.messages == ["report.html could not be written (ZeroDivisionError: division by zero); the run goes on."]
    assert path is not None
    assert not path.exists()


def test_better_goes_by_the_figure() -> None:
    base = {"nll": 1.0, "rouge1": 0.5, "length_ratio": 2.0}
    gained = compare_figures({"base": base, "tuned": {"nll": 0.5, "rouge1": 0.4, "length_ratio": 0.9}})
    assert [(row["name"].split(",")[0], row["gained"]) for row in gained] == [
        ("nats per token", True),
        ("ROUGE-1", False),
        ("words", True),
    ]


@pytest.mark.parametrize("count", range(12))
def test_answers_are_best_worst_and_others_each_once(count: int) -> None:
    said = [{"uid": f"u{row}"} for row in range(count)]
    scores = [{"uids": [f"u{row}"], "tuned_nll": float(row)} for row in range(count)]
    chosen = choose_answers(said, scores)
    shown = [row["uid"] for rows in chosen.values() for row in rows]
    assert len(shown) == len(set(shown)) == min(count, 9)
    if count:
        assert chosen["Best"][0]["uid"] == "u0"
    if count > 1:
        assert chosen["Worst"][0]["uid"] == f"u{count - 1}"


def test_a_clock_that_began_anew_makes_no_negative_speed() -> None:
    seconds = [1.0, 2.0, 0.5, 1.5]
    steps = [{"step": step, "tokens": 100, "seconds": passed} for step, passed in enumerate(seconds, start=1)]
    assert speeds(steps) == [(2, 100.0), (4, 100.0)]


def test_what_was_not_a_number_is_not_drawn(home: Path) -> None:
    steps = [{"step": 1, "loss": 2.0, "learning_rate": 0.1, "tokens": 5, "seconds": math.nan, "memory_gib": math.nan}] * 3
    with open_run("demo", {}) as run:
        log = artifact_of("log", {"train_log.jsonl": "\n".join(map(json.dumps, steps))})
        note(run, "finetune", Adapter(data=artifact_of("adapter", {"w": "w"}), log=log), log)
        assert list(drawings(Results(asdict(run)), RECIPE)) == ["Loss", "Learning rate"]


def test_the_funnel_narrows_to_what_was_trained_on(run: runs.Run) -> None:
    counts = [count for _, count, _ in funnel(Results(asdict(run)))]
    assert counts == [100, 60, 40, 20]


def test_settings_that_differ_from_default_come_first() -> None:
    rows = compared_settings(load_recipe("default", ["finetune.lora.r=8"]))
    assert rows[0] == ("finetune.lora.r", 8, 16, True)
    assert not any(differs for *_, differs in rows[1:])


def test_seconds_of_a_cached_stage_are_those_of_its_making(run: runs.Run) -> None:
    run.write()
    cached = {**run.stages[0], "state": "cached", "seconds": 0.0}
    assert Results({"stages": []}).seconds(cached) == 1.5


def test_an_answer_may_hold_every_end_of_a_line_that_unicode_knows(tmp_path: Path) -> None:
    said = [{"base": "one\u2028two", "tuned": "three\u2029four\x85five\x0b\x0c\x1c"}] * 2
    (tmp_path / "generations.jsonl").write_text(
        "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in said), encoding="utf-8"
    )
    assert read_lines(tmp_path / "generations.jsonl") == said
