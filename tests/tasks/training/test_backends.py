"""Both backends train the same thing behind one Protocol, on what the machine at hand can do.

Unsloth patches torch and transformers for good when it is imported, so it trains in processes of its own here.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.recipes import load_recipe
from tasks.config import FinetuneConfig, LoraSection, WeightsConfig
from tasks.finetune import finetune, load_backend
from tasks.refs import Adapter, ConfigError, InputError, Model, PipelineError
from tasks.training import hardware, loading, memory, model_shape
from tasks.training.checkpoints import checkpoints, step_of
from tasks.training.fast.families import FAMILIES
from tasks.training.inference.scoring import Request, Result, score, score_here
from tasks.training.loading import load_base
from tasks.training.unsloth import import_unsloth
from tasks.training.watch import StepRecord, read_log
from tests.support.families import lora_of, tiny_base
from tests.support.tiny import make_tiny_model, tiny_reference, tiny_tokens
from tests.support.train_tiny import inputs, train

pytestmark = pytest.mark.heavy

AS_DEFAULT = {"load_in_4bit": True, "dtype": "bfloat16", "gradient_checkpointing": "unsloth", "optimizer": "adamw_8bit"}
"""What the recipe `default` asks Unsloth for."""
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backends")


@pytest.fixture(autouse=True)
def home(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One root for the module, so that its trainings are made once."""
    monkeypatch.setenv("AMAZON_FT_HOME", str(root / "home"))
    return root / "home"


@pytest.fixture(scope="module")
def model(root: Path) -> Model:
    return tiny_reference(make_tiny_model(root / "tiny"))


def needs_unsloth() -> None:
    """Fail, or skip, where Unsloth is not installed."""
    if find_spec("unsloth") is None:
        how = pytest.fail if os.environ.get("AMAZON_FT_REQUIRE_UNSLOTH") == "1" else pytest.skip
        how("Unsloth is not installed: make install-unsloth")


