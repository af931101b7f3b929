"""A merged model at an OpenAI-compatible endpoint: what may be asked is checked here, transformers' own server answers it.

    AMAZON_FT_API_KEY=... python -m flows.models.endpoint MODEL_DIRECTORY PORT

What it can't do it refuses, as OpenAI does, with 400 and {"error": {"message": ...}}; it never passes a wish over. One model is
served: there is no route to load another one, or to unload this.

Source: https://platform.openai.com/docs/api-reference/chat/create; transformers 5.17, `transformers.cli.serving`.
"""

from __future__ import annotations

import hmac
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import uuid4

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException

from flows.models.serve import API_KEY, HOST
from flows.models.vllm_side.amazon_ft_vllm import ThisMachineOnly

LONGEST_ANSWER = 1024
"""Tokens, unless the request says otherwise or the context ends before."""
WAITING_REQUESTS = 256
"""Open connections, beyond which clients are told 503: answers are made one after another."""
LEAST_TEMPERATURE = 1e-3
"""Of those below it the division would overflow; they are greedy."""


def _encodable(text: str) -> str:
    text.encode()  # JSON can name half a surrogate pair, which is no character
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class Asked(BaseModel):
    """A part of a request; a field that is unknown is refused."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Asked):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(Asked):
    """A turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = None


class TemplateArguments(Asked):
    """Arguments of the chat template, beside the messages."""

    question: Text | None = None


Stop = Annotated[Text, Field(min_length=1)]


class ChatRequest(Asked):
    """The body of a request; the last fields change nothing of an answer and are accepted for the clients that send them."""

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=0, le=2)
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(min_length=1, max_length=4)] | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    logprobs: Literal[False] | None = None
    chat_template_kwargs: TemplateArguments = TemplateArguments()
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    stream_options: dict[str, bool] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """By either of OpenAI's names."""
        return self.max_completion_tokens or self.max_tokens


@dataclass(frozen=True)
class Endpoint:
    """A loaded model, and what answers for it."""

    name: str
    tokenizer: Any
    context: int
    handler: Any

    def body(self, asked: ChatRequest) -> dict[str, Any]:
        """The request as transformers' handler takes it.

        Raises:
            HTTPException: 404 for another model, 400 for what the template or the context has no room for.
        """
        if asked.model not in (None, self.name):
            raise HTTPException(404, f"model: got {asked.model}; expected {self.name}, which is the one served here.")
        longest = self._longest(self._prompt_tokens(asked), asked.wanted_tokens)
        fields = ("messages", "temperature", "top_p", "frequency_penalty", "seed", "stop", "stream", "chat_template_kwargs")
        told = asked.model_dump(include=set(fields), exclude_none=True) | {"max_tokens": longest}
        return told | ({"temperature": 0.0} if (asked.temperature or 0) < LEAST_TEMPERATURE and "temperature" in told else {})

    def _prompt_tokens(self, asked: ChatRequest) -> int:
        from jinja2 import TemplateError

        messages = self.handler.get_processor_inputs_from_messages(asked.model_dump(exclude_none=True)["messages"], _language())
        arguments = asked.chat_template_kwargs.model_dump(exclude_none=True)
        try:
            rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **arguments)
        except TemplateError as error:
            where = "a system message only where the recipe's template has {SYSTEM}, and then first"
            raise HTTPException(400, f"messages: {error}; expected turns that this model was trained on, {where}.") from None
        return len(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _longest(self, prompt: int, wanted: int | None) -> int:
        room = self.context - prompt
        if room < (wanted or 1):
            answer = f"an answer of {wanted} tokens" if wanted else "an answer"
            raise HTTPException(
                400, f"messages: {prompt} tokens of prompt and {answer}: expected {self.context} together, the model's context."
            )
        return wanted or min(LONGEST_ANSWER, room)


def _language() -> Any:
    from transformers.cli.serving.utils import Modality

    return Modality.LLM


def load_endpoint(directory: Path) -> Endpoint:
    """The model of a directory, named as that; the working directory becomes the one around it."""
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import GenerationState

    os.chdir(directory.parent)  # what the server takes for the model's path is what it calls it in its answers
    manager = ModelManager(force_model=directory.name)
    model, tokenizer = manager.load_model_and_processor(manager.process_model_name(directory.name))
    handler = ChatCompletionHandler(manager, GenerationState())
    return Endpoint(directory.name, tokenizer, int(model.config.max_position_embeddings), handler)


def make_app(endpoint: Endpoint, key: str | None) -> FastAPI:
    """The routes, behind a key if there is one."""
    app = FastAPI(title="amazon-ft serve", docs_url=None, redoc_url=None)
    app.add_middleware(ThisMachineOnly)

    def check_key(sent: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]) -> None:
        given = sent.credentials if sent else ""
        if key and not hmac.compare_digest(given.encode("latin-1"), key.encode()):  # as headers are decoded
            raise HTTPException(401, f"Authorization: expected Bearer and the key that the server has in {API_KEY}.")

    @app.exception_handler(RequestValidationError)
    def refuse(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        found = error.errors()[0]
        return _error(400, f"{'.'.join(map(str, found['loc'][1:]))}: {found['msg']}")

    @app.exception_handler(AnyHTTPException)
    def tell(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, AnyHTTPException)
        return _error(error.status_code, error.detail)

    refusals: dict[int | str, dict[str, Any]] = {code: {"description": "refused"} for code in (400, 401, 404)}

    @app.post("/v1/chat/completions", dependencies=[Depends(check_key)], responses=refusals)
    async def chat(asked: ChatRequest) -> Any:
        return await endpoint.handler.handle_request(endpoint.body(asked), uuid4().hex)

    @app.get("/v1/models", dependencies=[Depends(check_key)], responses={401: refusals[401]})
    def models() -> dict[str, Any]:
        one = {"id": endpoint.name, "object": "model", "created": 0, "owned_by": "amazon-ft"}
        return {"object": "list", "data": [one]}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    _ = refuse, tell, chat, models, health
    return app


def _error(status: int, message: str) -> JSONResponse:
    """OpenAI's form of an error; half a surrogate pair, which no answer can hold, is shown by its number."""
    told = message.encode(errors="backslashreplace").decode()
    return JSONResponse({"error": {"message": told, "type": "invalid_request_error", "param": None, "code": None}}, status)


if __name__ == "__main__":
    import uvicorn

    served = make_app(load_endpoint(Path(sys.argv[1])), os.environ.get(API_KEY))
    uvicorn.run(served, host=HOST, port=int(sys.argv[2]), limit_concurrency=WAITING_REQUESTS, log_level="warning")
