"""Recipes by name or file, with `--set a.b=c` overrides; every mistake reported at once."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from flows.choices import StageName
from tasks.caching.identity import canonical
from tasks.config import PASSWORD, Recipe
from tasks.refs import ConfigError

DIGITS = 8
SHIPPED = Path(__file__).parents[1] / "deployments" / "recipes"
"""Beside the packages, in a checkout as in an installed wheel."""


def check_until(until: str | None, recipe: Recipe) -> None:
    """Refuse to end with a stage that the recipe does not have: the run would go on to the end.

    Raises:
        ConfigError: naming those that it has.
    """
    from tasks.model import SMOLLM2

    left_out = {
        StageName.CATALOGUE: recipe.catalogue is None,
        StageName.FETCH_MODEL: recipe.model.id != SMOLLM2,
        StageName.PACK: recipe.pack is None,
    }
    stages = [stage.value for stage in StageName if not left_out.get(stage)]
    if until is not None and until not in stages:
        raise ConfigError(f"until: no such stage in recipe {recipe.name}: got {until}; expected one of {', '.join(stages)}.")


def override_pattern() -> str:
    """The regular expression of `KEY=VALUE` for every key of a recipe: in the schema of a flow's parameters it lets the server
    refuse a wrong key before there is a run.
    """
    return f"^ *({'|'.join(_keys(Recipe))}) *="


def _keys(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _section(field)
        more = rf"(\.({'|'.join(_keys(inner))}))?" if inner else ""
        yield f"{name}{more}"


def short_digest(recipe: Recipe) -> str:
    """8 hex digits over everything in the recipe that can change a result."""
    return hashlib.sha256(json.dumps(canonical(recipe), sort_keys=True).encode()).hexdigest()[:DIGITS]


def run_tags(recipe: Recipe) -> list[str]:
    """To filter runs of a recipe by; all but the first make a run's title, such as `demo 1,000 rows 3f9a12bc`."""
    return ["amazon-ft", recipe.name, f"{recipe.sample.rows:,} rows", short_digest(recipe)]


def shipped_names() -> list[str]:
    """Names of the recipes that come with amazon-ft."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def load_recipe(name_or_file: str, overrides: Iterable[str] = ()) -> Recipe:
    """A shipped recipe by name, or any YAML file, with overrides applied.

    Raises:
        ConfigError: naming every unknown key, wrong type, value out of bounds and impossible combination.
    """
    return build_recipe(_read(name_or_file), overrides, where=f"recipe {name_or_file}")


def build_recipe(settings: dict[str, Any], overrides: Iterable[str] = (), *, where: str = "recipe") -> Recipe:
    """A validated recipe from plain settings and overrides.

    Raises:
        ConfigError: as load_recipe.
    """
    for override in overrides:
        _apply(settings, override)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        lines = [f"  {line}" for detail in error.errors() for line in _explain(detail)]
        raise ConfigError("\n".join([f"{where}: {len(lines)} problem{'s' * (len(lines) > 1)}:", *lines])) from error


def override(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """The recipe with single values changed; itself where there are none.

    Raises:
        ConfigError: as load_recipe.
    """
    changes = tuple(overrides)
    return build_recipe(recipe.model_dump(mode="json"), changes) if changes else recipe


class UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping; YAML has none, and PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base does, of keys that differ."""
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} stands twice", key_node.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str) -> Any:
    try:
        return yaml.load(text, UniqueKeys)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def _read(name_or_file: str) -> dict[str, Any]:
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml"):
        path = SHIPPED / f"{name_or_file}.yaml"
    if not path.is_file():
        raise ConfigError(f"recipe {name_or_file}: not found; expected one of {', '.join(shipped_names())} or a .yaml file")
    try:
        settings = _load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path}: not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"recipe {path}: got {type(settings).__name__}; expected a mapping of sections")
    return {"name": path.stem, **cast("dict[str, Any]", settings)}


def _apply(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: expected KEY=VALUE, such as finetune.learning_rate=1e-4")
    *sections, name = key.strip().split(".")
    for section in sections:
        if not isinstance(settings.get(section), dict):
            settings[section] = {}
        settings = settings[section]
    try:
        settings[name] = _load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: value is not YAML: {error}") from error


def _explain(detail: ErrorDetails) -> list[str]:
    """One line a problem: dotted key, what was got, what is allowed."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        allowed = _allowed(detail["loc"][:-1])
        close = difflib.get_close_matches(str(detail["loc"][-1]), allowed, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return [f"{key}: unknown key{hint} Allowed: {', '.join(allowed)}."]
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not isinstance(detail["input"], (str, int, float, bool, type(None))):
        return [f"{key}: {message}"] if key else message.split("; ")
    got = PASSWORD.sub(r"\1:***", repr(detail["input"]))
    return [f"{key}: got {got}; expected {message}"]


def _allowed(path: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in path:
        model = _section(model.model_fields[str(part)]) or model
    return sorted(model.model_fields)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section of its own."""
    options = get_args(field.annotation) or (field.annotation,)
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)
