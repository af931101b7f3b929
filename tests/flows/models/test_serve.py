"""A saved model answers over HTTP as it does here, through transformers' own server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from flows.models import serve
from flows.models.saved import find_saved
from flows.running.garbage import collect, inventory
from tasks.refs import ConfigError
from tests.e2e.served import until
from tests.support.checkout import PROJECT
from tests.support.tiny import make_tiny_model
from tests.support.tuned import make_tiny_adapter, save_tuned

pytestmark = pytest.mark.heavy


@pytest.fixture
def base(tmp_path: Path) -> Path:
    base = make_tiny_model(tmp_path / "base")
    save_tuned(base, make_tiny_adapter(base, tmp_path / "adapter"))
    return base


def test_a_real_request_is_answered_as_the_merged_model_answers(base: Path, home: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "serve", "demo", "--port", str(port)], env=env, stdout=log, stderr=log
        )
    try:
        until(lambda: process.poll() is not None or httpx.get(f"http://127.0.0.1:{port}/health").is_success)
        chat = [{"role": "user", "content": "Chaleira"}]
        asked = {"model": "demo", "messages": chat, "max_tokens": 8, "temperature": 0, "stream": False}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=asked, timeout=300)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
    assert answer.is_success, (tmp_path / "serve.log").read_text()
    (merged,) = (home / "served").glob("*/demo")
    tokenizer, model = AutoTokenizer.from_pretrained(merged), AutoModelForCausalLM.from_pretrained(merged)
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.json()["choices"][0]["message"]["content"] == tokenizer.decode(said, skip_special_tokens=True)
    assert "serves model demo at http://127.0.0.1" in (tmp_path / "serve.log").read_text()


def test_the_merged_copy_is_made_once_and_gc_takes_it(base: Path, home: Path) -> None:
    told: list[str] = []
    path = serve.merged_copy(find_saved("demo"), told.append)
    assert serve.merged_copy(find_saved("demo"), told.append) == path
    assert len(told) == 2
    assert [entry.kind for entry in inventory() if entry.path.startswith("served/")] == ["served"]
    collect(1, 0.0)
    assert not path.exists()


def test_vllm_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: name == "vllm")
    assert serve.check_server() == "vllm"
    line = serve.command("vllm", Path("/home/served/ab/demo"), 8000)
    assert line[1:3] == ["serve", "/home/served/ab/demo"]
    assert {"--served-model-name demo", "--host 127.0.0.1", "--port 8000"} <= {f"{a} {b}" for a, b in pairwise(line)}


def test_what_to_install_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: name == "uvicorn")
    with pytest.raises(ConfigError, match=r"not installed: fastapi, openai; .* pip install 'amazon-ft\[serve\]'"):
        serve.check_server()
