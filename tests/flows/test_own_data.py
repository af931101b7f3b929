"""Own data of any format and kind trains, is judged, and is asked with its template; equal rows share a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from flows.recipes import build_recipe
from tasks.config import Recipe
from tasks.reading.model_files import read_json
from tests.support.chat_templates import CHATML
from tests.support.here import run_here
from tests.support.rows import WRITERS
from tests.support.tiny import EOS, make_tiny_model
from tests.support.tiny_recipe import TINY

pytestmark = pytest.mark.heavy

CHAT = CHATML.replace("<|im_end|>", EOS)
PRODUCTS = [
    {"Código": str(row), "Nome": f"Chaleira {row}", "Descrição": f"De aço; {row} litros", "Marca": "Aurora"} for row in range(40)
]


def messages(row: int) -> list[dict[str, str]]:
    told = [{"role": "system", "content": "Seja breve."}] if row % 3 == 0 else []
    turns = [(f"Chaleira {row}?", f"De aço, {row} litros."), ("E a marca?", "Aurora.")][: 1 + row % 2]
    roles = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    return told + roles


def sharegpt(row: int) -> dict[str, Any]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[one["role"]], "value": one["content"]} for one in messages(row)]}


KINDS: dict[str, list[dict[str, Any]]] = {
    "products": PRODUCTS,
    "messages": [{"messages": messages(row)} for row in range(40)],
    "sharegpt": [sharegpt(row) for row in range(40)],
    "completion": [{"prompt": f"Chaleira {row}?", "completion": f"De aço, {row} litros."} for row in range(40)],
    "alpaca": [{"instruction": "Descreva.", "input": f"Chaleira {row}", "output": f"De aço, {row} litros."} for row in range(40)],
}
COLUMNS = {"uid": "Código", "title": "Nome", "content": "Descrição"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root that the tests share, with a tiny instruct model in it."""
    path = tmp_path_factory.mktemp("own")
    make_tiny_model(path / "model")
    (path / "model" / "chat_template.jinja").write_text(CHAT)
    return path


@pytest.fixture(autouse=True)
def shared_home(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMAZON_FT_HOME", str(root / "home"))
    return root / "home"


def recipe_of(kind: str, source: Path, root: Path) -> Recipe:
    """Nothing but a recipe: the columns of products, and else the model's own template."""
    settings = json.loads(json.dumps(TINY)) | {"name": f"own-{kind}"}
    settings["model"] |= {"id": str(root / "model")}
    settings["ingest"] = {"sources": [str(source)]}
    if kind == "products":
        settings["ingest"] |= {"columns": COLUMNS}
        settings["sharegpt"] = {"merged_prompt": "{title}[[ da {Marca}]]", "conversation_extension": 2}
    else:
        settings["template"] = {"source": "model"}
    return build_recipe(settings)


def rows_of(kind: str, name: str) -> list[dict[str, Any]]:
    """Lists are written as JSON where a format has none."""
    flat = name in ("csv", "tsv")
    return [
        {key: json.dumps(value) if flat and isinstance(value, list) else value for key, value in row.items()}
        for row in KINDS[kind]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_of_a_kind_gives_the_same_adapter(kind: str, root: Path, tmp_path: Path) -> None:
    """Of products and messages all formats; of the other kinds, which come to the same rows, one of each family."""
    adapters, made = set[str](), list[list[str]]()
    for name in WRITERS if kind in ("products", "messages") else ("jsonl", "csv", "parquet"):
        source = WRITERS[name](tmp_path / f"rows.{name}", rows_of(kind, name))
        saved, stages = run_here(recipe_of(kind, source, root))
        adapters.add(read_json(saved.data / "lineage.json")["adapter"])
        made.append(stages)
    assert len(adapters) == 1
    if kind != "sharegpt":  # the conversations of `messages`, which have been trained on
        assert made[0][:6] == ["ingest", "sample", "sharegpt", "template", "tokenize", "finetune"]
    assert all(set(stages) <= {"ingest", "join"} for stages in made[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_model_is_judged_and_asked_with_its_template(kind: str, root: Path, tmp_path: Path) -> None:
    source = WRITERS["jsonl"](tmp_path / "rows.jsonl", KINDS[kind])
    recipe = recipe_of(kind, source, root)
    saved, _ = run_here(recipe)
    metrics = read_json(saved.data / "metrics.json")
    assert metrics["rows"] == 6
    assert 0 < metrics["tuned"]["nll"] < metrics["base"]["nll"]
    template = (saved.data / "chat_template.jinja").read_text()
    assert (template == CHAT) == (kind != "products")
    said = [json.loads(line) for line in (saved.data / "generations.jsonl").read_text().splitlines()]
    assert all(one["reference"] and one["reference"] not in one["prompt"] for one in said)
    assert all(one["prompt"].endswith("<|im_start|>assistant\n") == (kind != "products") for one in said)
    asked = ["--title", "Chaleira", "--column", "Marca=Aurora"] if kind == "products" else ["--prompt", "Chaleira?"]
    done = CliRunner().invoke(app, ["ask", recipe.name, *asked, "--max-new-tokens", "4"])
    assert done.exit_code == 0, done.output
