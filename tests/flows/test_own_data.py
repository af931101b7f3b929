"""Own data of any format and kind trains, is judged, asked and served with its template; equal rows share a training."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from flows.cli.main import app
from flows.models.endpoint import load_endpoint, make_app
from flows.models.saved import find_saved
from flows.models.serve import merged_copy
from flows.pipeline import describe_sources, plan_run
from flows.recipes import build_recipe, load_recipe
from flows.reports.results import Results
from flows.suggest import recipe_text
from tasks.caching.runs import past_runs
from tasks.reading.model_files import read_json, read_special
from tasks.refs import InputError, SavedModel
from tests.support.chat_templates import CHATML, GEMMA
from tests.support.here import make_here, run_here
from tests.support.rows import WRITERS
from tests.support.tiny import EOS, PAD, make_tiny_model
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
PRODUCT_SETTINGS: dict[str, Any] = {
    "ingest": {"columns": {"uid": "Código", "title": "Nome", "content": "Descrição"}},
    "sharegpt": {"merged_prompt": "{title}[[ da {Marca}]]", "conversation_extension": 2},
}
CHAT_SETTINGS: dict[str, Any] = {"template": {"source": "model"}}


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


def settings_of(name: str, source: Path, root: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Nothing but a recipe: what the rows want, on a tiny model for seconds."""
    made = json.loads(json.dumps(TINY | settings)) | {"name": name}
    made["model"] |= {"id": str(root / "model")}
    made["ingest"] = {**made.get("ingest", {}), "sources": [str(source)]}
    return made


def rows_of(kind: str, name: str) -> list[dict[str, Any]]:
    """Lists are written as JSON where a format has none."""
    flat = name in ("csv", "tsv")
    return [
        {key: json.dumps(value) if flat and isinstance(value, list) else value for key, value in row.items()}
        for row in KINDS[kind]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_of_a_kind_gives_the_same_tokens_and_adapter(kind: str, root: Path, tmp_path: Path) -> None:
    """What a format's tokens are trained to is served from the record of another's, so they are the same to the byte."""
    settings, made = PRODUCT_SETTINGS if kind == "products" else CHAT_SETTINGS, dict[str, list[str]]()
    for name in WRITERS:
        source = WRITERS[name](tmp_path / f"rows.{name}", rows_of(kind, name))
        made[name] = make_here(build_recipe(settings_of(f"own-{kind}", source, root, settings)), "finetune")
    if kind != "sharegpt":  # the conversations of `messages`, which have been trained on
        assert made.pop("jsonl")[:6] == ["ingest", "sample", "sharegpt", "template", "tokenize", "finetune"]
    assert all(set(stages) <= {"ingest", "join"} for stages in made.values())


OTHER = [
    {"asin": row, "name": f"Panela {row}", "price": 9.5 + row, "details": f"De ferro; {row} kg", "brand": "Brisa"}
    for row in range(40)
]
"""Products in columns of other names and types."""
OWN: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "products-csv": ("csv", PRODUCTS, PRODUCT_SETTINGS),
    "products-parquet": (
        "parquet",
        OTHER,
        {
            "ingest": {"columns": {"uid": "asin", "title": "name", "content": "details"}},
            "sharegpt": {"merged_prompt": "{title}[[ de {brand}]][[ a {price}]]", "conversation_extension": 1},
        },
    ),
    **{f"{kind}-jsonl": ("jsonl", rows, CHAT_SETTINGS) for kind, rows in KINDS.items() if kind != "products"},
}
"""{name of the recipe: format, rows, settings}."""


