"""Base and tuned model are asked the same held-out things, and what they answered is kept with the numbers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.baseline import baseline
from tasks.caching.store import publish
from tasks.config import EvaluateConfig, SharegptConfig, TemplateConfig, TokenizeConfig, WeightsConfig
from tasks.evaluate import evaluate, side_by_side, title_of
from tasks.evaluation.answers import Prompt, Said, choose_rows, per_token, render_prompt
from tasks.refs import Adapter, Artifact, Baseline, Evaluation, HeldOut, InputError, Model, PipelineError, Split
from tasks.sharegpt import sharegpt
from tasks.tables.arrow import read_table
from tasks.template import template
from tasks.tokenize import tokenize
from tasks.training.inference.scoring import Answers
from tests.support.tiny import make_tiny_model, publish_rows, tiny_reference, tiny_row
from tests.support.train_tiny import train

pytestmark = pytest.mark.heavy

QUICK = EvaluateConfig(generations=4, max_new_tokens=6, batch_size=3)
FLOAT32 = WeightsConfig(load_in_4bit=False, dtype="float32")


def products(count: int, start: int = 0) -> Artifact:
    """Products that each say the same of another kettle."""
    rows = range(start, start + count)
    columns = {
        "uid": [f"u{row}" for row in rows],
        "title": [f"Kettle {row}" for row in rows],
        "content": ["steel and black"] * count,
    }
    with publish("products") as draft:
        table = pa.table(columns)
        with pa.OSFile(str(draft / "products.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
        draft.rows = count
    return draft.artifact


@dataclass(frozen=True)
class Inputs:
    """What the evaluate stage gets, made by the real stages and a real training."""

    model: Model
    adapter: Adapter
    held_out: HeldOut

    def evaluate(self, config: EvaluateConfig = QUICK, **changes: Any) -> Evaluation:
        """Run both stages as their Prefect tasks would, without the engine."""
        inputs = vars(self) | {"config": config, "weights": FLOAT32, "device": "cpu"} | changes
        asked = {name: inputs[name] for name in ("model", "held_out", "config", "weights", "device")}
        base = baseline_of(baseline.key(asked), asked)
        return evaluate.execute(inputs | {"baseline": base, "merged_prompt": "Título do produto: {title}"})


_baselines: dict[str, Baseline] = {}


def baseline_of(key: str, asked: dict[str, Any]) -> Baseline:
    """The base model's answers, asked for once."""
    if key not in _baselines:
        _baselines[key] = baseline.execute(asked)
    return _baselines[key]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def made(root: Path) -> Inputs:
    """A tiny model that learnt what every kettle is made of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMAZON_FT_HOME", str(root / "home"))
        model = tiny_reference(make_tiny_model(root / "tiny"))
        conversations = sharegpt.fn(
            Split(train=products(40), evaluation=products(7, 40)), SharegptConfig(conversation_extension=1)
        )
        texts = template.fn(conversations, model.tokenizer.special, TemplateConfig())
        tokens = tokenize.fn(texts, model.tokenizer, TokenizeConfig(max_tokens=256))
        adapter = train(model, tokens.train, learning_rate=0.02, max_steps=16)
        held_out = HeldOut(tokens=tokens.evaluation, texts=texts.evaluation, template=texts.template, tokenizer=model.tokenizer)
        return Inputs(model, adapter, held_out)


@pytest.fixture(autouse=True)
def home(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One root for the module: its stages only add to it."""
    monkeypatch.setenv("AMAZON_FT_HOME", str(root / "home"))
    return root / "home"


def read(evaluation: Evaluation) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    metrics = json.loads((evaluation.data / "metrics.json").read_text())
    return metrics, [json.loads(line) for line in (evaluation.data / "generations.jsonl").read_text().splitlines()]


def test_the_tuned_model_is_set_beside_the_base_on_every_held_out_row(made: Inputs) -> None:
    evaluation = made.evaluate()
    metrics, _ = read(evaluation)
    assert metrics["rows"] == evaluation.data.rows == len(metrics["per_row"]) == 7
    assert [row["uids"] for row in metrics["per_row"]] == [[f"u{row}"] for row in range(40, 47)]
    assert metrics["tuned"]["nll"] < metrics["base"]["nll"] - 1
    for name in ("base", "tuned"):
        assert metrics[name]["perplexity"] == pytest.approx(math.exp(metrics[name]["nll"]), rel=1e-4)
        assert metrics[name]["nll_low"] <= metrics[name]["nll"] <= metrics[name]["nll_high"]
        total = sum(row[f"{name}_nll"] * row["tokens"] for row in metrics["per_row"])
        assert total / metrics["tokens"] == pytest.approx(metrics[name]["nll"], abs=1e-4)
        assert evaluation.summary[f"{name}_nll"] == metrics[name]["nll"]


