"""A tiny recipe on real files: real stages, a real server, a model of a few thousand weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tasks.catalogue import lines
from tasks.config import CatalogueConfig
from tests.support.checkout import Checkout, Ended
from tests.support.tiny import make_tiny_model
from tests.support.tiny_recipe import TINY

RECIPE: dict[str, Any] = {
    **TINY,
    "ingest": {"on_bad_row": "quarantine", "max_bad_share": 0.1},
    "sample": {"rows": 40, "eval_rows": 6},
    "sharegpt": {"conversation_extension": 2},
    "finetune": {**TINY["finetune"], "batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2},
    "evaluate": {"generations": 2, "max_new_tokens": 8, "batch_size": 4},
}


LINGER = """    import os
    import time

    time.sleep(float(os.environ.get("LINGER_SECONDS", "0")))
    while kind == "adapter" and os.path.exists(os.environ.get("LINGER_WHILE", "")):
        time.sleep(0.1)
    manifest = write_manifest(draft.path, kind)
"""


@dataclass(frozen=True)
class Tiny:
    """A source, a model and a recipe of a test's own, a checkout to edit, and a root."""

    checkout: Checkout
    recipe: Path
    source: Path
    model: Path
    home: Path

    def run(self, *arguments: str, **options: Any) -> Ended:
        """`amazon-ft run` of the recipe."""
        own = {"AMAZON_FT_HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        return self.checkout.amazon_ft("run", str(self.recipe), "--json", *arguments, **own, **options)

    def ran(self, *arguments: str, **options: Any) -> dict[str, dict[str, Any]]:
        """{stage: entry} of a run."""
        last = self.run(*arguments, **options).stdout.splitlines()[-1]
        return {stage["name"]: stage for stage in json.loads(last)["stages"]}

    def plan(self, *arguments: str, **env: str) -> dict[str, dict[str, Any]]:
        """{stage: step} of a plan."""
        return self.checkout.plan(str(self.recipe), *arguments, AMAZON_FT_HOME=str(self.home), **env)

    def let_drafts_linger(self) -> None:
        """Keep written drafts unpublished for LINGER_SECONDS, an adapter's while the file LINGER_WHILE is there.

        A kill or another run can meet them then.

        The store is outside every stage's code.
        """
        self.checkout.edit("tasks/caching/store.py", "    manifest = write_manifest(draft.path, kind)\n", LINGER)

    def copy_to(self, path: Path) -> Tiny:
        """The same with everything copied, the source's and the model's times included."""
        shutil.copytree(self.home.parent, path, symlinks=True)
        moved = Tiny(Checkout(path / "checkout"), path / "tiny.yaml", path / "trn.json", path / "model", path / self.home.name)
        moved.write_recipe()
        return moved

    def write_recipe(self) -> None:
        settings = json.loads(json.dumps(RECIPE))
        settings["ingest"]["sources"] = [str(self.source)]
        settings["model"]["id"] = str(self.model)
        self.recipe.write_text(yaml.safe_dump(settings))


def make_tiny(path: Path) -> Tiny:
    path.mkdir(parents=True, exist_ok=True)
    tiny = Tiny(Checkout.copy_to(path / "checkout"), path / "tiny.yaml", path / "trn.json", path / "model", path / "home")
    config = CatalogueConfig(rows=200, malformed_lines=2)
    tiny.source.write_text("".join(f"{line}\n" for line in lines(config)), encoding="utf-8")
    make_tiny_model(tiny.model)
    tiny.write_recipe()
    return tiny
