"""What a run is called: recipe, sample size, and a short digest that tells two configurations apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from flows.recipes import build_recipe
from tasks.caching.identity import canonical
from tasks.config import Recipe
from tasks.refs import ConfigError

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


def name_run() -> str:
    """Prefect's flow_run_name of both flows; of a recipe that is wrong only its name."""
    from prefect.runtime import flow_run

    parameters: dict[str, Any] = flow_run.parameters
    settings: Any = parameters.get("config") or parameters.get("recipe")
    overrides: Iterable[str] = parameters.get("overrides") or ()
    plain = settings.model_dump(mode="json") if isinstance(settings, Recipe) else json.loads(json.dumps(settings))
    try:
        return run_name(build_recipe(plain, overrides))
    except ConfigError:
        return str(plain.get("name", "amazon-ft"))


__all__ = ["name_run", "run_name", "run_tags", "short_digest"]