def test_the_loss_is_that_of_an_independent_computation(made: Inputs) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    metrics, _ = read(made.evaluate())
    with pa.memory_map(str(made.held_out.tokens / "tokens.arrow")) as source:
        rows = pa.ipc.open_stream(source).read_all().to_pylist()
    base = AutoModelForCausalLM.from_pretrained(made.model.path).eval()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.model.path), str(made.adapter.data.path)).eval()
    for name, model in (("base", base), ("tuned", tuned)):
        lost: list[float] = []
        for row, measured in zip(rows, metrics["per_row"], strict=True):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
            with torch.inference_mode():
                likely = model(input_ids=ids).logits[0, :-1].double().log_softmax(dim=-1)
            own = [-float(likely[at, label]) for at, label in enumerate(labels.tolist()) if label != -100]
            assert measured[f"{name}_nll"] == pytest.approx(sum(own) / len(own), abs=1e-5)
            lost += own
        assert metrics[name]["nll"] == pytest.approx(sum(lost) / len(lost), abs=1e-5)


def test_the_base_model_is_asked_once_for_any_adapter(made: Inputs) -> None:
    assert "adapter" not in signature(baseline.fn).parameters
    _, generations = read(made.evaluate())
    _, again = read(made.evaluate(adapter=train(made.model, publish_rows("tokens", [tiny_row("u0", [7] * 20)] * 8))))
    assert [said["base"] for said in generations] == [said["base"] for said in again]
    assert [said["tuned"] for said in generations] != [said["tuned"] for said in again]


def test_answers_of_both_models_are_stored_side_by_side(made: Inputs) -> None:
    _, generations = read(made.evaluate())
    assert len(generations) == 4
    for said in generations:
        assert said["reference"] == "steel and black"
        assert f"Título do produto: Kettle {said['uid'].removeprefix('u')}\n" in said["prompt"]
        assert said["base"] != said["tuned"]
        assert 0 <= said["tuned_ends_at_once"] <= 1
        assert said["tuned_ended"] in (True, False)
    assert any("steel" in said["tuned"] for said in generations)


def test_the_same_rows_are_asked_for_the_same_seed_and_others_for_another(made: Inputs) -> None:
    first, again, other = (
        [said["uid"] for said in read(made.evaluate(QUICK.model_copy(update=change)))[1]]
        for change in ({}, {"max_new_tokens": 1}, {"seed": 1})
    )
    assert first == again == sorted(first)
    assert first != other


def test_the_batch_size_changes_no_number(made: Inputs) -> None:
    one, three = (made.evaluate(QUICK.model_copy(update={"batch_size": size})) for size in (1, 3))
    assert read(one)[0]["tuned"] == pytest.approx(read(three)[0]["tuned"], abs=2e-5)
    assert [said["tuned"] for said in read(one)[1]] == [said["tuned"] for said in read(three)[1]]


def test_a_prompt_is_the_beginning_of_the_text_that_was_trained_on(made: Inputs) -> None:
    text = read_table(made.held_out.texts / "texts.arrow")["text"].to_pylist()
    turn = read_table(made.held_out.texts / "turns.arrow").to_pylist()
    parts = json.loads((made.held_out.template / "template.json").read_text())
    for row in range(7):
        assert text[row] == render_prompt(turn[row], parts) + turn[row]["answer"] + parts["after_answer"]


