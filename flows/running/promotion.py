"""The last step of a run: the verdict on what was saved, and the name `promoted` for what passed it."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path

from tasks.caching import locks
from tasks.caching.context import context
from tasks.config import PROMOTED, Recipe
from tasks.evaluation.verdict import Candidate, Verdict, judge
from tasks.refs import SavedModel, home
from tasks.save import publish_link

logger = logging.getLogger(__name__)


def promote(saved: SavedModel, recipe: Recipe) -> Verdict:
    """Judge a saved model and, if it is better, point models/RECIPE/promoted at it; the run's record tells.

    Judging and pointing are one step under the root's mutex: of two runs at once, the second is judged by the first.

    Raises:
        InputError: when something else lies where the link belongs.
    """
    with locks.mutex():
        verdict = judge(_candidate(saved.data.path), _promoted(recipe.name), recipe.promote)
        if verdict.promoted:
            publish_link(saved, recipe.name, PROMOTED)
    if (run := context().run) is not None:
        run.verdict = verdict.model_dump(mode="json")
    logger.info("%s: %s", "promoted" if verdict.promoted else "not promoted", "; ".join(verdict.reasons))
    return verdict


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
