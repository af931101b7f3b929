"""A saved model is asked as it was trained: with its own template, question and merged prompt; the base answers beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from flows.models.ask import AskOptions, check_question, render_said, render_title
from flows.models.saved import find_saved
from flows.recipes import load_recipe
from tasks.caching.manifest import MANIFEST
from tasks.config import TemplateConfig
from tasks.refs import InputError
from tasks.training.inference.chat import ChatModel, load_chat_model
from tests.support.tuned import METRICS, save_tuned


@pytest.fixture
def asked(tuned: tuple[Path, Path]) -> ChatModel:
    save_tuned(*tuned, **{"template.chat_template": json.dumps(TemplateConfig().chat_template)})
    saved = find_saved("demo")
    return load_chat_model(saved.path, saved.base(), saved.recipe.model.weights)


def test_a_saved_model_that_is_not_as_it_was_saved_is_refused(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    saved = save_tuned(*tuned)
    (saved.data / "adapter_model.bin").touch()
    with pytest.raises(
        InputError, match=r"^model .*: adapter_model\.bin is stray; expected the files that amazon-ft run saved\."
    ):
        find_saved("demo")
    shutil.copytree(saved.data.path, tmp_path / "copy")
    with pytest.raises(InputError, match=r"adapter_model\.bin is stray"):
        find_saved(str(tmp_path / "copy"))
    (tmp_path / "copy" / MANIFEST).unlink()
    assert find_saved(str(tmp_path / "copy")).recipe.name == "demo"


def test_saved_models_are_listed_with_what_they_measured(tuned: tuple[Path, Path]) -> None:
    saved = save_tuned(*tuned)
    (listed,) = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)
    assert listed | {"saved": ""} == {
        "model": "demo/unsloth_model_optimized",
        "promoted": False,
        "saved": "",
        "nll": METRICS["tuned"]["nll"],
        "base": "org/tiny",
        "path": str(saved.data.path),
    }
    (saved.data / "lineage.json").write_text("{")
    said = CliRunner().invoke(app, ["models"]).stdout
    assert "demo/unsloth_model_optimized" in said
    assert "damaged" in said


def test_the_answer_comes_piece_by_piece_and_is_the_greedy_one(asked: ChatModel) -> None:
    import torch

    pieces: list[str] = []
    answer = asked.answer("Chaleira", None, max_new_tokens=12, say=pieces.append)
    chat = [{"role": "user", "content": "Chaleira"}]
    ids = asked.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(12):
            following = asked.model(ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
            if following.item() == asked.tokenizer.eos_token_id:
                break
    assert "".join(pieces).strip() == answer.strip() == asked.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
    assert answer.strip()


def test_base_and_tuned_model_answer_differently(asked: ChatModel) -> None:
    heard: list[str] = []
    both = [asked.answer("Chaleira", None, max_new_tokens=8, tuned=tuned, say=heard.append) for tuned in (False, True)]
    assert both[0] != both[1]


def test_a_question_takes_the_place_of_the_recipes_own(asked: ChatModel) -> None:
    chat = [{"role": "user", "content": "Chaleira"}]
    own = asked.tokenizer.apply_chat_template(chat, question=None, add_generation_prompt=True, tokenize=False)
    other = asked.tokenizer.apply_chat_template(chat, question="De que é feita?", add_generation_prompt=True, tokenize=False)
    assert load_recipe("demo").template.questions[0] in own
    assert "De que é feita?" in other


def test_the_command_asks_both_and_then_stops(asked: ChatModel) -> None:
    done = CliRunner().invoke(app, ["ask", "demo", "--title", "Chaleira", "--compare"])
    assert done.exit_code == 0, done.output
    assert done.stdout.index("base: ") < done.stdout.index("tuned: ")


def test_without_a_title_it_asks_until_an_empty_line(asked: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Chaleira", "Tray", "", "never read"])
    heard: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt: heard.append(prompt) or next(lines))
    assert CliRunner().invoke(app, ["ask", "demo", "--max-new-tokens", "2"]).exit_code == 0
    assert heard == ["title> "] * 3


def test_a_title_is_asked_as_the_recipe_renders_it() -> None:
    recipe = load_recipe("demo", ["sharegpt.merged_prompt='Produto: {title}[[, {content}]]'"])
    assert render_title(recipe, " Chaleira ") == "Produto: Chaleira"


def test_further_columns_are_asked_by_name() -> None:
    recipe = load_recipe("demo", ["sharegpt.merged_prompt='{title}[[ de {marca}]]'"])
    assert render_title(recipe, "Chaleira", {"marca": "Aurora"}) == "Chaleira de Aurora"
    assert render_title(recipe, "Chaleira") == "Chaleira"
    with pytest.raises(InputError, match="--column: got cor; expected a column of the merged prompt: title, marca"):
        render_title(recipe, "Chaleira", {"cor": "azul"})


def test_a_model_of_conversations_is_asked_in_the_users_words() -> None:
    recipe = load_recipe("demo", ["catalogue=null", "ingest.sources=a.jsonl", "ingest.kind=messages"])
    assert render_said(recipe, "Hi", AskOptions(None, None, False, None, prompt="Hi")) == "Hi"
    with pytest.raises(InputError, match="--title: this model was trained on conversations"):
        render_said(recipe, "Hi", AskOptions("Hi", None, False, None))


def test_an_empty_title_is_refused() -> None:
    with pytest.raises(InputError, match="expected a product's title"):
        render_title(load_recipe("demo"), " ")


def test_bytes_that_are_no_text_are_refused() -> None:
    recipe = load_recipe("demo")
    with pytest.raises(InputError, match=r"--title: got 'Ch\\udcff'; expected text in UTF-8"):
        render_title(recipe, "Ch\udcff")
    with pytest.raises(InputError, match=r"--question: got '\\udcff'; expected text in UTF-8"):
        check_question(recipe, "\udcff")


def test_a_question_is_refused_where_the_template_has_none() -> None:
    check_question(load_recipe("demo"), None)
    check_question(load_recipe("default", ["ingest.sources=trn.json"]), "De que é feita?")
    with pytest.raises(InputError, match=r"--question: got Why\?; expected none: this model's chat_template has no \{question\}"):
        check_question(load_recipe("demo"), "Why?")