def test_without_held_out_rows_it_says_why_it_is_skipped(made: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    none = made.held_out.tokens.model_copy(update={"rows": 0})
    skipped = made.evaluate(held_out=made.held_out.model_copy(update={"tokens": none}))
    assert caplog.messages == ["evaluate is skipped: no held-out rows: sample.eval_rows is 0, or tokenize dropped them all."]
    assert read(skipped)[0]["rows"] == skipped.data.rows == 0


def test_an_adapter_of_another_model_is_refused(made: Inputs, root: Path) -> None:
    wider = tiny_reference(make_tiny_model(root / "wider", hidden=64))
    with pytest.raises(InputError) as caught:
        made.evaluate(model=wider)
    assert str(caught.value) == (
        "evaluate: the adapter does not fit the base model org/tiny: got 2 layers of width 32; expected 2 of width 64. "
        "Use the model that it was trained on."
    )


def test_an_adapter_with_more_layers_than_the_model_is_refused(made: Inputs, root: Path) -> None:
    shallower = tiny_reference(make_tiny_model(root / "shallower", layers=1))
    with pytest.raises(InputError, match="got 2 layers of width 32; expected 1 of width 32"):
        made.evaluate(model=shallower)


def test_a_full_memory_names_three_settings(made: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes.")

    monkeypatch.setattr("tasks.training.inference.scoring.row_nll", full)
    with pytest.raises(PipelineError) as caught:
        made.evaluate()
    for setting in ("evaluate.batch_size=1 (now 3)", "evaluate.max_new_tokens", "tokenize.max_tokens"):
        assert setting in str(caught.value)


def test_an_answer_has_ended_if_eos_came_before_its_length_ran_out(made: Inputs) -> None:
    metrics, generations = read(made.evaluate(QUICK.model_copy(update={"max_new_tokens": 40})))
    assert [said["tuned"] for said in generations] == ["steel and black"] * 4
    assert all(said["tuned_ended"] for said in generations)
    assert metrics["tuned"]["ends"] == 1
    assert (metrics["tuned"]["rougeL"], metrics["tuned"]["length_ratio"]) == (1, 1)
    short, cut = read(made.evaluate(QUICK.model_copy(update={"max_new_tokens": 1})))
    assert not any(said["tuned_ended"] for said in cut)
    assert short["tuned"]["ends"] == 0


def test_a_ruined_adapter_is_measured_all_the_same(made: Inputs) -> None:
    from safetensors.numpy import load_file, save_file

    with publish("adapter") as draft:
        weights = load_file(made.adapter.data / "adapter_model.safetensors")
        ruined = {name: tensor * float("nan") for name, tensor in weights.items()}
        save_file(ruined, draft / "adapter_model.safetensors", metadata={"format": "pt"})
        (draft / "adapter_config.json").write_bytes((made.adapter.data / "adapter_config.json").read_bytes())
    metrics, generations = read(made.evaluate(adapter=made.adapter.model_copy(update={"data": draft.artifact})))
    assert math.isnan(metrics["tuned"]["perplexity_high"])
    assert math.isnan(generations[0]["tuned_ends_at_once"])
    assert metrics["base"]["perplexity_high"] > 0


@given(st.integers(0, 300), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_chosen_rows_are_distinct_ascending_and_there(rows: int, wanted: int, seed: int) -> None:
    chosen = choose_rows(rows, wanted, seed)
    assert len(chosen) == min(rows, wanted)
    assert chosen == sorted(set(chosen))
    assert all(0 <= row < rows for row in chosen)


def test_sums_become_means_per_labelled_token() -> None:
    assert per_token(Answers(nll=(3.0, 0.0)), [2, 0]).nll == (1.5, 0.0)


def test_side_by_side_keeps_what_was_asked_and_said() -> None:
    prompt = Prompt(uid="u1", asked="Kettle", text="What?", reference="A kettle")
    base = Said(nll=(), texts=("Who?",), ended=(False,), ends_at_once=(0.5,))
    tuned = Said(nll=(), texts=("A kettle",), ended=(True,), ends_at_once=(0.12346,))
    assert side_by_side([prompt], base, tuned) == [
        {
            "uid": "u1",
            "prompt": "What?",
            "reference": "A kettle",
            "base": "Who?",
            "tuned": "A kettle",
            "base_ended": False,
            "tuned_ended": True,
            "base_ends_at_once": 0.5,
            "tuned_ends_at_once": 0.12346,
        }
    ]


@pytest.mark.parametrize(
    ("merged_prompt", "title"),
    [
        ("Produto: {title}!", "Red Kettle"),
        ("Produto: {title}[[, {content}]]", "Produto: Red Kettle!"),
        ("{content}", "Produto: Red Kettle!"),
    ],
)
def test_the_title_is_found_where_the_prompt_is_plain(merged_prompt: str, title: str) -> None:
    assert title_of("Produto: Red Kettle!", merged_prompt) == title


def test_what_a_ruined_model_says_can_be_written_and_read() -> None:
    ruined = Said(nll=(float("nan"), float("inf")), texts=(), ended=(), ends_at_once=())
    assert repr(Said.model_validate_json(ruined.model_dump_json())) == repr(ruined)