def train_apart(root: Path, model: Model, *configs: dict[str, Any]) -> list[dict[str, Any]]:
    """Train with Unsloth in a process of its own, without network; from a directory that it could litter."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UNSLOTH_", "HF_HUB_"))}
    environment |= NO_NETWORK | {"AMAZON_FT_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"}
    paths = [str(Path(__file__).parents[3]), environment.get("PYTHONPATH")]  # packages may lie where the machine says
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    (root / "elsewhere").mkdir(exist_ok=True)
    changes = (json.dumps({"backend": "unsloth"} | config) for config in configs)
    command = [sys.executable, "-m", "tests.support.train_tiny", model.path, *changes]
    done = subprocess.run(command, env=environment, cwd=root / "elsewhere", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def by_unsloth(root: Path, model: Model) -> list[dict[str, Any]]:
    """A plain training, one as in the recipe `default`, and both again with a look at held-out rows."""
    needs_unsloth()
    return train_apart(root, model, {}, AS_DEFAULT, {"eval_steps": 6}, AS_DEFAULT | {"eval_steps": 6})


@pytest.fixture(params=["hf", "unsloth"])
def trained(request: pytest.FixtureRequest, model: Model) -> Adapter:
    """The same training by each backend."""
    if request.param == "hf":
        return train(model, tiny_tokens(40))
    return Adapter(**request.getfixturevalue("by_unsloth")[0]["adapter"])


def log_of(adapter: Adapter) -> list[StepRecord]:
    return read_log(adapter.log / "train_log.jsonl")


def test_each_backend_leaves_an_adapter_and_a_log_of_every_step(trained: Adapter) -> None:
    from safetensors import safe_open

    records = log_of(trained)
    assert [record.step for record in records] == list(range(1, 13))
    assert trained.steps == 12
    assert records[3].learning_rate == pytest.approx(9e-4)
    assert all(record.grad_norm > 0 for record in records)
    with safe_open(trained.data / "adapter_model.safetensors", framework="np") as file:
        assert len(file.keys()) == 2 * 2 * len(LoraSection().target_modules)  # A and B of each module of two layers
        assert any(abs(file.get_tensor(name)).max() > 0 for name in file.keys() if ".lora_B." in name)  # noqa: SIM118


def test_each_backends_adapter_loads_with_plain_peft(trained: Adapter, model: Model) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = json.loads((trained.data / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (16, 16, "org/tiny")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model.path), str(trained.data.path))
    assert tuned.active_adapter == "default"


def test_dora_and_a_trained_head_are_saved_as_plain_peft_loads_them(model: Model) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = {"use_dora": True, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    trained = train(model, tiny_tokens(40), lora=lora)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model.path), str(trained.data.path))
    names = {name for name, _ in tuned.named_parameters() if "default" in name}
    assert sum("lora_magnitude_vector" in name for name in names) == 2
    head = tuned.get_base_model().lm_head
    assert not head.modules_to_save["default"].weight.equal(head.original_module.weight)


def test_unsloth_trains_a_model_of_each_family_as_hf_does(root: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_unsloth()
    configs: list[dict[str, Any]] = []
    for name in FAMILIES:
        path = make_tiny_model(root / name, vocabulary=440)
        (path / "model.safetensors").unlink()
        tiny_base(name).save_pretrained(path)
        few = {"max_steps": 3, "logging_steps": 1, "save_steps": 3, "warmup_steps": 0, "lora": lora_of(name).model_dump()}
        configs.append(few | {"model": str(path)})
    apart = train_apart(root, model, *configs)
    monkeypatch.setattr(loading, "attention_of", lambda _: "sdpa")  # without Gemma 2's caps, which Unsloth leaves out on a CPU
    for name, config, made in zip(FAMILIES, configs, apart, strict=True):
        path = Path(config.pop("model"))
        wanted = [record.loss for record in log_of(train(tiny_reference(path), tiny_tokens(40), **config))]
        found = [record.loss for record in log_of(Adapter(**made["adapter"]))]
        assert found == pytest.approx(wanted, abs=1e-6), name


def test_fast_is_refused_with_what_it_does_not_train() -> None:
    for setting in ("use_dora=true", "modules_to_save=[lm_head]"):
        with pytest.raises(
            ConfigError, match=r"finetune\.backend=fast trains without finetune\.lora\.use_dora and modules_to_save"
        ):
            load_recipe("fast", [f"finetune.lora.{setting}"])


def test_unsloth_loses_what_plain_trl_loses(model: Model, by_unsloth: list[dict[str, Any]]) -> None:
    ours, plain = log_of(Adapter(**by_unsloth[0]["adapter"])), log_of(train(model, tiny_tokens(40)))
    assert [record.tokens for record in ours] == [record.tokens for record in plain]
    assert [record.loss for record in ours] == pytest.approx([record.loss for record in plain], abs=2e-5)
    assert [record.grad_norm for record in ours] == pytest.approx([record.grad_norm for record in plain], rel=1e-3)


def test_unsloth_trains_as_the_recipe_default_asks(by_unsloth: list[dict[str, Any]]) -> None:
    adapter = Adapter(**by_unsloth[1]["adapter"])
    resolved = json.loads((adapter.log / "resolved.json").read_text())
    assert resolved["load_in_4bit"] is True
    assert (resolved["dtype"], resolved["gradient_checkpointing"]) == ("bfloat16", "unsloth")
    assert {"unsloth", "unsloth_zoo", "torch", "trl"} <= resolved["versions"].keys()
    quantized, exact = log_of(adapter), log_of(Adapter(**by_unsloth[0]["adapter"]))
    assert [record.loss for record in quantized] == pytest.approx([record.loss for record in exact], abs=0.1)
    assert [record.loss for record in quantized] != [record.loss for record in exact]


def test_unsloth_looks_at_held_out_rows_as_plain_trl_does_and_learns_nothing_from_them(
    model: Model, by_unsloth: list[dict[str, Any]]
) -> None:
    def looked_at(adapter: Adapter) -> list[float]:
        return [record.held_out_loss for record in log_of(adapter) if record.held_out_loss is not None]

    plain, default, looking, looking_by_default = (Adapter(**told["adapter"]) for told in by_unsloth)
    assert (looking.data, looking_by_default.data) == (plain.data, default.data)
    wanted = looked_at(train(model, tiny_tokens(40), eval_steps=6))
    assert len(wanted) == 2
    assert looked_at(looking) == pytest.approx(wanted, abs=2e-5)
    assert looked_at(looking_by_default) == pytest.approx(wanted, abs=0.1)


def test_unsloth_keeps_its_compiled_code_under_the_root_and_sends_nothing(root: Path, by_unsloth: list[dict[str, Any]]) -> None:
    told = by_unsloth[0]["environment"]
    assert told["UNSLOTH_COMPILE_LOCATION"] == str(root / "home" / "unsloth_compiled")
    assert told["UNSLOTH_DISABLE_STATISTICS"] == "1"
    assert list((root / "elsewhere").iterdir()) == []


def test_unsloth_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(
    root: Path, model: Model, by_unsloth: list[dict[str, Any]]
) -> None:
    whole = Adapter(**by_unsloth[0]["adapter"])
    work = root / "home" / "work" / finetune.key(inputs(model, tiny_tokens(40), backend="unsloth"))[:32]
    newest, before = checkpoints(work)
    (newest / "manifest.json").unlink()
    (again,) = train_apart(root, model, {})
    resumed = Adapter(**again["adapter"])
    assert step_of(before) == 8
    assert resumed.data.digest == whole.data.digest
    assert [(record.loss, record.grad_norm) for record in log_of(resumed)] == [
        (record.loss, record.grad_norm) for record in log_of(whole)
    ]


def test_without_unsloth_its_recipes_are_refused_with_two_ways_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.training.hardware.package_versions", lambda _: {})
    with pytest.raises(ConfigError) as caught:
        train(model, tiny_tokens(4), backend="unsloth")
    assert str(caught.value) == (
        "finetune.backend: Unsloth is not installed: got unsloth; expected an installed backend. "
        'Install it (pip install "amazon-ft[cuda]") or set finetune.backend=hf finetune.gradient_checkpointing=full.'
    )


def test_an_unsloth_that_needs_a_gpu_is_refused_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Unsloth 2026.10.7 and 2026.10.8 answer on a machine without a GPU."""
    answer = "Unsloth cannot find any torch accelerator? You need a GPU."
    (tmp_path / "unsloth.py").write_text(f"raise NotImplementedError({answer!r})")
    (tmp_path / "unsloth-2026.10.7.dist-info").mkdir()
    (tmp_path / "unsloth-2026.10.7.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: unsloth\nVersion: 2026.10.7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        import_unsloth()
    assert str(caught.value) == (
        f"finetune.backend: Unsloth 2026.10.7 does not run here: got {answer}; expected a GPU, or Unsloth 2026.10.9, which "
        "trains on a CPU too. Install that, or set finetune.backend=hf finetune.gradient_checkpointing=full."
    )


def test_a_compile_location_of_the_users_own_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))
    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", str(tmp_path))
    monkeypatch.setenv("UNSLOTH_DISABLE_STATISTICS", "0")
    import_unsloth()
    assert os.environ["UNSLOTH_COMPILE_LOCATION"] == str(tmp_path)
    assert os.environ["UNSLOTH_DISABLE_STATISTICS"] == "1"


