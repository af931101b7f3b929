"""The dimensions of each family, what a training of it is estimated to take, and adapters on maps that it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.config import FinetuneConfig, LoraSection, WeightsConfig
from tasks.refs import ConfigError
from tasks.training import hardware
from tasks.training.memory import estimate_gib
from tasks.training.model_shape import ModelShape, check_targets, read_shape
from tests.support.families import FUSED_TARGETS, TINY, tiny_base, tiny_config

pytestmark = pytest.mark.heavy


def shape_of(name: str, path: Path) -> ModelShape:
    tiny_config(name).save_pretrained(path)
    shape = read_shape(path)
    assert shape is not None
    return shape


@pytest.mark.parametrize("name", TINY)
def test_a_familys_dimensions_are_those_of_its_matrices(name: str, tmp_path: Path) -> None:
    shape, matrices = shape_of(name, tmp_path), dict[str, tuple[int, int]]()
    for module, parameter in tiny_base(name).named_parameters():
        if parameter.ndim == 2 and ".layers.0." in module:
            matrices[module.split(".")[-2]] = (parameter.shape[1], parameter.shape[0])
    assert shape.linear == matrices


@pytest.mark.parametrize("name", TINY)
def test_the_estimate_of_weights_is_what_a_model_has(name: str, tmp_path: Path) -> None:
    config = FinetuneConfig(backend="hf", gradient_checkpointing="none")
    resolved = hardware.resolve(config, WeightsConfig(load_in_4bit=False), "cpu")
    estimate = estimate_gib(shape_of(name, tmp_path), config, resolved, 100)["weights"]
    held = sum(parameter.numel() for parameter in tiny_base(name).parameters() if parameter.ndim == 2)
    assert estimate == pytest.approx(held * 4 / 2**30, abs=6e-5)  # it is rounded to four digits


def test_maps_that_a_family_lacks_are_refused_with_those_that_it_has(tmp_path: Path) -> None:
    shape = shape_of("phi3", tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_targets(shape, FinetuneConfig(backend="hf"))
    assert str(caught.value) == (
        "finetune.lora.target_modules: no such maps in this model's layers: got q_proj, k_proj, v_proj, gate_proj, up_proj; "
        "expected some of qkv_proj, o_proj, gate_up_proj, down_proj. "
        "Set finetune.lora.target_modules=[qkv_proj, o_proj, gate_up_proj, down_proj]."
    )
    check_targets(shape, FinetuneConfig(backend="unsloth"))
    check_targets(shape, FinetuneConfig(backend="fast", lora=LoraSection(target_modules=FUSED_TARGETS)))


def test_fast_trains_maps_of_layers_alone(tmp_path: Path) -> None:
    lora = LoraSection(target_modules=("q_proj", "lm_head"))
    check_targets(shape_of("llama", tmp_path), FinetuneConfig(backend="hf", lora=lora))
    with pytest.raises(ConfigError, match="got lm_head; expected some of q_proj, k_proj"):
        check_targets(shape_of("llama", tmp_path), FinetuneConfig(backend="fast", lora=lora))
