"""Random models of published shapes: as large as those published, and measured one after the other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.bench import train
from flows.bench.shapes import SHAPES, PublishedShape, empty_model, fit_packs, make_shape
from flows.bench.train import bench_config
from flows.bench.train_ours import time_training
from flows.choices import Shape
from flows.cli.bench import app
from tasks.reading.model_files import directory_tokenizer
from tasks.refs import Model
from tasks.tables.arrow import read_table
from tests.support.tiny import make_tiny_model, tiny_tokens

pytestmark = pytest.mark.heavy

PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b-v0.3": 7_248_023_552,
    "llama-3.2-1b": 1_235_814_400,
    "gemma-2-9b": 9_241_705_984,
}
"""Parameters. Source: the hub's page of each model, from its safetensors."""
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
VOCABULARY = 200


def scaled_down(shape: PublishedShape) -> PublishedShape:
    small = SMALL | {"vocab_size": VOCABULARY, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1}
    small |= {"layer_types": shape.settings["layer_types"][:2]} if "layer_types" in shape.settings else {}
    return replace(shape, settings=shape.settings | small)


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shape in SHAPES.items():
        monkeypatch.setitem(SHAPES, name, scaled_down(shape))


def test_the_commands_shapes_are_those_of_the_table() -> None:
    assert {name.value for name in Shape} == set(SHAPES) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_as_many_parameters_as_its_model(name: str) -> None:
    assert empty_model(name).num_parameters() == PUBLISHED[name]


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("name", ["gemma-2-9b", "qwen2.5-7b"])
def test_a_made_model_is_loaded_whole_and_in_bfloat16(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = directory_tokenizer(make_tiny_model(tmp_path / "tiny"))
    made = make_shape(name, tmp_path / "made", tokenizer, "cpu")
    model, told = AutoModelForCausalLM.from_pretrained(made.path, output_loading_info=True)
    assert not any(told.values())
    matrices = [weights.detach().float() for weights in model.parameters() if weights.ndim == 2]
    assert {weights.dtype for weights in model.parameters()} == {torch.bfloat16}
    assert all(float(weights.std()) == pytest.approx(0.02, rel=0.1) for weights in matrices)
    assert model.config.vocab_size == VOCABULARY
    stored = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())["weight_map"]
    assert ("lm_head.weight" in stored) != model.config.tie_word_embeddings


def test_ids_beyond_a_vocabulary_are_taken_modulo_its_size_and_rows_without_a_label_stay_so(tmp_path: Path) -> None:
    packs = tiny_tokens(20, kind="packs").path / "packs.arrow"
    before = read_table(packs).to_pylist()
    largest = fit_packs(packs, 100, tmp_path / "packs.arrow")
    after = read_table(tmp_path / "packs.arrow").to_pylist()
    assert largest == max(max(row["input_ids"]) for row in before) > 100
    for old, new in zip(before, after, strict=True):
        assert new["input_ids"] == [token % 100 for token in old["input_ids"]]
        assert new["labels"] == [label if label < 0 else label % 100 for label in old["labels"]]
        assert new["seq_lengths"] == old["seq_lengths"]


def in_this_process(side: str, model: Model, data: Path, device: str, **_: int) -> dict[str, Any]:
    """As a process of its own does, without its imports."""
    found = time_training(model, data / "packs.arrow", device, bench_config(side, 1, 3))
    return {"tokens_per_second": max(found["windows"]), **found}


@pytest.mark.usefixtures("scaled")
def test_each_shape_is_measured_and_its_flop_a_token_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "measure_training_side", in_this_process)
    tiny, packs, target = make_tiny_model(tmp_path / "tiny"), tiny_tokens(60, kind="packs").path, tmp_path / "told.json"
    options = ["--shape", "mistral-7b-v0.3", "--shape", "gemma-2-9b", "--model", str(tiny), "--data", str(packs)]
    told = CliRunner().invoke(app, ["train", *options, "--json", str(target)])
    assert told.exit_code == 0, told.output
    assert f"are taken modulo its vocabulary of {VOCABULARY}" in " ".join(told.output.split())
    found = json.loads(target.read_text())["shapes"]
    assert list(found) == ["mistral-7b-v0.3", "gemma-2-9b"]
    for measured in found.values():
        ours = measured["sides"]["auto"]
        layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
        assert measured["flop_per_token"] == 4 * (2 * layer + VOCABULARY * 32)
        assert ours["tflops"] == pytest.approx(ours["tokens_per_second"] * measured["flop_per_token"] / 1e12, abs=1e-6)
        assert ours["estimated_gib"] > 0


def test_an_unknown_shape_is_refused_with_those_known() -> None:
    told = CliRunner().invoke(app, ["train", "--shape", "llama-4"])
    assert told.exit_code == 2
    assert "qwen2.5-7b" in told.output