def test_loading_a_backend_imports_no_library() -> None:
    code = (
        "import sys\nfrom tasks.finetune import load_backend\n"
        "[load_backend(name).train for name in ('hf', 'unsloth')]\n"
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'unsloth'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert type(load_backend("hf")) is not type(load_backend("unsloth"))


# What the machine can do


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, *, bfloat16: bool) -> None:
    """As if torch saw a GPU, with or without bfloat16."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: bfloat16)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")


@pytest.mark.parametrize(("bfloat16", "dtype"), [(True, "bfloat16"), (False, "float16")])
def test_the_gpu_decides_between_bfloat16_and_float16(monkeypatch: pytest.MonkeyPatch, bfloat16: bool, dtype: str) -> None:
    on_a_gpu(monkeypatch, bfloat16=bfloat16)
    resolved = hardware.resolve(FinetuneConfig(backend="hf"), WeightsConfig(), "cuda")
    assert (resolved.dtype, resolved.optimizer, resolved.device_name) == (dtype, "adamw_8bit", "Tesla T4")


def test_bfloat16_on_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, bfloat16=False)
    with pytest.raises(ConfigError) as caught:
        hardware.resolve(FinetuneConfig(backend="hf"), WeightsConfig(dtype="bfloat16"), "cuda")
    assert str(caught.value) == (
        "model.dtype: Tesla T4 has no bfloat16: got bfloat16; expected float16 or auto. Set model.dtype=auto."
    )


@pytest.mark.parametrize(("capability", "told"), [("AVX2", True), ("AVX512", False)])
def test_bfloat16_on_a_cpu_that_is_slow_at_it_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capability: str, told: bool
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr(hardware, "machine", lambda: "x86_64")
    assert hardware.resolve(FinetuneConfig(backend="hf"), WeightsConfig(dtype="bfloat16"), "cpu").dtype == "bfloat16"
    assert ("this CPU has no AVX-512: got bfloat16" in caplog.text) is told
    caplog.clear()
    hardware.resolve(FinetuneConfig(backend="hf"), WeightsConfig(), "cpu")
    assert not caplog.text


def test_float16_on_the_cpu_is_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"^model.dtype: no float16 training on the CPU: got float16; expected auto"):
        train(model, tiny_tokens(4), dtype="float16")


def test_a_training_begun_in_bfloat16_is_not_gone_on_with_in_float16(
    model: Model, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    changes = {"dtype": "bfloat16", "max_steps": 4, "seed": 5}
    train(model, tiny_tokens(40), **changes)
    monkeypatch.setattr("tasks.training.hardware.resolve_dtype", lambda *_: "float16")
    with pytest.raises(
        InputError, match=r"was begun in bfloat16: got CPU, which has none; .* delete the directory to begin anew"
    ):
        train(model, tiny_tokens(40), **changes)


# Memory


def estimated(**changes: Any) -> dict[str, float]:
    """The estimate for a model of Llama-3-8B's shape."""
    linear = {"q_proj": (4096, 4096), "k_proj": (4096, 1024), "v_proj": (4096, 1024), "o_proj": (4096, 4096)}
    linear |= {"gate_proj": (4096, 14336), "up_proj": (4096, 14336), "down_proj": (14336, 4096)}
    shape = model_shape.ModelShape(hidden=4096, layers=32, vocabulary=128_256, tied=False, linear=linear)
    resolved = hardware.resolve(FinetuneConfig(backend="hf"), WeightsConfig(), "cpu").model_copy(
        update={"dtype": "bfloat16", "optimizer": "adamw_8bit", "gradient_checkpointing": "unsloth"} | changes
    )
    return memory.estimate_gib(shape, FinetuneConfig(), resolved, tokens=2 * 2048)


