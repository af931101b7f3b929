"""Somebody's yes before a promotion: in the terminal, and in the UI, where a deployed run waits for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest

from flows.recipes import load_recipe
from flows.running import promotion
from flows.running.promotion import promote
from tasks.caching.store import publish
from tasks.evaluation.metrics import likelihood
from tasks.refs import SavedModel
from tests.e2e.served import until

RECIPE = load_recipe("demo", ["promote.approve=true", "promote.approve_hours=0.05"])


@pytest.fixture
def saved() -> SavedModel:
    """Better than its base by 1 nat on each row."""
    base = [3.0, 3.2, 2.9, 3.1, 3.0, 3.3]
    tuned = [loss - 1 for loss in base]
    rows = [
        {"uids": [f"u{row}"], "tokens": 20, "base_nll": one, "tuned_nll": other}
        for row, (one, other) in enumerate(zip(base, tuned, strict=True))
    ]
    metrics = {"rows": len(rows), **likelihood([20] * len(rows), base, tuned), "per_row": rows}
    with publish("saved-model") as draft:
        (draft / "metrics.json").write_text(json.dumps(metrics))
        (draft / "lineage.json").write_text(json.dumps({"adapter": "a" * 64, "base_model": {"tokenizer": "t" * 64}}))
    return SavedModel(data=draft.artifact, name="mine")


@pytest.fixture
def link(home: Path) -> Path:
    return home / "models" / "demo" / "promoted"


def in_terminal(monkeypatch: pytest.MonkeyPatch, answer: bool) -> list[str]:
    asked: list[str] = []

    def confirm(question: str, **_: Any) -> bool:
        asked.append(question)
        return answer

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", confirm)
    return asked


@pytest.mark.parametrize("answer", [True, False])
def test_in_a_terminal_it_is_asked_once_with_the_reasons(
    answer: bool, saved: SavedModel, link: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = in_terminal(monkeypatch, answer)
    verdict = promote(saved, RECIPE)
    (question,) = asked
    assert question.startswith(f"Promote demo/{saved.data.path.name[:8]}? It is better than the base model: -1.0000 nats")
    assert (verdict.promoted, link.exists()) == (answer, answer)
    if answer:
        assert promote(saved, RECIPE).promoted
        assert len(asked) == 1, "what is promoted already is not asked about again"
    else:
        assert verdict.reasons == ("not approved in the terminal",)


def test_without_anybody_to_ask_nothing_is_promoted(saved: SavedModel, link: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    (reason,) = promote(saved, RECIPE).reasons
    assert reason.startswith("promote.approve is true, and there was nobody to ask")
    assert not link.exists()


def test_what_would_not_be_promoted_is_not_asked_about(saved: SavedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = in_terminal(monkeypatch, True)
    assert not promote(saved, load_recipe("demo", ["promote.approve=true", "promote.margin=2"])).promoted
    assert asked == []


@pytest.mark.parametrize(("answer", "promoted"), [({"promote": True, "remark": "read"}, True), ({"promote": False}, False)])
def test_a_deployed_run_waits_for_a_yes_in_the_ui(
    answer: dict[str, Any], promoted: bool, saved: SavedModel, link: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion, "POLL_SECONDS", 1)
    verdict = waiting_run(saved, monkeypatch, lambda client, run: client.resume_flow_run(run, run_input=answer))
    assert (verdict.promoted, link.exists()) == (promoted, promoted)


def test_a_yes_that_never_comes_promotes_nothing(
    saved: SavedModel, link: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion, "POLL_SECONDS", 1)
    recipe = load_recipe("demo", ["promote.approve=true", "promote.approve_hours=0.0006"])
    verdict = waiting_run(saved, monkeypatch, lambda _client, _run: None, recipe)
    assert verdict.reasons == ("nobody approved it within 0.0006 hours",)
    assert not link.exists()


def waiting_run(
    saved: SavedModel, monkeypatch: pytest.MonkeyPatch, answer: Callable[[Any, Any], Any], recipe: Any = RECIPE
) -> Any:
    """The verdict of a flow run that asks in the UI, and is answered once it is paused."""
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext

    runs: list[Any] = []

    def present() -> Any:
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        runs.append(context.flow_run.id)
        return context.flow_run.id

    monkeypatch.setattr(promotion, "flow_run_id", present)

    def answered() -> None:
        with get_client(sync_client=True) as client:
            until(lambda: runs and client.read_flow_run(runs[0]).state.is_paused())  # pyright: ignore[reportOptionalMemberAccess]
            answer(client, runs[0])

    thread = threading.Thread(target=copy_context().run, args=(answered,))  # it asks the same server
    thread.start()
    verdict = flow(name="asks")(lambda: promote(saved, recipe))()
    thread.join()
    return verdict
