"""Recipes are read with overrides, and every mistake is reported at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flows.pipeline import plan_run
from flows.recipes import check_until, load_recipe, override_pattern, shipped_names
from flows.reports.results import flat
from tasks.refs import ConfigError


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("ingest: {sources: [trn.json]}\nfinetune: {learning_rate: 1.0e-4}\n")
    return path


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_recipe_loads_and_is_named_after_its_file(name: str) -> None:
    assert load_recipe(name).name == name


def test_the_five_recipes_are_shipped() -> None:
    assert shipped_names() == ["as-written", "chat", "default", "demo", "fast"]


def test_overrides_change_nested_values(recipe: Path) -> None:
    loaded = load_recipe(
        str(recipe), ["finetune.lora.r=32", "pack.tokens=4096", "finetune.backend=hf", "finetune.gradient_checkpointing=full"]
    )
    assert (loaded.name, loaded.finetune.lora.r, loaded.finetune.learning_rate) == ("mine", 32, 1e-4)
    assert loaded.pack is not None
    assert loaded.pack.tokens == 4096


def test_one_source_needs_no_list(recipe: Path) -> None:
    assert load_recipe(str(recipe), ["ingest.sources=a.json"]).ingest.sources == ("a.json",)


def test_every_mistake_is_reported_at_once(recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(recipe), ["finetune.learnin_rate=1", "finetune.lora.r=0", "sample.rows=many", "sample.seed=-1"])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"recipe {recipe}: 4 problems:"
    assert "  finetune.lora.r: got 0; expected greater than or equal to 1" in lines
    assert "  sample.rows: got 'many'; expected a valid integer, unable to parse string as an integer" in lines
    assert any(
        line.startswith("  finetune.learnin_rate: unknown key; did you mean learning_rate? Allowed: backend, ") for line in lines
    )


def test_what_yaml_allows_and_a_number_is_not_is_refused_with_the_rest(recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(
            str(recipe), ["sample.rows=true", "finetune.weight_decay=.inf", "promote.margin=.nan", "finetune.max_steps=yes"]
        )
    assert str(caught.value).splitlines()[1:] == [
        "  sample.rows: got True; expected a number",
        "  finetune.max_steps: got True; expected a number",
        "  finetune.weight_decay: got inf; expected a finite number",
        "  promote.margin: got nan; expected a finite number",
    ]


def test_half_a_surrogate_pair_is_refused_wherever_a_text_may_stand(recipe: Path) -> None:
    half = '"\\ud800"'
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(recipe), [f"template.questions=[a, {half}]", f"description={half}"])
    said = str(caught.value)
    assert "description: got '\\ud800'; expected Unicode text, without half a surrogate pair" in said
    assert "template.questions: Unicode text, without half a surrogate pair" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sample: {rows: 5}\nfinetune:\n  seed: 1\n  seed: 2\n", r"not YAML: key seed stands twice\n.*line 4, column 3"),
        (f"sample: {'[' * 5000}{']' * 5000}", "not YAML: it is nested too deeply"),
    ],
)
def test_yaml_that_nobody_means_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_recipe(str(tmp_path / "mine.yaml"))
    with pytest.raises(ConfigError, match=r"(?s)--set sample=.*: value is not YAML: "):
        load_recipe("demo", [f"sample={text}"])


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        (
            "tracking.uri=https://ml:s3cret@mlflow.corp/",
            "tracking.uri: got 'https://ml:***@mlflow.corp/'; expected a URL without",
        ),
        ("ingest.sources=[https://bob:s3cret@host/trn.json]", "ingest.sources.0: got 'https://bob:***@host/trn.json'"),
    ],
)
def test_a_password_in_a_url_is_refused_and_not_shown(recipe: Path, override: str, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(recipe), [override])
    assert shown in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        (
            "default",
            ["devices=2"],
            "finetune.devices needs finetune.backend=fast or hf, for Unsloth trains on one GPU: set it to 1",
        ),
        (
            "demo",
            ["devices=2", "lora.dropout=0.1"],
            "finetune.devices needs finetune.lora.dropout=0: what is dropped would depend on their number",
        ),
        (
            "fast",
            ["devices=4", "gradient_accumulation=3"],
            "finetune.devices=4 exceeds the rows of a step, which batch_size times gradient_accumulation makes 3",
        ),
    ],
)
def test_several_devices_are_refused_where_they_cannot_train_what_one_does(name: str, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(name, [f"finetune.{override}" for override in overrides])
    assert said in str(caught.value)


def test_a_run_ends_only_with_a_stage_that_it_has() -> None:
    check_until("pack", load_recipe("fast", ["ingest.sources=a.json"]))
    with pytest.raises(ConfigError, match=r"until: no such stage in recipe demo: got pack; expected one of catalogue, fetch_"):
        check_until("pack", load_recipe("demo"))
    with pytest.raises(ConfigError, match="got catalogue; expected one of ingest"):
        check_until("catalogue", load_recipe("default", ["ingest.sources=a.json"]))
    with pytest.raises(ConfigError, match="got tokenise"):
        check_until("tokenise", load_recipe("demo"))


def test_a_run_may_end_with_each_stage_that_its_plan_names() -> None:
    demo = load_recipe("demo")
    for name in [step.name for step in plan_run(demo).steps]:
        check_until(name, demo)
        assert plan_run(demo, name).steps[-1].name == name


@pytest.mark.parametrize("verify", ["full", "size"])
def test_the_demo_is_planned_on_an_empty_root(verify: str, home: Path) -> None:
    steps = {step.name: step.state for step in plan_run(load_recipe("demo", [f"cache.verify={verify}"])).steps}
    assert (steps["catalogue"], steps["ingest"], steps["save"]) == ("run", "unknown", "unknown")
    assert not (home / "artifacts").exists()


def test_impossible_combinations_are_reported_at_once(recipe: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(recipe), ["catalogue.rows=100", "pack.tokens=512"])
    assert "exactly one of catalogue and ingest.sources must be given" in str(caught.value)
    assert "pack.tokens must be at least tokenize.max_tokens" in str(caught.value)


def test_checkpoints_fall_on_logged_steps(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"finetune: save_steps=25 is no multiple of logging_steps=10; make it one"):
        load_recipe(str(recipe), ["finetune.save_steps=25"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["finetune.eval_steps=25"], "finetune: eval_steps=25 is no multiple of logging_steps=10; make it one"),
        (["finetune.keep=best"], "finetune.early_stopping and finetune.keep=best need finetune.eval_steps"),
        (["finetune.early_stopping=2"], "finetune.early_stopping and finetune.keep=best need finetune.eval_steps"),
        (["finetune.eval_steps=10", "sample.eval_rows=0"], "finetune.eval_steps needs held-out rows"),
        (["finetune.eval_steps=10", "finetune.backend=fast"], "finetune.eval_steps needs finetune.backend=hf or unsloth"),
    ],
)
def test_a_look_at_held_out_rows_that_cannot_be_is_refused(recipe: Path, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(recipe), settings)


def test_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"recipe nope: not found; expected one of as-written, chat, default, demo, fast or a \.yaml file"
    ):
        load_recipe("nope")


@pytest.mark.parametrize(("override", "message"), [("finetune", "expected KEY=VALUE"), ("a=[", "value is not YAML")])
def test_malformed_override_is_refused(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(recipe), [override])


@pytest.mark.parametrize(("text", "message"), [("- a\n", "got list; expected a mapping"), ("a: [", "not YAML")])
def test_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(tmp_path / "bad.yaml"))


def test_the_pattern_of_overrides_takes_every_key_of_a_recipe_and_no_other() -> None:
    settings = load_recipe("demo").model_dump(mode="json")
    keys = [*settings, *flat(settings), *flat(load_recipe("default").model_dump(mode="json"))]
    assert "finetune.lora.r" in keys
    assert all(re.search(override_pattern(), f"{key}=x") for key in keys)
    for wrong in ("finetune", "finetun.seed=1", "finetune.lora.q=1", "finetune.seed.x=1", "x.name=1", "=1"):
        assert not re.search(override_pattern(), wrong)