def test_sixteen_bits_take_what_sixteen_bits_take() -> None:
    assert estimated(load_in_4bit=False)["weights"] == pytest.approx(8_030_000_000 * 2 / 2**30, rel=1e-3)


@given(st.sampled_from(["adamw_8bit", "adamw_torch"]), st.booleans())
def test_less_checkpointing_never_takes_less_memory(optimizer: str, load_in_4bit: bool) -> None:
    totals = [
        estimated(optimizer=optimizer, load_in_4bit=load_in_4bit, gradient_checkpointing=how)["total"]
        for how in ("unsloth", "full", "none")
    ]
    assert totals == sorted(totals)


def test_a_model_that_is_no_llama_is_not_estimated(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 768}))
    assert model_shape.read_shape(tmp_path) is None


# Scoring


@pytest.fixture
def request_of(model: Model) -> Callable[..., Request]:
    """A request to score the adapter of a plain training."""

    def make(**changes: Any) -> Request:
        fields: dict[str, Any] = {
            "model": model,
            "adapter": str(train(model, tiny_tokens(40)).data.path),
            "dtype": "float32",
            "load_in_4bit": False,
            "device": "cpu",
            "input_ids": ((0, 5, 6, 7, 1), (0, 9, 1)),
            "labels": ((-100, -100, 6, 7, 1), (-100, 9, 1)),
            "prompts": ("Kettle",),
            "max_new_tokens": 4,
            "batch_size": 2,
        }
        return Request(**fields | changes)

    return make


