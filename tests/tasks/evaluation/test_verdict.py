"""Only what is better for certain is promoted: never a random, an empty or a ruined adapter, never a copy of what is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from flows.recipes import load_recipe
from flows.running.promotion import promote
from tasks.baseline import baseline
from tasks.caching.context import open_run
from tasks.caching.store import publish
from tasks.config import EvaluateConfig, PromoteConfig, WeightsConfig
from tasks.evaluate import evaluate
from tasks.evaluation.metrics import likelihood
from tasks.evaluation.verdict import Candidate, Verdict, judge
from tasks.refs import Adapter, Artifact, Baseline, HeldOut, InputError, Model, SavedModel
from tests.support.tiny import EOS, make_tiny_model, publish_rows, tiny_reference, tiny_row
from tests.support.train_tiny import train

BASE = [3.0, 3.2, 2.9, 3.1, 3.0, 3.3]


def candidate(tuned: list[float], name: str = "saved-model/new", *, base: list[float] = BASE, **changes: Any) -> Candidate:
    """A model that lost so much on each of six rows of 20 tokens."""
    tokens = [20] * len(base)
    rows = [
        {"uids": [f"u{row}"], "tokens": 20, "base_nll": one, "tuned_nll": other}
        for row, (one, other) in enumerate(zip(base, tuned, strict=True))
    ]
    metrics = {"rows": len(base), "tokens": sum(tokens), **likelihood(tokens, base, tuned), "per_row": rows}
    fields: dict[str, Any] = {"name": name, "adapter": name, "tokenizer": "t", "metrics": metrics}
    return Candidate(**fields | changes)


def shifted(by: float, rows: int = 6) -> list[float]:
    return [value + by for value in BASE[:rows]]


OLD = candidate(shifted(-1.0), "saved-model/old")


def test_a_better_model_is_promoted_and_the_reason_has_the_numbers() -> None:
    assert judge(candidate(shifted(-1.5)), None, PromoteConfig()) == Verdict(
        promoted=True,
        reasons=("better than the base model: -1.5000 nats per token (95 % interval -1.5000 to -1.5000)",),
        against=("base",),
    )


def test_a_gain_that_is_not_certain_is_none() -> None:
    verdict = judge(candidate([2.0, 4.1, 2.2, 3.9, 2.1, 3.6]), None, PromoteConfig())
    assert not verdict.promoted
    assert verdict.reasons[0].startswith("not better than the base model for certain: -0.1000 nats per token (95 % interval -0.")
    assert verdict.reasons[0].endswith("expected the interval below zero")


def test_a_gain_below_the_margin_is_too_small() -> None:
    verdict = judge(candidate(shifted(-0.05)), None, PromoteConfig(margin=0.1))
    assert verdict.reasons == (
        "better than the base model by less than the margin: -0.0500 nats per token (95 % interval -0.0500 to -0.0500); "
        "expected -0.1 or less",
    )
    assert judge(candidate(shifted(-0.05)), None, PromoteConfig(margin=0)).promoted


def test_it_must_beat_the_model_promoted_before_too() -> None:
    worse, little, better = (judge(candidate(shifted(by)), OLD, PromoteConfig()) for by in (-0.9, -1.02, -1.2))
    assert (worse.promoted, little.promoted, better.promoted) == (False, False, True)
    assert worse.against == little.against == better.against == ("base", "saved-model/old")
    assert worse.reasons == (
        "not better than saved-model/old (promoted before) for certain: +0.1000 nats per token (95 % interval +0.1000 to "
        "+0.1000); expected the interval below zero",
    )
    assert little.reasons == (
        "better than saved-model/old (promoted before) by less than the margin: -0.0200 nats per token (95 % interval -0.0200 "
        "to -0.0200); expected -0.05 or less",
    )
    assert better.reasons[1] == (
        "better than saved-model/old (promoted before): -0.2000 nats per token (95 % interval -0.2000 to -0.2000)"
    )


@pytest.mark.parametrize("change", ["tokenizer", "rows", "tokens"])
def test_what_was_scored_on_other_rows_is_not_compared_and_that_is_said(change: str) -> None:
    old = candidate(shifted(-2.0), "saved-model/old", tokenizer="other" if change == "tokenizer" else "t")
    if change != "tokenizer":
        old.metrics["per_row"][0][{"rows": "uids", "tokens": "tokens"}[change]] = ["else"] if change == "rows" else 19
    verdict = judge(candidate(shifted(-1.0)), old, PromoteConfig())
    assert verdict.promoted
    assert verdict.against == ("base",)
    assert verdict.reasons[1] == (
        "saved-model/old, promoted before, was not scored on the same rows and tokens: judged by the base model alone"
    )


def test_the_order_of_rows_makes_no_difference() -> None:
    new = candidate(shifted(-1.2))
    turned = candidate(shifted(-1.2))
    turned.metrics["per_row"].reverse()
    assert judge(new, OLD, PromoteConfig()) == judge(turned, OLD, PromoteConfig())


def test_repeated_uids_are_rows_of_their_own() -> None:
    def with_one_uid(model: Candidate) -> Candidate:
        rows = [row | {"uids": ["same"]} for row in model.metrics["per_row"]]
        return replace(model, metrics={**model.metrics, "per_row": rows})

    verdict = judge(with_one_uid(candidate(shifted(-1.5))), with_one_uid(OLD), PromoteConfig())
    assert verdict.promoted
    assert verdict.against == ("base", "saved-model/old")


def test_the_same_adapter_again_stays_promoted() -> None:
    verdict = judge(OLD, OLD, PromoteConfig())
    assert verdict.promoted
    assert verdict.reasons[1] == "the adapter is that of saved-model/old, promoted before"


def test_too_few_rows_prove_nothing() -> None:
    verdict = judge(candidate(shifted(-2.0, 4), base=BASE[:4]), None, PromoteConfig())
    assert verdict.reasons == ("too few held-out rows: got 4; expected at least 5. Raise sample.eval_rows",)


def test_without_an_evaluation_nothing_is_promoted() -> None:
    nothing = Candidate("saved-model/new", "a", "t", {"rows": 0, "skipped": "no held-out rows"})
    assert judge(nothing, None, PromoteConfig()).reasons == ("nothing was measured: no held-out rows",)


def test_switched_off_it_judges_and_promotes_nothing() -> None:
    assert judge(candidate(shifted(-1.0)), None, PromoteConfig(enabled=False)).reasons == ("promote.enabled is false",)


@given(
    st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)), min_size=5, max_size=12),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.integers(0, 11),
)
def test_any_number_that_is_none_forbids_it(drawn: list[tuple[float, float]], broken: float, at: int) -> None:
    tuned = [row[1] for row in drawn]
    tuned[at % len(tuned)] = broken
    verdict = judge(candidate(tuned, base=[row[0] for row in drawn]), None, PromoteConfig())
    assert not verdict.promoted
    assert "expected a number; the adapter is ruined" in verdict.reasons[0]


# With real models


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verdict")


@pytest.fixture(autouse=True)
def home(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One root for the module, but for the names of saved models."""
    monkeypatch.setenv("AMAZON_FT_HOME", str(root / "home"))
    shutil.rmtree(root / "home" / "models", ignore_errors=True)
    return root / "home"


