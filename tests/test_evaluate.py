"""Base and tuned model are asked the same held-out things, and what they answered is kept with the numbers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.backends.scoring import Answers, Prompt, Result
from tasks.config import EvaluateConfig, SharegptConfig, TemplateConfig, TokenizeConfig, WeightsConfig
from tasks.evaluate import choose_rows, evaluate, measure, render_prompt, side_by_side
from tasks.refs import Adapter, Artifact, Evaluation, InputError, Model, PipelineError, Split
from tasks.sharegpt import sharegpt
from tasks.store import publish
from tasks.template import template
from tasks.tokenize import tokenize
from tests.tiny import make_tiny_model, tiny_reference
from tests.train_tiny import train

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
    tokens: Artifact
    texts: Artifact
    template: Artifact

    def evaluate(self, config: EvaluateConfig = QUICK, **changes: Any) -> Evaluation:
        """Run the stage as its Prefect task would, without the engine."""
        inputs = vars(self) | {"config": config, "weights": FLOAT32, "device": "cpu"}
        return evaluate.execute(inputs | changes)


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
        return Inputs(model, adapter, tokens.evaluation, texts.evaluation, texts.template)


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
        total = sum(row[f"{name}_nll"] * row["tokens"] for row in metrics["per_row"])
        assert total / metrics["tokens"] == pytest.approx(metrics[name]["nll"], abs=1e-4)
        assert evaluation.summary[f"{name}_nll"] == metrics[name]["nll"]


def test_the_numbers_are_those_of_plain_transformers(made: Inputs) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    metrics, _ = read(made.evaluate())
    with pa.memory_map(str(made.tokens / "tokens.arrow")) as source:
        rows = pa.ipc.open_stream(source).read_all().to_pylist()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.model.path), str(made.adapter.data.path)).eval()
    for row, measured in zip(rows, metrics["per_row"], strict=True):
        with torch.inference_mode():
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        assert measured["tuned_nll"] == pytest.approx(float(loss), abs=1e-4)


def test_answers_of_both_models_are_stored_side_by_side(made: Inputs) -> None:
    _, generations = read(made.evaluate())
    assert len(generations) == 4
    for said in generations:
        assert said["reference"] == "steel and black"
        assert f"Título do produto: Kettle {said['uid'].removeprefix('u')}\n" in said["prompt"]
        assert said["base"] != said["tuned"]
        assert 0 <= said["tuned_ends_at_once"] <= 1
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
    with pa.memory_map(str(made.texts / "texts.arrow")) as texts, pa.memory_map(str(made.texts / "turns.arrow")) as turns:
        text = pa.ipc.open_stream(texts).read_all()["text"].to_pylist()
        turn = pa.ipc.open_stream(turns).read_all().to_pylist()
    parts = json.loads((made.template / "template.json").read_text())
    for row in range(7):
        assert text[row] == render_prompt(turn[row], parts) + turn[row]["answer"] + parts["after_answer"]


def test_without_held_out_rows_it_says_why_it_is_skipped(made: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    skipped = made.evaluate(tokens=made.tokens.model_copy(update={"rows": 0}))
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
    def full(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes.")

    monkeypatch.setattr("tasks.backends.scoring.row_nll", full)
    with pytest.raises(PipelineError) as caught:
        made.evaluate()
    for setting in ("evaluate.batch_size=1 (now 3)", "evaluate.max_new_tokens", "tokenize.max_tokens"):
        assert setting in str(caught.value)


@given(st.integers(0, 300), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_chosen_rows_are_distinct_ascending_and_there(rows: int, wanted: int, seed: int) -> None:
    chosen = choose_rows(rows, wanted, seed)
    assert len(chosen) == min(rows, wanted)
    assert chosen == sorted(set(chosen))
    assert all(0 <= row < rows for row in chosen)


scores = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 500), st.floats(0, 500)), min_size=1, max_size=20)


@given(scores)
def test_a_mean_weighs_rows_by_their_tokens(rows: list[tuple[int, float, float]]) -> None:
    tokens, base, tuned = ([row[column] for row in rows] for column in range(3))
    result = Result(base=Answers(nll=tuple(base)), tuned=Answers(nll=tuple(tuned)))
    metrics = measure([[f"u{row}"] for row in range(len(rows))], [int(count) for count in tokens], result)
    assert metrics["tokens"] == sum(tokens)
    assert metrics["base"]["nll"] == pytest.approx(sum(base) / sum(tokens), abs=1e-5)
    assert metrics["tuned"]["nll"] == pytest.approx(sum(tuned) / sum(tokens), abs=1e-5)


def test_side_by_side_keeps_what_was_asked_and_said() -> None:
    prompt = Prompt(uid="u1", text="What?", reference="A kettle")
    base, tuned = Answers(texts=("Who?",), ends_at_once=(0.5,)), Answers(texts=("A kettle",), ends_at_once=(0.1234567,))
    assert side_by_side([prompt], Result(base=base, tuned=tuned)) == [
        {
            "uid": "u1",
            "prompt": "What?",
            "reference": "A kettle",
            "base": "Who?",
            "tuned": "A kettle",
            "base_ends_at_once": 0.5,
            "tuned_ends_at_once": 0.12346,
        }
    ]