def test_a_base_model_stored_in_nf4_loads_as_it_was_quantized(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    stored, ids = tmp_path / "stored", torch.tensor([[5, 6, 7, 8]])
    quantized = load_base(make_tiny_model(tmp_path / "wide", hidden=64), "bfloat16", load_in_4bit=True, device="cpu")
    quantized.save_pretrained(stored)
    with torch.no_grad():
        wanted = quantized(input_ids=ids).logits
        for load_in_4bit in (True, False):  # how it is stored decides
            again = load_base(stored, "bfloat16", load_in_4bit=load_in_4bit, device="cpu")
            assert torch.equal(again(input_ids=ids).logits, wanted)


def test_scoring_in_a_process_of_its_own_gives_the_same(
    request_of: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of()
    here = score_here(request)
    monkeypatch.setenv("UNSLOTH_IS_PRESENT", "1")
    monkeypatch.setattr(
        "tasks.training.inference.scoring.score_here", lambda _: pytest.fail("it was scored in the patched process")
    )
    assert score(request) == here
    assert all(nll > 0 for nll in here.nll)
    assert score_here(request_of(adapter=None)).nll != here.nll


def test_scoring_first_frees_the_model_of_a_training(
    request_of: Callable[..., Request], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alive() -> int:
        return sum(type(thing).__name__ == "LlamaForCausalLM" for thing in gc.get_objects())

    left: list[int] = []

    def load(*arguments: Any, **settings: Any) -> Any:
        left.append(alive())
        return load_base(*arguments, **settings)

    monkeypatch.setattr("tasks.training.inference.scoring.load_base", load)
    request = request_of()
    gc.disable()
    try:
        train(model, tiny_tokens(40), max_steps=4, seed=7)
        train(model, tiny_tokens(40), max_steps=4, seed=8)
        trained = alive()
        score(request)
    finally:
        gc.enable()
    assert left[0] < trained


def test_memory_that_runs_out_in_a_process_of_its_own_is_explained(
    request_of: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        Path(command[-1]).write_text(Result(out_of_memory="CUDA out of memory").model_dump_json())
        return subprocess.CompletedProcess(command, 0)

    request = request_of()
    monkeypatch.setenv("UNSLOTH_IS_PRESENT", "1")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(PipelineError, match=r"^evaluate: out of memory on cpu: got CUDA out of memory; expected the model and"):
        score(request)


def test_a_scoring_process_that_ends_early_is_an_error(
    request_of: Callable[..., Request], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNSLOTH_IS_PRESENT", "1")
    with pytest.raises(
        PipelineError, match=r"^evaluate: the scoring process ended without a result: got exit code 1; expected 0\.$"
    ):
        score(request_of(adapter="/nowhere"))
    assert "/nowhere" in capfd.readouterr().err


# On a GPU


@pytest.fixture(scope="module")
def wide(root: Path) -> Model:
    """A model whose heads are as wide as a GPU's kernels want them."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return tiny_reference(make_tiny_model(root / "wide", hidden=256))


GPU = AS_DEFAULT | {"device": "cuda", "dtype": "auto"}


@pytest.fixture(scope="module")
def by_unsloth_on_gpu(root: Path, wide: Model) -> dict[str, Any]:
    needs_unsloth()
    return train_apart(root, wide, GPU)[0]


@pytest.mark.gpu
def test_on_a_gpu_unsloth_resolves_what_the_gpu_can_and_the_estimate_bounds_the_peak_from_below(
    by_unsloth_on_gpu: dict[str, Any],
) -> None:
    import torch

    adapter = Adapter(**by_unsloth_on_gpu["adapter"])
    resolved = json.loads((adapter.log / "resolved.json").read_text())
    assert resolved["dtype"] == ("bfloat16" if torch.cuda.is_bf16_supported() else "float16")
    assert (resolved["optimizer"], resolved["device_name"]) == ("adamw_8bit", torch.cuda.get_device_name())
    assert resolved["estimated_gib"]["total"] <= resolved["peak_gib"] < resolved["free_gib"]
    assert len(log_of(adapter)) == 12


@pytest.mark.gpu
def test_on_a_gpu_both_backends_lose_the_same(wide: Model, by_unsloth_on_gpu: dict[str, Any]) -> None:
    plain = train(wide, tiny_tokens(40), **GPU | {"backend": "hf", "gradient_checkpointing": "full"})
    ours = log_of(Adapter(**by_unsloth_on_gpu["adapter"]))
    assert [record.loss for record in log_of(plain)] == pytest.approx([record.loss for record in ours], rel=0.01)


@pytest.mark.gpu
def test_on_a_gpu_unsloth_goes_on_from_a_checkpoint(root: Path, wide: Model, by_unsloth_on_gpu: dict[str, Any]) -> None:
    whole = log_of(Adapter(**by_unsloth_on_gpu["adapter"]))
    work = root / "home" / "work" / finetune.key(inputs(wide, tiny_tokens(40), **GPU | {"backend": "unsloth"}))[:32]
    (checkpoints(work)[0] / "manifest.json").unlink()
    (again,) = train_apart(root, wide, GPU)
    resumed = log_of(Adapter(**again["adapter"]))
    assert [record.loss for record in resumed[:8]] == [record.loss for record in whole[:8]]
    assert [record.loss for record in resumed] == pytest.approx([record.loss for record in whole], rel=0.01)


@pytest.mark.gpu
def test_on_a_gpu_the_adapter_scores_as_on_the_cpu(
    wide: Model, by_unsloth_on_gpu: dict[str, Any], request_of: Callable[..., Request]
) -> None:
    adapter = str(Adapter(**by_unsloth_on_gpu["adapter"]).data.path)
    on_cpu, on_gpu = (score_here(request_of(model=wide, adapter=adapter, device=device)) for device in ("cpu", "cuda"))
    assert on_gpu.nll == pytest.approx(on_cpu.nll, rel=1e-3)


@pytest.mark.gpu
def test_on_a_full_gpu_a_training_is_refused_with_the_estimate(wide: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.training.hardware.free_gib", lambda _: 0.001)
    with pytest.raises(InputError, match=r"^device: too little GPU memory: got 0\.0 GiB free; expected at least"):
        train(wide, tiny_tokens(40), **GPU | {"backend": "hf", "gradient_checkpointing": "full", "seed": 6})