def rows_of(numbers: range, said: range) -> Artifact:
    """Rows that each say the same of another number."""
    return publish_rows("tokens", [tiny_row(f"u{row}", [row, 9, 8, *said]) for row in numbers])


KNOWN, WHOLE = range(50, 58), range(50, 62)
"""What the base model says already, and what there is to learn: of a base that knows nothing, chance can only make more."""


@pytest.fixture(scope="module")
def model(root: Path) -> Model:
    """A base model with something to lose: it was trained, and its adapter merged into it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = make_tiny_model(root / "plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMAZON_FT_HOME", str(root / "home"))
        learnt = train(tiny_reference(plain), rows_of(range(100, 124), KNOWN), learning_rate=0.02, max_steps=24)
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(plain), str(learnt.data.path)).merge_and_unload()
    merged.save_pretrained(make_tiny_model(root / "base"))
    return tiny_reference(root / "base")


@pytest.fixture(scope="module")
def good(root: Path, model: Model) -> Adapter:
    """An adapter that learnt the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMAZON_FT_HOME", str(root / "home"))
        return train(model, rows_of(range(100, 124), WHOLE), learning_rate=0.02, max_steps=8)


@pytest.fixture(scope="module")
def saved_with(root: Path, model: Model, good: Adapter) -> Callable[[Callable[[str, Any], Any]], SavedModel]:
    """What a run would save of the good adapter with its weights changed."""
    asked: dict[str, Any] = {"model": model, "config": EvaluateConfig(generations=0), "device": "cpu"}
    asked["weights"] = WeightsConfig(load_in_4bit=False, dtype="float32")
    made: list[Baseline] = []

    def make(change: Callable[[str, Any], Any]) -> SavedModel:
        weights = {name: change(name, tensor) for name, tensor in load_file(good.data / "adapter_model.safetensors").items()}
        with publish("adapter") as draft:
            save_file(weights, draft / "adapter_model.safetensors", metadata={"format": "pt"})
            shutil.copyfile(good.data / "adapter_config.json", draft / "adapter_config.json")
        tokens = rows_of(range(200, 212), WHOLE)
        inputs = asked | {"held_out": HeldOut(tokens=tokens, texts=turns(), template=template(), tokenizer=model.tokenizer)}
        if not made:
            made.append(baseline.execute(inputs))
        adapter = good.model_copy(update={"data": draft.artifact})
        evaluation = evaluate.execute(inputs | {"adapter": adapter, "baseline": made[0], "merged_prompt": "{title}"})
        lineage = {"adapter": adapter.data.digest, "base_model": {"tokenizer": model.tokenizer.digest}}
        with publish("saved-model") as saved:
            shutil.copyfile(evaluation.data / "metrics.json", saved / "metrics.json")
            (saved / "lineage.json").write_text(json.dumps(lineage))
        return SavedModel(data=saved.artifact, name="mine")

    return make


