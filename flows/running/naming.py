"""Names of runs: recipe, sample size, and a short digest that tells two configurations apart."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tasks.caching.identity import canonical
from tasks.config import Recipe

DIGITS = 8


def short_digest(recipe: Recipe) -> str:
    """8 hex digits over everything in the recipe that can change a result."""
    return hashlib.sha256(json.dumps(canonical(recipe), sort_keys=True).encode()).hexdigest()[:DIGITS]


def run_name(recipe: Recipe) -> str:
    """For instance `demo 1,000 rows 3f9a12bc`."""
    return f"{recipe.name} {recipe.sample.rows:,} rows {short_digest(recipe)}"


def run_tags(recipe: Recipe) -> list[str]:
    """To filter runs by."""
    return ["amazon-ft", recipe.name, f"{recipe.sample.rows:,} rows", short_digest(recipe)]


def recipe_name() -> str:
    """Prefect's flow_run_name of both flows, until the run is open and named in whole (flows/reports/ui.py)."""
    from prefect.runtime import flow_run

    parameters: dict[str, Any] = flow_run.parameters
    settings: Any = parameters.get("config") or parameters.get("recipe")
    return settings.name if isinstance(settings, Recipe) else str(settings.get("name", "amazon-ft"))
