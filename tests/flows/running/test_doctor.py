from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.bench.shapes import SHAPES
from flows.recipes import load_recipe
from flows.running.doctor import Finding, _fetchable, examine
from flows.running.gpus import visible_gpus
from tests.support.checkout import PROJECT
from tests.support.gpus import H200, SECOND_H200, driver
from tests.support.tiny import make_tiny_model

OLD = "0, GPU-66666666-2222-3333-4444-555555555555, Tesla K80, 470.10.01, 11441"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model")


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


def findings(model: Path, *overrides: str, recipe: str = "demo") -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(load_recipe(recipe, [f"model.id={model}", *overrides]))}


def test_demo_misses_nothing_here(model: Path, no_server: None) -> None:
    found = findings(model)
    assert {name: finding.state for name, finding in found.items() if finding.state == "missing"} == {}
    assert found["server"].state == "note"
    assert found["source"].found == "generated: 3,000 lines"


def test_missing_model_and_source_are_named(tmp_path: Path, no_server: None) -> None:
    settings = ["catalogue=null", f"ingest.sources=[{tmp_path / 'trn.json'}]"]
    found = findings(tmp_path / "nowhere", *settings)
    assert (found["model"].state, found["source"].state) == ("missing", "missing")
    assert "no directory" in found["model"].found
    assert str(tmp_path / "trn.json") in found["source"].found


def test_recipe_for_a_gpu_misses_one_where_no_driver_answers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_server: None
) -> None:
    monkeypatch.setenv("PATH", driver(tmp_path / "bin"))
    assert findings(model, "device=cuda")["gpu"].state == "missing"


def test_old_driver_is_said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_server: None) -> None:
    monkeypatch.setenv("PATH", driver(tmp_path / "bin", OLD))
    found = findings(model)["gpu"]
    assert (found.state, found.advice) == ("missing", "Update the driver.")
    assert "Tesla K80 (11 GiB), driver 470.10.01" in found.found


def test_a_gpu_without_memory_of_its_own_is_shown_without(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_server: None
) -> None:
    monkeypatch.setenv("PATH", driver(tmp_path / "bin", "0, GPU-1, NVIDIA GB10, 580.95.05, [N/A]"))
    assert findings(model, "device=cuda")["gpu"].found.startswith("NVIDIA GB10, driver 580.95.05")


@pytest.mark.parametrize(
    ("devices", "state", "said"),
    [(2, "ok", ", the base model shared out over all devices"), (1, "missing", "too little GPU memory: got 40.0 GiB free")],
)
def test_a_model_that_one_gpu_can_not_hold_is_said_to_be_shared_out_or_refused(
    devices: int, state: str, said: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_server: None
) -> None:
    (model / "config.json").write_text(json.dumps(SHAPES["llama-3-70b"].settings | {"model_type": "llama"}))
    monkeypatch.setenv("PATH", driver(tmp_path / "bin", H200, SECOND_H200))
    for name, value in {"is_available": True, "device_count": devices, "get_device_capability": (9, 0)}.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value: value)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (40 * 2**30, 80 * 2**30))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100-PCIE-40GB")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    settings = ["device=cuda", f"finetune.devices={devices}", "finetune.gradient_accumulation=2", "pack.tokens=4096"]
    found = findings(model, *settings, recipe="fast")["gpu memory"]
    assert found.state == state
    assert said in found.found


def test_an_index_that_does_not_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "silent").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "silent").chmod(0o755)
    monkeypatch.setattr("flows.running.doctor.sys.executable", str(tmp_path / "silent"))
    monkeypatch.setattr("flows.running.doctor.PIP_SECONDS", 0.2)
    assert _fetchable().found.endswith("no answer in 0.2 s")


def test_only_the_visible_gpu_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", driver(tmp_path / "bin", H200, SECOND_H200))
    assert [gpu.index for gpu in visible_gpus()] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-2111")
    assert [gpu.index for gpu in visible_gpus()] == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_server_that_does_not_answer_is_missing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert findings(model)["server"].state == "missing"


def test_server_without_workers_is_said_with_the_commands_that_start_them(model: Path, prefect_api: str) -> None:
    found = findings(model)
    assert found["server"].state == "ok"
    assert found["pool cuda"].state == "missing"
    assert "amazon-ft worker cuda" in found["pool cuda"].advice


def test_full_disk_is_missing(model: Path, no_server: None) -> None:
    assert findings(model, "catalogue.rows=50000000")["disk"].found.endswith("about 57.9 GiB needed")


@pytest.mark.parametrize(("model_id", "code"), [(None, 0), ("/nowhere", 1)])
def test_exit_code_tells(model: Path, tmp_path: Path, model_id: str | None, code: int) -> None:
    command = [sys.executable, "-m", "flows.cli", "doctor", "demo", "--json", "--set", f"model.id={model_id or model}"]
    env = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    states = {finding["check"]: finding["state"] for finding in json.loads(done.stdout)["findings"]}
    assert states["model"] == ("missing" if code else "ok")
