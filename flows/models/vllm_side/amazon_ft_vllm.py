"""Middleware of `vllm serve`, set by flows/models/serve.py: for this machine only, and always the promoted model's adapter.

Before each request it looks where the link `promoted` leads. When that changed, amazon-ft's own Python is asked whether the new
model may take the old one's place; then its adapter is loaded under the same name. Answers that have begun end with the adapter
that they began with: the new one has a number of its own, and vLLM computes one adapter at a time (--max-loras 1).

vLLM's own route /v1/load_lora_adapter is not opened: whoever may ask could load what they name, and in the middle of answers.

Source: vLLM 0.32, vllm/entrypoints/openai/models/serving.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger("vllm.amazon_ft")

HOSTS = ["127.0.0.1", "localhost"]
NAME, ADAPTER, LINK, PYTHON = "AMAZON_FT_SERVED", "AMAZON_FT_ADAPTER", "AMAZON_FT_LINK", "AMAZON_FT_PYTHON"
"""Variables: the model's name, its directory, the link to follow, and the Python where amazon-ft is installed."""
CHECK = ("-m", "flows.models.serve")
"""Judges a directory: may it take the place of another?"""


class ThisMachineOnly(TrustedHostMiddleware):
    """Refuses requests by another name than this machine's: a web page whose name leads here (DNS rebinding)."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, allowed_hosts=HOSTS)


class PromotedAdapter:
    """Serves the adapter that the link leads to when a request arrives."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.lock = asyncio.Lock()
        self.seen = Path(os.environ[ADAPTER])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, after the adapter that it is to be answered with was loaded."""
        if scope["type"] == "http":
            async with self.lock:
                await self._follow(scope["app"].state.openai_serving_models)
        await self.app(scope, receive, send)

    async def _follow(self, models: Any) -> None:
        there = Path(os.environ[LINK]).resolve()
        if there == self.seen or not there.is_dir():
            return
        self.seen = there
        refused = await judge_model(there) or await swap(models, os.environ[NAME], there)
        if refused:
            logger.error("%s: %s is promoted and not served: %s", os.environ[NAME], there, refused)
        else:
            logger.info("%s: now served from %s", os.environ[NAME], there)


async def judge_model(model: Path) -> str:
    """Why a model may not take the place of the one that was started; empty if it may."""
    command = [os.environ[PYTHON], *CHECK, str(model), os.environ[ADAPTER]]
    asked = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    _, told = await asked.communicate()
    return told.decode(errors="replace").strip()[-2000:] if asked.returncode else ""


async def swap(models: Any, name: str, adapter: Path) -> str:
    """Load another adapter under a name; why it failed, and then the old one stays; empty if it went well."""
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest  # pyright: ignore[reportMissingImports]

    before = models.lora_requests.pop(name)
    answer = await models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=name, lora_path=str(adapter)))
    if name in models.lora_requests:
        return ""
    models.lora_requests[name] = before
    return str(answer)
