"""What is saved is complete, loads with plain peft and transformers, and is named in one step."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flows.recipes import load_recipe
from tasks.baseline import baseline
from tasks.config import SaveConfig
from tasks.evaluate import evaluate
from tasks.finetune import finetune
from tasks.model import SMOLLM2
from tasks.reading.model_files import directory_model
from tasks.refs import (
    Adapter,
    Artifact,
    Evaluation,
    HeldOut,
    InputError,
    Lineage,
    Model,
    SavedModel,
    Special,
    StageRecord,
    Tokenizer,
)
from tasks.reporting.model_card import model_card, snippet
from tasks.save import publish_link, save, seeds
from tests.support.tiny import BOS, EOS
from tests.support.tuned import artifact_of

TEMPLATE = "{{ bos_token }}{% for message in messages %}### {{ message['content'] }}\n{% endfor %}"
TEXT = {"rouge1": 0.5, "rougeL": 0.25, "chrf": 31.5, "ends": 1.0}
BASE = {"nll": 3.5, "nll_low": 3.25, "nll_high": 3.75, "perplexity": 33.1, **TEXT}
METRICS = {"rows": 2, "base": BASE, "tuned": {**BASE, "nll": 0.25, "nll_low": 0.2, "nll_high": 0.3, "perplexity": 1.284}}


@pytest.fixture
def model(tuned: tuple[Path, Path]) -> Model:
    """The base model as an artifact of the root, as a fetched one is."""
    kept = artifact_of("model", {file.name: file.read_bytes() for file in tuned[0].iterdir()})
    return directory_model(kept.path, name="org/SmolLM2-tiny", artifact=kept)


@pytest.fixture
def saved(tuned: tuple[Path, Path], model: Model) -> SavedModel:
    return save_with(tuned[1], model, SaveConfig())


def save_with(adapter_path: Path, model: Model, config: SaveConfig, stray: str | None = None) -> SavedModel:
    """Save, with a stray file in the artifacts that are copied."""
    names = ("adapter_model.safetensors", "adapter_config.json")
    adapter = Adapter(
        data=artifact_of("adapter", {name: (adapter_path / name).read_bytes() for name in names}),
        log=artifact_of("training-log", {"train_log.jsonl": "", "resolved.json": '{"dtype": "bfloat16"}'}),
        steps=60,
    )
    evaluation = Evaluation(data=artifact_of("evaluation", {"metrics.json": json.dumps(METRICS), "generations.jsonl": "{}\n"}))
    template = artifact_of("template", {"template.json": json.dumps({"chat_template": TEMPLATE, "eos": EOS})})
    for file in (artifact / stray for artifact in (adapter.data, evaluation.data) if stray):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    recipe = load_recipe("demo").model_dump(mode="json")
    lineage = Lineage(
        name=recipe["name"], recipe=recipe, stages=(StageRecord(name="ingest", key="k" * 64, digest="d" * 64, rows=3),)
    )
    return save.fn(adapter, evaluation, template, model, model.tokenizer, model.name, config, lineage)


def test_another_tokenizer_file_saves_anew_and_trains_nothing_anew() -> None:
    model = {"path": "/m", "digest": "m", "name": "m"}
    keys: dict[str, list[str]] = {}
    for digest in "ab":
        tokenizer = Tokenizer(path="/t", digest=digest, special=Special(bos="<s>", eos="</s>"))
        rows = Artifact(kind="tokens", digest="t")
        held_out = HeldOut(tokens=rows, texts=rows, template=rows, tokenizer=tokenizer)
        inputs = {"model": Model(**model, tokenizer=tokenizer), "tokenizer": tokenizer, "held_out": held_out}
        for stage in (save, baseline, evaluate, finetune):
            given = {name: inputs.get(name) for name in signature(stage.fn).parameters} | {"config": load_recipe("demo").finetune}
            given |= {"held_out": rows} if stage is finetune else {}
            keys.setdefault(stage.name, []).append(stage.key(given))
    assert {name for name, (one, other) in keys.items() if one == other} == {"finetune"}


def test_a_model_is_saved_for_each_name_of_recipe_and_base_and_not_for_what_is_only_told() -> None:
    def key(base: str, **lineage: Any) -> str:
        given = dict.fromkeys(signature(save.fn).parameters)
        return save.key({**given, "base_name": base, "lineage": Lineage(**lineage)})

    assert len({key("a", name="demo"), key("b", name="demo"), key("a", name="mine")}) == 3
    assert key("a", name="demo") == key("a", name="demo", recipe={"name": "demo", "cache": {}})


def test_the_adapter_names_the_base_as_its_card_does(tuned: tuple[Path, Path], model: Model) -> None:
    saved = save_with(tuned[1], model.model_copy(update={"name": "moved"}), SaveConfig())
    assert json.loads((saved.data / "adapter_config.json").read_text())["base_model_name_or_path"] == "moved"
    assert "A LoRA adapter for `moved`" in (saved.data / "README.md").read_text()


def test_weights_that_are_not_the_hubs_own_do_not_bear_its_name(tuned: tuple[Path, Path], model: Model) -> None:
    saved = save_with(tuned[1], model.model_copy(update={"name": SMOLLM2}), SaveConfig())
    assert json.loads((saved.data / "adapter_config.json").read_text())["base_model_name_or_path"] == "smollm2-135m-instruct"
    card = (saved.data / "README.md").read_text()
    assert "A LoRA adapter for `smollm2-135m-instruct`" in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_everything_that_a_user_takes_away_is_there(saved: SavedModel) -> None:
    assert {file.name for file in saved.data.path.iterdir()} - {"manifest.json"} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generations.jsonl",
        "lineage.json",
        "metrics.json",
        "recipe.yaml",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("stray", ["adapter_model.bin", "runs/events"])
def test_what_strays_into_an_artifact_is_not_published_with_it(
    tuned: tuple[Path, Path], model: Model, saved: SavedModel, stray: str
) -> None:
    assert save_with(tuned[1], model, SaveConfig(), stray) == saved


def test_the_same_inputs_give_the_same_bytes(tuned: tuple[Path, Path], model: Model, saved: SavedModel) -> None:
    assert save_with(tuned[1], model, SaveConfig()) == saved


def test_the_saved_recipe_is_the_full_one_and_loads(saved: SavedModel) -> None:
    recipe = load_recipe(str(saved.data / "recipe.yaml"))
    assert recipe == load_recipe("demo")


def test_lineage_tells_stages_versions_seeds_and_what_was_resolved(saved: SavedModel, model: Model) -> None:
    lineage = json.loads((saved.data / "lineage.json").read_text())
    assert lineage["stages"] == [{"name": "ingest", "key": "k" * 64, "digest": "d" * 64, "rows": 3}]
    assert lineage["base_model"]["digest"] == model.digest
    assert lineage["seeds"]["finetune.lora.random_state"] == 3407
    assert {"python", "torch", "transformers", "peft", "trl"} <= lineage["versions"].keys()
    assert lineage["training"] == {"dtype": "bfloat16"}


def test_the_card_tells_the_hub_and_the_reader(saved: SavedModel) -> None:
    _, front, body = (saved.data / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "org/SmolLM2-tiny",
        "datasets": ["generated-catalogue"],
        "language": ["pt", "en"],
        "library_name": "peft",
        "license": "apache-2.0",
        "metrics": ["perplexity", "rouge", "chrf"],
        "model-index": [
            {
                "name": "unsloth_model_optimized",
                "results": [
                    {
                        "task": {"type": "text-generation", "name": "Text Generation"},
                        "dataset": {"type": "generated-catalogue", "name": "generated-catalogue", "split": "held-out"},
                        "metrics": [
                            {"type": "perplexity", "name": "perplexity", "value": 1.284},
                            {"type": "rouge", "name": "ROUGE-1", "value": 0.5},
                            {"type": "rouge", "name": "ROUGE-L", "value": 0.25},
                            {"type": "chrf", "name": "chrF", "value": 31.5},
                        ],
                    }
                ],
            }
        ],
        "pipeline_tag": "text-generation",
        "tags": ["amazon-ft", "lora", "sft", "product-descriptions"],
    }
    assert "| nats per token | 3.5 (3.25 to 3.75) | 0.25 (0.2 to 0.3) |" in body
    assert "| answers that end, share | 1 | 1 |" in body


def test_the_hubs_own_library_reads_the_numbers(saved: SavedModel) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard((saved.data / "README.md").read_text()).data
    assert data.model_name == "unsloth_model_optimized"
    assert [(result.metric_name, result.metric_value) for result in data.eval_results or []] == [
        ("perplexity", 1.284),
        ("ROUGE-1", 0.5),
        ("ROUGE-L", 0.25),
        ("chrF", 31.5),
    ]


def test_a_ruined_models_card_tells_the_reader_and_not_the_hub(model: Model) -> None:
    ruined = METRICS | {"tuned": dict.fromkeys(BASE, float("nan"))}
    _, front, body = model_card("mine", model, {"name": "default"}, ruined).split("---\n", 2)
    assert "model-index" not in yaml.safe_load(front)
    assert "| nats per token | 3.5 (3.25 to 3.75) | nan (nan to nan) |" in body


def test_it_loads_with_plain_peft_and_transformers_and_answers_as_the_adapter_does(
    saved: SavedModel, tuned: tuple[Path, Path]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(saved.data.path)
    chat = [{"role": "user", "content": "Chaleira"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == f"{BOS}### Chaleira\n"
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
    assert ids[0].tolist().count(tokenizer.bos_token_id) == 1
    with torch.no_grad():
        logits, trained, plain = (
            load(AutoModelForCausalLM.from_pretrained(tuned[0]))(ids).logits
            for load in (
                lambda base: PeftModel.from_pretrained(base, saved.data.path),
                lambda base: PeftModel.from_pretrained(base, tuned[1]),
                lambda base: base,
            )
        )
    assert torch.equal(logits, trained)
    assert not torch.equal(logits, plain)


def test_the_cards_snippet_runs_where_the_model_lies(saved: SavedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(publish_link(saved, "demo"))
    code = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue()


def test_a_hub_model_is_named_with_its_commit(model: Model) -> None:
    hub = model.model_copy(update={"digest": f"hub:org/tiny@{'a' * 40}", "name": "org/tiny", "artifact": None})
    assert f"""from_pretrained(base, revision="{"a" * 40}", dtype="auto")""" in snippet(hub, "x")
    assert "base = 'org/tiny'" in snippet(hub, "x")


def test_an_old_tokenizers_own_template_does_not_stay_beside_ours(tuned: tuple[Path, Path], model: Model) -> None:
    config = Path(model.tokenizer.path) / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "theirs"}))
    saved = save_with(tuned[1], model, SaveConfig())
    assert "chat_template" not in json.loads((saved.data / "tokenizer_config.json").read_text())
    assert (saved.data / "chat_template.jinja").read_text() == TEMPLATE


def test_without_held_out_rows_the_card_says_so(model: Model) -> None:
    card = model_card("mine", model, {"name": "default"}, {"rows": 0, "skipped": "no held-out rows"})
    assert "Nothing was held out, so there is no number to judge it by." in card
    assert yaml.safe_load(card.split("---\n")[1])["datasets"] == ["AmazonTitles-1.3MM"]


def test_the_link_is_relative_and_follows_the_newest(saved: SavedModel, home: Path) -> None:
    link = publish_link(saved, "demo")
    newer = SavedModel(data=artifact_of("saved-model", {"README.md": "newer"}), name=saved.name)
    assert publish_link(newer, "demo") == link == home / "models" / "demo" / "unsloth_model_optimized"
    assert not link.readlink().is_absolute()
    assert link.resolve() == newer.data.path.resolve()
    assert [item.name for item in link.parent.iterdir()] == [link.name]


def test_a_directory_in_the_links_place_is_kept_and_named(saved: SavedModel, home: Path) -> None:
    mine = home / "models" / "demo" / saved.name
    mine.mkdir(parents=True)
    with pytest.raises(InputError) as caught:
        publish_link(saved, "demo")
    assert str(caught.value) == (f"{mine}: not a link: got a file or directory; expected a link to a saved model. Move it away.")


@given(st.dictionaries(st.sampled_from(["seed", "eval_seed", "random_state", "rows"]), st.integers(), max_size=4))
def test_every_seed_is_found_at_any_depth(section: dict[str, int]) -> None:
    wanted = {name: value for name, value in section.items() if name != "rows"}
    assert seeds({"a": {"b": section}}) == {f"a.b.{name}": value for name, value in sorted(wanted.items())}