@pytest.mark.parametrize("name", OWN)
def test_model_is_judged_asked_and_served_with_its_template(name: str, root: Path, tmp_path: Path) -> None:
    ending, rows, settings = OWN[name]
    source = WRITERS[ending](tmp_path / f"dados.{ending}", rows)
    (tmp_path / f"{name}.yaml").write_text(recipe_text(settings_of(name, source, root, settings)))
    saved, _ = run_here(load_recipe(str(tmp_path / f"{name}.yaml")))
    own = settings is CHAT_SETTINGS
    metrics = read_json(saved.data / "metrics.json")
    assert metrics["rows"] == 6
    assert 0 < metrics["tuned"]["nll"] < metrics["base"]["nll"]
    assert next(run for run in past_runs() if run["recipe"] == name)["verdict"]["against"] == ["base"]
    assert ((saved.data / "chat_template.jinja").read_text() == CHAT) == own
    said = [json.loads(line) for line in (saved.data / "generations.jsonl").read_text().splitlines()]
    assert all(one["reference"] and one["reference"] not in one["prompt"] for one in said)
    assert all(one["prompt"].endswith("<|im_start|>assistant\n") == own for one in said)
    asked = (
        ["--prompt", "Chaleira?"]
        if own
        else ["--title", "Chaleira", "--column", "Marca=Aurora" if "csv" in name else "brand=Brisa"]
    )
    done = CliRunner().invoke(app, ["ask", name, *asked, "--max-new-tokens", "4"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()
    check_served(saved, "Chaleira?" if own else "Chaleira da Aurora" if "csv" in name else "Chaleira de Brisa")


def test_conversations_train_in_packs_by_fast_too(root: Path, tmp_path: Path) -> None:
    source = WRITERS["jsonl"](tmp_path / "rows.jsonl", KINDS["messages"])
    fast = ["backend=fast", "optimizer=adamw_torch_fused", "batch_size=1"]
    changes = ["pack.tokens=512", *(f"finetune.{change}" for change in fast)]
    saved, _ = run_here(build_recipe(settings_of("own-fast", source, root, CHAT_SETTINGS), changes))
    metrics = read_json(saved.data / "metrics.json")
    assert 0 < metrics["tuned"]["nll"] < metrics["base"]["nll"]


def test_answers_may_end_with_another_token_than_eos(root: Path, tmp_path: Path) -> None:
    """As those of Gemma and Phi 3, whose generation_config.json names it: the saved tokenizer's EOS is that token."""
    from transformers import AutoTokenizer

    base = make_tiny_model(tmp_path / "model", seed=1)
    (base / "chat_template.jinja").write_text(GEMMA.replace("<end_of_turn>", PAD))
    (base / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 2}))
    source = WRITERS["jsonl"](tmp_path / "rows.jsonl", KINDS["completion"])
    settings = settings_of("own-stop", source, root, CHAT_SETTINGS)
    saved, _ = run_here(build_recipe(settings, [f"model.id={base}", "evaluate.generations=0"]))
    assert read_special(saved.data.path).eos == PAD
    check_served(saved, "Chaleira?")
    assert AutoTokenizer.from_pretrained(saved.data.path).eos_token == PAD
    asked = CliRunner().invoke(app, ["ask", "own-stop", "--prompt", "Chaleira?", "--max-new-tokens", "4"])
    assert asked.exit_code == 0, asked.output


def check_served(saved: SavedModel, words: str) -> None:
    """The routes of `amazon-ft serve`, over HTTP in this process, answer as the merged model does in the saved template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = merged_copy(find_saved(str(saved.data.path)), lambda _: None)
    chat = [{"role": "user", "content": words}]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(merged)  # and back, since the endpoint goes elsewhere
        client = TestClient(make_app(load_endpoint(merged), None), base_url="http://127.0.0.1:8000")
        answer = client.post("/v1/chat/completions", json={"messages": chat, "max_tokens": 4, "temperature": 0})
    assert answer.is_success, answer.text
    tokenizer, model = AutoTokenizer.from_pretrained(saved.data.path), AutoModelForCausalLM.from_pretrained(merged)
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.json()["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert answer.json()["choices"][0]["message"]["content"] == tokenizer.decode(said, skip_special_tokens=True)


@pytest.mark.parametrize("split", ["before", "after"])
def test_held_out_rows_may_have_a_file_of_their_own(split: str, root: Path, tmp_path: Path) -> None:
    """As AmazonTitles has trn.json and tst.json, here in one archive as it is distributed."""
    WRITERS["jsonl"](
        tmp_path / "tst.json", [*PRODUCTS[:3], *({**row, "Nome": f"Panela {row['Código']}"} for row in PRODUCTS[:9])]
    )
    with ZipFile(tmp_path / "raw.zip", "w") as archive:
        archive.writestr("raw/tst.json.gz", gzip.compress((tmp_path / "tst.json").read_bytes()))
    source = WRITERS["jsonl"](tmp_path / "trn.json", PRODUCTS)
    held_out = {"sample": {"rows": 30, "eval_rows": 9, "eval_split": split}}
    settings = settings_of("own-held-out", source, root, PRODUCT_SETTINGS | held_out)
    there = f"zip://**/tst.json.gz::file://{tmp_path}/raw.zip"
    recipes = [build_recipe(settings, [f"sample.eval_sources={place}"]) for place in (tmp_path / "tst.json", there)]
    saved, _ = run_here(recipes[0])
    assert read_json(saved.data / "metrics.json")["rows"] == 9
    uids = {uid for row in read_json(saved.data / "metrics.json")["per_row"] for uid in row["uids"]}
    assert uids <= {str(row) for row in range(9)}
    assert set(run_here(recipes[1])[1]) <= {"ingest"}
    assert [line.partition(":")[0] for line in describe_sources(recipes[0])] == ["trn.json", "tst.json"]
    products = Results(next(run for run in past_runs() if run["recipe"] == "own-held-out")).products
    assert products is not None
    assert products.lines == len(PRODUCTS)
    with pytest.raises(InputError, match=r"^sample.eval_sources: .*gone.json: not found"):
        plan_run(build_recipe(settings, [f"sample.eval_sources={tmp_path}/gone.json"]))