def turns() -> Artifact:
    row: dict[str, list[object]] = {name: [] for name in ("uid", "prompt", "question", "answer")}
    import pyarrow as pa

    schema = pa.schema({name: pa.string() for name in row})
    with publish("texts") as draft:
        with pa.OSFile(str(draft / "turns.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            writer.write_table(pa.table(row, schema))
    return draft.artifact


def template() -> Artifact:
    with publish("template") as draft:
        (draft / "template.json").write_text(json.dumps({"eos": EOS}))
    return draft.artifact


def link_of(home: Path) -> Path:
    return home / "models" / "demo" / "promoted"


def same(_name: str, tensor: Any) -> Any:
    return tensor


def test_what_learnt_is_promoted_in_one_step_and_the_run_tells(saved_with: Any, home: Path) -> None:
    saved = saved_with(same)
    with open_run("demo", {}) as run:
        verdict = promote(saved, load_recipe("demo"))
    assert verdict.promoted, verdict
    assert link_of(home).resolve() == saved.data.path.resolve()
    assert json.loads(run.file.read_text())["verdict"] == verdict.model_dump(mode="json")
    assert promote(saved, load_recipe("demo")).promoted


def nothing(_name: str, tensor: Any) -> Any:
    return np.zeros_like(tensor)


def ruined(name: str, tensor: Any) -> Any:
    return np.full_like(tensor, np.nan) if "layers.0.self_attn.q_proj.lora_A" in name else tensor


def infinite(name: str, tensor: Any) -> Any:
    return np.full_like(tensor, np.inf) if "layers.1.mlp.down_proj.lora_B" in name else tensor


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (nothing, "the adapter changes nothing: base and tuned model lose the same on every row"),
        (ruined, "tuned.nll is nan: expected a number; the adapter is ruined"),
        (infinite, "tuned.nll is nan: expected a number; the adapter is ruined"),
    ],
)
def test_an_empty_and_a_ruined_adapter_are_kept_unpromoted(
    saved_with: Any, home: Path, change: Callable[[str, Any], Any], reason: str
) -> None:
    verdict = promote(saved_with(change), load_recipe("demo"))
    assert verdict == Verdict(promoted=False, reasons=(reason,))
    assert not link_of(home).is_symlink()


@pytest.mark.parametrize("scale", [0.02, 0.05, 0.1, 0.2, 0.5])
def test_a_random_adapter_is_never_promoted(saved_with: Any, home: Path, scale: float) -> None:
    draw = np.random.default_rng(7)
    verdict = promote(
        saved_with(lambda _, tensor: (draw.standard_normal(tensor.shape) * scale).astype(tensor.dtype)), load_recipe("demo")
    )
    assert not verdict.promoted, verdict
    assert not link_of(home).is_symlink()


def test_a_worse_run_leaves_the_promoted_model_where_it_is(saved_with: Any, home: Path) -> None:
    best = saved_with(same)
    promote(best, load_recipe("demo"))
    half = saved_with(lambda name, tensor: tensor * np.float32(0.5 if "lora_B" in name else 1))
    verdict = promote(half, load_recipe("demo"))
    assert not verdict.promoted
    assert verdict.against == ("base", f"saved-model/{best.data.digest[:8]}")
    assert link_of(home).resolve() == best.data.path.resolve()


def test_a_promoted_model_that_is_gone_is_no_rival(saved_with: Any, home: Path) -> None:
    link_of(home).parent.mkdir(parents=True)
    link_of(home).symlink_to("../../artifacts/saved-model/gone")
    assert promote(saved_with(same), load_recipe("demo")).against == ("base",)


def test_a_directory_of_the_users_in_the_links_place_is_left_alone(saved_with: Any, home: Path) -> None:
    link_of(home).mkdir(parents=True)
    with pytest.raises(InputError, match=r"promoted: not a link: got a file or directory; expected a link"):
        promote(saved_with(same), load_recipe("demo"))


def test_a_saved_model_can_t_take_the_promoted_ones_name() -> None:
    with pytest.raises(Exception, match=r"save\.name: got 'promoted'; expected another name: the verdict sets that one"):
        load_recipe("demo", ["save.name=promoted"])
