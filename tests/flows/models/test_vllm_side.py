"""The promoted model takes the place of the one before without a restart, or does not and says why."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from flows.models.saved import find_saved, promoted_link
from flows.models.serve import follow_variables
from flows.models.vllm_side.amazon_ft_vllm import PromotedAdapter, ThisMachineOnly
from tasks.save import publish_link
from tests.support.tiny import make_tiny_model
from tests.support.tuned import make_tiny_adapter, save_tuned

pytestmark = pytest.mark.heavy


class Engine:
    """vLLM's OpenAIServingModels: its requests by name, and a loading that fails for what is named."""

    def __init__(self, adapter: Path) -> None:
        self.lora_requests: dict[str, Any] = {"demo": SimpleNamespace(lora_path=str(adapter))}
        self.fails = False

    async def load_lora_adapter(self, request: Any) -> str:
        assert request.lora_name not in self.lora_requests  # else vLLM refuses, or loads into running answers
        if not self.fails:
            self.lora_requests[request.lora_name] = request
        return "no room" if self.fails else "Success"

    @property
    def serves(self) -> Path:
        return Path(self.lora_requests["demo"].lora_path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "base")


@pytest.fixture
def engine(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    protocol = ModuleType("protocol")
    protocol.LoadLoRAAdapterRequest = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.serve.lora.protocol", protocol)
    publish_link(save_tuned(base, make_tiny_adapter(base, tmp_path / "first")), "demo", "promoted")
    saved = find_saved("demo")
    for name, value in follow_variables(saved, promoted_link("demo")).items():
        monkeypatch.setenv(name, value)
    return Engine(saved.path)


@pytest.fixture
def client(engine: Engine) -> TestClient:
    app = Starlette(routes=[Route("/", lambda _: PlainTextResponse(str(engine.serves)))])
    app.state.openai_serving_models = engine
    app.add_middleware(PromotedAdapter)
    app.add_middleware(ThisMachineOnly)
    return TestClient(app, base_url="http://127.0.0.1")


def promote_another(base: Path, tmp_path: Path, **overrides: str) -> Path:
    saved = save_tuned(base, make_tiny_adapter(base, tmp_path / "second"), **{"finetune.lora.alpha": "3", **overrides})
    publish_link(saved, "demo", "promoted")
    return saved.data.path


def test_the_next_request_is_answered_by_the_model_promoted_meanwhile(
    engine: Engine, client: TestClient, base: Path, tmp_path: Path
) -> None:
    first = engine.serves
    assert client.get("/").text == str(first)
    second = promote_another(base, tmp_path)
    assert client.get("/").text == str(second) != str(first)


@pytest.mark.parametrize("fault", ["template", "base", "damage", "engine"])
def test_what_can_not_take_its_place_does_not_and_it_is_said_once(
    fault: str, engine: Engine, client: TestClient, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = engine.serves
    engine.fails = fault == "engine"
    other = make_tiny_model(tmp_path / "other", seed=1) if fault == "base" else base
    changed = (
        {"template.chat_template": r'"Tell.\n\n### Title:\n{INPUT}\n\n### Description:\n{OUTPUT}"'} if fault == "template" else {}
    )
    second = promote_another(other, tmp_path, **changed)
    if fault == "damage":
        weights = second / "adapter_model.safetensors"
        weights.chmod(0o644)
        weights.write_bytes(weights.read_bytes()[:-1])
    assert {client.get("/").text, client.get("/").text} == {str(first)}
    expected = {"template": "another chat template", "base": "another digest", "damage": "is corrupt", "engine": "no room"}[fault]
    (told,) = [record.getMessage() for record in caplog.records if record.name == "vllm.amazon_ft"]
    assert f"{second} is promoted and not served" in told
    assert expected in told


def test_a_page_of_another_name_is_refused(client: TestClient) -> None:
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
