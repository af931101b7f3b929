"""The last step of a run: the verdict on what was saved, somebody's yes where it is asked for, and the name `promoted`."""

from __future__ import annotations

import json
import logging
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from flows.running.deployed import flow_run_id
from tasks.caching import locks
from tasks.caching.context import context
from tasks.config import PROMOTED, PromoteConfig, Recipe
from tasks.evaluation.verdict import Candidate, Verdict, judge
from tasks.refs import SavedModel, home
from tasks.save import publish_link

logger = logging.getLogger(__name__)

POLL_SECONDS = 10
"""How often a paused run looks whether it may go on."""


def promote(saved: SavedModel, recipe: Recipe) -> Verdict:
    """Judge a saved model and, if it is better, point models/RECIPE/promoted at it; the run's record tells.

    Judging and pointing are one step under the root's mutex: of two runs at once, the second is judged by the first. Nobody is
    waited for under it, so what somebody approved is judged again.

    Raises:
        InputError: when something else lies where the link belongs.
    """
    objection = _ask(saved, recipe) if recipe.promote.approve else None
    with locks.mutex():
        verdict = _judge(saved, recipe)
        if verdict.promoted and objection:
            verdict = verdict.model_copy(update={"promoted": False, "reasons": (objection,)})
        if verdict.promoted:
            publish_link(saved, recipe.name, PROMOTED)
    if (run := context().run) is not None:
        run.verdict = verdict.model_dump(mode="json")
    logger.info("%s: %s", "promoted" if verdict.promoted else "not promoted", "; ".join(verdict.reasons))
    return verdict


def _judge(saved: SavedModel, recipe: Recipe) -> Verdict:
    return judge(_candidate(saved.data.path), _promoted(recipe.name), recipe.promote)


def _ask(saved: SavedModel, recipe: Recipe) -> str | None:
    """Let somebody say whether a model that would be promoted may be; what speaks against it."""
    verdict, promoted = _judge(saved, recipe), home() / "models" / recipe.name / PROMOTED
    if not verdict.promoted or promoted.resolve() == saved.data.path.resolve():
        return None
    question = f"Promote {recipe.name}/{saved.data.path.name[:8]}? It is {'; '.join(verdict.reasons)}."
    if flow_run_id() is not None:
        return _ask_in_ui(question, recipe.promote)
    if not sys.stdin.isatty():
        return "promote.approve is true, and there was nobody to ask: run it again in a terminal, or as a deployment"
    import typer

    return None if typer.confirm(question, err=True) else "not approved in the terminal"


def _ask_in_ui(question: str, config: PromoteConfig) -> str | None:
    from prefect.exceptions import FlowPauseTimeout
    from prefect.flow_runs import pause_flow_run
    from prefect.input import RunInput
    from pydantic import create_model

    form = create_model("Approval", __base__=RunInput, promote=(bool, False), remark=(str, ""))
    logger.info("paused until somebody approves the promotion in the UI (Resume), at most %g hours", config.approve_hours)
    asked, seconds = form.with_initial_data(question), math.ceil(config.approve_hours * 3600)
    try:
        answer: Any = pause_flow_run(wait_for_input=asked, timeout=seconds, poll_interval=POLL_SECONDS)
    except FlowPauseTimeout:
        return f"nobody approved it within {config.approve_hours:g} hours"
    said = f": {answer.remark}" if answer.remark else ""
    logger.info("%s in the UI%s", "approved" if answer.promote else "not approved", said)
    return None if answer.promote else f"not approved in the UI{said}"


def _promoted(recipe_name: str) -> Candidate | None:
    """The model promoted before, if it is still there and whole."""
    with suppress(OSError, ValueError, KeyError):
        return _candidate((home() / "models" / recipe_name / PROMOTED).resolve(strict=True))
    return None


def _candidate(path: Path) -> Candidate:
    metrics, lineage = (json.loads((path / name).read_text(encoding="utf-8")) for name in ("metrics.json", "lineage.json"))
    return Candidate(
        name=f"{path.parent.name}/{path.name[:8]}",
        adapter=lineage["adapter"],
        tokenizer=lineage["base_model"]["tokenizer"],
        metrics=metrics,
    )
