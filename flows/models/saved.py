"""Saved models by name or path, and the base model that each was trained on, by content."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flows.recipes import build_recipe
from tasks.caching.manifest import MANIFEST, find_damage
from tasks.caching.runs import past_runs
from tasks.config import Recipe
from tasks.reading.model_files import directory_model, directory_tokenizer, read_json
from tasks.refs import InputError, Model, home

if TYPE_CHECKING:
    from rich.console import Console

ADAPTER = "adapter_config.json"
PROMOTED = "promoted"


@dataclass(frozen=True)
class Saved:
    """A saved model's directory, and the recipe that made it."""

    path: Path
    recipe: Recipe

    @property
    def lineage(self) -> dict[str, Any]:
        """lineage.json."""
        return read_json(self.path / "lineage.json")

    def base(self) -> Model:
        """The base model with its weights on this machine, and with the saved tokenizer and chat template.

        Raises:
            InputError: when it is not here, or not what the adapter was trained on.
        """
        return _base(self).model_copy(update={"tokenizer": directory_tokenizer(self.path)})


def find_saved(name: str) -> Saved:
    """A saved model by its directory, by RECIPE/NAME, or by its recipe: the promoted one, else the newest.

    Raises:
        InputError: when there is none, naming those that there are, or when it is not as it was saved.
    """
    models = home() / "models"
    found = next((path for path in (Path(name).expanduser(), models / name) if (path / ADAPTER).is_file()), None)
    found = found or _of_recipe(models / name)
    if found is None:
        there = sorted(f"{path.parent.parent.name}/{path.parent.name}" for path in models.glob(f"*/*/{ADAPTER}"))
        raise InputError(
            f"model {name}: not found; expected a saved model's directory, RECIPE/NAME or a recipe that has run. "
            + (f"There are: {', '.join(there)}." if there else f"Nothing is saved under {models} yet: run amazon-ft run demo.")
        )
    path = found.resolve()
    if not (path / "recipe.yaml").is_file() or not (path / "lineage.json").is_file():
        raise InputError(f"model {path}: has no recipe.yaml or no lineage.json; expected a directory that amazon-ft run saved.")
    _check_intact(path)
    settings = yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))
    return Saved(path, build_recipe(settings, where=f"{path / 'recipe.yaml'}"))


def promoted_link(name: str) -> Path | None:
    """Where a recipe's promoted model is found, now or later; None for the name of one model, or its directory."""
    folder = home() / "models" / name
    one = any((path / ADAPTER).is_file() for path in (Path(name).expanduser(), folder))
    return None if one else folder / PROMOTED


def list_saved() -> list[dict[str, Any]]:
    """Every saved model, newest first: model (RECIPE/NAME), promoted, saved, nll, base, path; a damaged one without."""
    links = [path.parent for path in (home() / "models").glob(f"*/*/{ADAPTER}") if path.parent.name != PROMOTED]
    return [_entry(link) for link in sorted(links, key=lambda link: link.lstat().st_mtime, reverse=True)]


def _entry(link: Path) -> dict[str, Any]:
    told: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    if not find_damage(link.resolve()):
        told, measured = read_json(link / "lineage.json"), read_json(link / "metrics.json")
    return {
        "model": f"{link.parent.name}/{link.name}",
        "promoted": (link.parent / PROMOTED).resolve() == link.resolve(),
        "saved": time.strftime("%Y-%m-%d %H:%M", time.localtime(link.lstat().st_mtime)),
        "nll": measured.get("tuned", {}).get("nll"),
        "base": told.get("base_model", {}).get("name"),
        "path": str(link.resolve()),
    }


def show_models(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One line a model."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for name in ("model", "saved"):
        table.add_column(name, no_wrap=True)
    table.add_column("nll", justify="right")
    for name in ("promoted", "base"):
        table.add_column(name, overflow="fold")
    for row in rows:
        nll = "" if row["nll"] is None else f"{row['nll']:.4f}"
        table.add_row(row["model"], row["saved"], nll, "yes" if row["promoted"] else "", row["base"] or "damaged")
    console.print(table)


def _check_intact(path: Path) -> None:
    is_copy = not path.is_relative_to(home().resolve())
    if is_copy and not (path / MANIFEST).is_file():
        return
    if damage := find_damage(path):
        raise InputError(
            f"model {path}: {damage.name} is {damage.how}; expected the files that amazon-ft run saved. Run the recipe again, "
            f"which saves it anew; of a copy that was changed on purpose, remove {MANIFEST}."
        )


def _of_recipe(folder: Path) -> Path | None:
    links = [link for link in folder.glob("*") if (link / ADAPTER).is_file()]
    return next((link for link in links if link.name == PROMOTED), None) or max(
        links, key=lambda link: link.lstat().st_mtime_ns, default=None
    )


def _base(saved: Saved) -> Model:
    recorded = saved.lineage["base_model"]
    name, digest = str(recorded["name"]), str(recorded["digest"])
    if digest.startswith("hub:"):
        from tasks.model import hub_model, with_weights

        return with_weights(hub_model(*digest.removeprefix("hub:").split("@")))
    places = list(dict.fromkeys(_places(saved)))
    for path in places:
        with suppress(InputError):  # another directory of that name, and no model
            if path.is_dir() and (model := directory_model(path.resolve(), name=name)).digest == digest:
                return model
    raise InputError(
        f"model {saved.path}: its base model {name} is not here: got no directory with digest {digest[:16]}... "
        f"at {' or '.join(map(str, places))}; expected the one that it was trained on. "
        "Run its recipe with --set model.id=DIRECTORY, wherever that model lies now (what is cached stays so), or set "
        "AMAZON_FT_HOME to the root where the model was made."
    )


def _places(saved: Saved) -> Iterator[Path]:
    """Where a base model of no Hub may lie: fetched by a stage, where training found it, or what the recipe or a run names."""
    stages = {record["name"]: record for record in saved.lineage["stages"]}
    for root in (home(), saved.path.parent.parent.parent):
        if "fetch_model" in stages:
            yield root / "artifacts" / "model" / stages["fetch_model"]["digest"][:32]
        if "finetune" in stages:
            for file in (root / "work" / stages["finetune"]["key"][:32]).glob(f"checkpoint-*/{ADAPTER}"):
                with suppress(InputError):  # a checkpoint that was cut off
                    yield Path(read_json(file)["base_model_name_or_path"])  # PEFT notes what it was given, an absolute path
    yield Path(saved.recipe.model.id).expanduser().absolute()
    named = (Path(run["config"]["model"]["id"]).expanduser().absolute() for run in past_runs() if run["config"].get("model"))
    yield from (path for path in named if path.is_dir())
