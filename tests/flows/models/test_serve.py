"""A saved model answers over HTTP as it does here, through transformers' own server."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from flows.models import serve
from flows.models.saved import find_saved, promoted_link
from flows.models.vllm_side import amazon_ft_vllm
from flows.running.garbage import collect, inventory
from tasks.refs import ConfigError
from tests.e2e.served import until
from tests.support.checkout import PROJECT
from tests.support.tiny import make_tiny_model
from tests.support.tuned import make_tiny_adapter, save_tuned

pytestmark = pytest.mark.heavy
CLIENTS = 200


@pytest.fixture
def base(tmp_path: Path) -> Path:
    base = make_tiny_model(tmp_path / "base")
    save_tuned(base, make_tiny_adapter(base, tmp_path / "adapter"))
    return base


@dataclass
class Serving:
    """`amazon-ft serve` of a tiny model, in a process of its own."""

    root: Path
    url: str
    process: psutil.Popen

    def post(self, client: httpx.Client, **fields: Any) -> httpx.Response:
        chat = [{"role": "user", "content": "Chaleira"}]
        asked = {"model": "demo", "messages": chat, "max_tokens": 8, "temperature": 0, "stream": False, **fields}
        return client.post(f"{self.url}/v1/chat/completions", json=asked, timeout=300)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    root = tmp_path_factory.mktemp("serving")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMAZON_FT_HOME", str(root / "home"))
        base = make_tiny_model(root / "base")
        save_tuned(base, make_tiny_adapter(base, root / "adapter"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "AMAZON_FT_HOME": str(root / "home")}
    command = [sys.executable, "-m", "flows.cli", "serve", "demo", "--port", str(port)]
    with (root / "serve.log").open("wb") as log:
        process = psutil.Popen(command, env=env, stdout=log, stderr=log)
    found = Serving(root, f"http://127.0.0.1:{port}", process)
    try:
        until(lambda: process.poll() is not None or httpx.get(f"{found.url}/health").is_success)
        yield found
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def test_a_real_request_is_answered_as_the_merged_model_answers(serving: Serving) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with httpx.Client() as client:
        answer = serving.post(client)
    assert answer.is_success, (serving.root / "serve.log").read_text()
    (merged,) = (serving.root / "home" / "served").glob("*/demo")
    tokenizer, model = AutoTokenizer.from_pretrained(merged), AutoModelForCausalLM.from_pretrained(merged)
    chat = [{"role": "user", "content": "Chaleira"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.json()["choices"][0]["message"]["content"] == tokenizer.decode(said, skip_special_tokens=True)
    assert "serves model demo at http://127.0.0.1" in (serving.root / "serve.log").read_text()


def test_every_client_of_two_hundred_is_answered_or_told_to_come_back(serving: Serving, request: pytest.FixtureRequest) -> None:
    """Once each; with --many for a minute, through which the memory stays flat."""
    seconds = 60 if request.config.getoption("--many") else 0
    told, sizes, end = Counter[int](), list[int](), time.monotonic() + seconds

    def asks(_: int) -> None:
        with httpx.Client() as client:
            while True:
                told[serving.post(client, max_tokens=2).status_code] += 1
                sizes.append(serving.process.memory_info().rss)
                if time.monotonic() >= end:
                    return

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(asks, range(CLIENTS)))
    print(dict(told), sizes[len(sizes) // 4] >> 20, "to", sizes[-1] >> 20, "MiB")
    assert set(told) <= {200, 429, 503}
    assert told[200] >= 1
    assert sizes[-1] < sizes[len(sizes) // 4] * 1.2


def test_the_merged_copy_is_made_once_and_gc_takes_it(base: Path, home: Path) -> None:
    told: list[str] = []
    path = serve.merged_copy(find_saved("demo"), told.append)
    assert serve.merged_copy(find_saved("demo"), told.append) == path
    assert len(told) == 2
    assert [entry.kind for entry in inventory() if entry.path.startswith("served/")] == ["served"]
    collect(1, 0.0)
    assert not path.exists()


def started(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[str], dict[str, str]]:
    """The program, its command line and the variables that `amazon-ft serve demo` would become."""
    became: list[Any] = []
    monkeypatch.setattr(serve.os, "execve", lambda *said: became.extend(said))
    serve.become_server(find_saved("demo"), 8000, lambda _: None, **options)
    return became[1], became[2]


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program where vLLM is told to be; it is never run."""
    (tmp_path / "vllm").touch()
    monkeypatch.setenv(serve.VLLM, str(tmp_path / "vllm"))
    return tmp_path / "vllm"


def test_vllm_gets_the_base_model_and_beside_it_the_adapter_with_its_template(
    base: Path, vllm: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMAZON_FT_API_KEY", "secret")
    line, env = started(monkeypatch, link=promoted_link("demo"))
    saved = find_saved("demo").path
    assert line[:3] == [str(vllm), "serve", str(base)]
    told = {f"{a} {b}" for a, b in pairwise(line)}
    assert {f"--lora-modules demo={saved}", f"--tokenizer {saved}", f"--chat-template {saved}/chat_template.jinja"} <= told
    assert {"--served-model-name org/tiny", "--host 127.0.0.1", "--port 8000", "--max-lora-rank 16"} <= told
    assert not (home / "served").exists()
    assert "secret" not in line
    assert env["VLLM_API_KEY"] == "secret"
    assert env[amazon_ft_vllm.LINK] == str(home / "models" / "demo" / "promoted")


def test_vllm_gets_both_merged_where_it_has_no_such_adapter(
    tmp_path: Path, vllm: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_model(tmp_path / "base")
    save_tuned(base, make_tiny_adapter(base, tmp_path / "adapter"), **{"finetune.lora.bias": "all"})
    line, _ = started(monkeypatch)
    (merged,) = (home / "served").glob("*/demo")
    assert line[:3] == [str(vllm), "serve", str(merged)]
    assert "--enable-lora" not in line


def test_a_program_that_is_not_there_is_told(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(serve.VLLM, "/nowhere/vllm")
    with pytest.raises(ConfigError, match="AMAZON_FT_VLLM: no program: got /nowhere/vllm"):
        started(monkeypatch)


def test_what_to_install_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: name == "uvicorn")
    with pytest.raises(ConfigError, match=r"not installed: fastapi, openai; .* pip install 'amazon-ft\[serve\]'"):
        serve.check_transformers_server()


def test_only_a_recipes_name_is_followed(base: Path, home: Path) -> None:
    assert promoted_link("demo") == home / "models" / "demo" / "promoted"
    assert promoted_link("demo/unsloth_model_optimized") is None
    assert promoted_link(str(find_saved("demo").path)) is None
