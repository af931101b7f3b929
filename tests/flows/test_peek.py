"""A source is shown as a run would take it, and the recipe that is written for it is one that plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from flows.recipes import load_recipe
from flows.suggest import guess_columns
from tasks.refs import InputError
from tests.support.chat_templates import CHATML
from tests.support.rows import WRITERS
from tests.support.tiny import EOS, make_tiny_model

TALK = [
    {"messages": [{"role": "user", "content": f"Chaleira {row}?"}, {"role": "assistant", "content": "De aço."}]}
    for row in range(3000)
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>", EOS))
    return tmp_path / "model"


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_conversations_are_shown_with_what_is_learnt_marked(tmp_path: Path, model: Path, home: Path) -> None:
    source = WRITERS["jsonl"](tmp_path / "talk.jsonl", TALK)
    told = json.loads(run("peek", source, "--model", model, "--json"))
    assert (told["format"], told["kind"], told["columns"]) == ("JSON lines", "messages", ["messages"])
    assert told["rows"] == pytest.approx(3000, rel=0.1)
    learnt = [[piece["text"] for piece in example if piece["learnt"]] for example in told["examples"]]
    assert learnt == [[f"De aço.{EOS}"]] * 3
    assert list(told["tokens"]) == ["50 %", "90 %", "99 %", "100 %"]
    assert f"⟦De aço.{EOS}⟧" in run("peek", source, "--model", model)
    assert not (home / "artifacts").exists()


def test_rows_are_counted_where_that_is_free(tmp_path: Path) -> None:
    told = json.loads(run("peek", WRITERS["parquet"](tmp_path / "talk.parquet", TALK), "--json"))
    assert (told["rows"], told["is_counted"]) == (3000, True)
    few = json.loads(run("peek", WRITERS["json"](tmp_path / "talk.json", TALK[:7]), "--json"))
    assert (few["rows"], few["is_counted"]) == (7, True)


def test_what_is_left_out_is_counted_over_all_blocks(tmp_path: Path) -> None:
    long = [{"messages": [{"role": "user", "content": "x" * 1000}, *turns]} for turns in ([], TALK[0]["messages"][1:]) * 500]
    told = json.loads(run("peek", WRITERS["jsonl"](tmp_path / "talk.jsonl", long), "--json"))
    assert sum(told["dropped"].values()) == 500


def test_recipe_that_is_written_plans(tmp_path: Path, model: Path) -> None:
    rows = [{"Código": row, "Nome": f"Pão {row}", "Descrição": "De trigo."} for row in range(50)]
    source = WRITERS["csv"](tmp_path / "produtos.csv", rows)
    told = run("init", source, tmp_path / "my.yaml", "--model", model)
    assert "delimited text, utf-8 with ';' between fields" in told
    recipe = load_recipe(str(tmp_path / "my.yaml"))
    assert recipe.ingest.columns.model_dump() == {"uid": "Código", "title": "Nome", "content": "Descrição"}
    plan = json.loads(run("plan", tmp_path / "my.yaml", "--json"))
    assert plan["sources"] == ["produtos.csv: delimited text of products; columns Código, Nome, Descrição"]
    assert plan["stages"][0]["state"] == "run"
    with pytest.raises(InputError, match="is there already"):
        run("init", source, tmp_path / "my.yaml")


def test_columns_that_say_nothing_are_told() -> None:
    with pytest.raises(InputError, match="columns: got a, b; expected the title and the content of a product"):
        guess_columns(["a", "b"])


def test_plan_refuses_what_no_run_could_read(tmp_path: Path) -> None:
    (tmp_path / "trn.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="column 'title' is not there: got columns a, b"):
        run("plan", "default", "--set", f"ingest.sources={tmp_path / 'trn.csv'}", "--set", "model.id=/")
