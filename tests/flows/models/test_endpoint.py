"""The endpoint answers what it can do, refuses the rest with a reason, and never fails for what it was sent."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from flows.models.endpoint import ChatRequest, Endpoint, load_endpoint, make_app
from tasks.refs import Special
from tasks.text.chat_template import parse_template, to_jinja
from tests.support.tiny import BOS, EOS, make_tiny_model

pytestmark = pytest.mark.heavy

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Chaleira"}
SYSTEM = {"role": "system", "content": "Seja breve."}
WITHOUT, WITH = "Responda.\n# P:\n{INPUT}\n# R:\n{OUTPUT}", "{SYSTEM}\n# P:\n{INPUT}\n# R:\n{OUTPUT}"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Endpoint]:
    """An endpoint whose model has this template."""

    def load(template: str) -> Endpoint:
        directory = make_tiny_model(tmp_path_factory.mktemp("served") / "demo")
        special = Special(bos=BOS, eos=EOS)
        jinja = to_jinja(parse_template(template, special), special, system="Ajude.", question=None)
        (directory / "chat_template.jinja").write_text(jinja)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(directory)  # and back, since the endpoint goes elsewhere
            return load_endpoint(directory)

    return load


@pytest.fixture(scope="module")
def endpoint(serving: Callable[[str], Endpoint]) -> Endpoint:
    return serving(WITHOUT)


def client(endpoint: Endpoint, key: str | None = None, host: str = "127.0.0.1:8000") -> TestClient:
    return TestClient(make_app(endpoint, key), base_url=f"http://{host}", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def asked(endpoint: Endpoint) -> Callable[..., httpx.Response]:
    """The answer to a request with these fields."""
    one = client(endpoint)
    return lambda **fields: one.post(CHAT, json={"messages": [USER], "max_tokens": 3, **fields})


def test_it_answers_with_as_many_tokens_as_were_asked_for(asked: Callable[..., httpx.Response]) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = asked(**{"max_tokens": None, "model": "demo", name: 5}).json()
        assert answer["usage"]["completion_tokens"] == 5
        assert answer["choices"][0]["message"]["content"]


def test_its_one_model_is_listed(endpoint: Endpoint) -> None:
    assert [model["id"] for model in client(endpoint).get("/v1/models").json()["data"]] == ["demo"]


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": -3}, 400, "max_tokens"),
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        (
            {"messages": [{"role": "robot", "content": "?"}]},
            400,
            "messages.0.role: Input should be 'system', 'user' or 'assistant'",
        ),
        ({"messages": [USER, {"role": "user"}]}, 400, "messages.1.content: Field required"),
        ({"n": 3}, 400, "n: Input should be 1"),
        ({"tools": [{}]}, 400, "tools: Extra inputs are not permitted"),
        ({"messages": [USER | {"content": "aço " * 2048}]}, 400, "expected 2048 together, the model's context"),
        ({"max_tokens": 2048}, 400, "an answer of 2048 tokens: expected 2048 together"),
        ({"model": "../../etc"}, 404, "model: got ../../etc; expected demo, which is the one served here."),
        ({"temperature": "warm"}, 400, "temperature"),
        ({"chat_template_kwargs": {"tokenize": True}}, 400, "chat_template_kwargs.tokenize"),
    ],
)
def test_what_it_cannot_do_is_refused(
    asked: Callable[..., httpx.Response], fields: dict[str, Any], status: int, reason: str
) -> None:
    answer = asked(**fields)
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["error"]["message"]


def test_no_other_model_is_loaded_and_this_one_stays(endpoint: Endpoint) -> None:
    one = client(endpoint)
    assert [one.post(path, json={"model": "/etc"}).status_code for path in ("/load_model", "/reset")] == [404, 404]


def test_a_system_message_stands_where_the_template_has_a_place_for_it(serving: Callable[[str], Endpoint]) -> None:
    body = {"messages": [SYSTEM, USER], "max_tokens": 2}
    endpoint = serving(WITH)
    counted = [endpoint._prompt_tokens(ChatRequest(messages=messages)) for messages in ([SYSTEM, USER], [USER])]
    assert client(endpoint).post(CHAT, json=body).json()["usage"]["prompt_tokens"] == counted[0] != counted[1]


def test_a_system_message_is_refused_where_it_has_none(asked: Callable[..., httpx.Response]) -> None:
    answer = asked(messages=[SYSTEM, USER])
    assert answer.status_code == 400
    assert "a system message only where the recipe's template has {SYSTEM}, and then first" in answer.json()["error"]["message"]


def test_another_host_is_refused(endpoint: Endpoint) -> None:
    assert client(endpoint, host="rebound.example").get("/health").status_code == 400
    assert client(endpoint, host="localhost:8000").get("/health").status_code == 200


def test_a_key_opens_what_it_locks(endpoint: Endpoint) -> None:
    locked = client(endpoint, key="sésame")
    for sent in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
        assert locked.get("/v1/models", headers=sent).status_code == 401
        assert locked.post(CHAT, json={"messages": [USER]}, headers=sent).status_code == 401
    given = {"Authorization": "Bearer sésame".encode()}
    assert locked.get("/v1/models", headers=given).status_code == 200
    assert locked.get("/health").status_code == 200


def test_half_a_surrogate_pair_is_refused_and_named(endpoint: Endpoint) -> None:
    for body in (rb'{"messages": [{"role": "user", "content": "\ud800"}]}', rb'{"\udfff": 1, "messages": []}'):
        answer = client(endpoint).post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text


text = st.text(st.characters(exclude_categories=()), max_size=20)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": text | anything}),
    max_size=3,
)
fields: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "frequency_penalty": st.floats(-2, 2),
    "seed": st.integers(),
    "stop": text | st.lists(text, max_size=5),
    "n": st.integers(0, 2),
    "stream": st.booleans(),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["question", "messages", "tools"]), anything, max_size=2),
}
bodies = st.fixed_dictionaries(
    {"messages": messages | anything, "max_tokens": st.integers(-1, 4)},
    optional={name: strategy | anything for name, strategy in fields.items()},
)


@settings(max_examples=100)
@given(body=bodies)
def test_whatever_is_sent_it_never_fails(endpoint: Endpoint, body: dict[str, Any]) -> None:
    answer = client(endpoint).post(CHAT, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), answer.text
    assert '"error"' not in answer.text or answer.status_code == 400
