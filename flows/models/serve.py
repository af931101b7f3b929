"""amazon-ft serve: a saved model behind an OpenAI-compatible endpoint, by vLLM where it is installed, else by transformers.

What is served is adapter and base model merged, made once under AMAZON_FT_HOME/served, since transformers' server takes no
adapter. Before that server stand our own routes (flows/models/endpoint.py), which check what is asked; vLLM checks it itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from flows.choices import Format
from flows.models.export import announce, export_model
from flows.models.saved import Saved
from tasks.caching.files import file_digest, text_digest
from tasks.caching.locks import locked
from tasks.refs import ConfigError, home

HOST = "127.0.0.1"
API_KEY = "AMAZON_FT_API_KEY"
NEEDED = ("fastapi", "openai", "uvicorn")
"""Imports of transformers' server."""


def check_server() -> str:
    """The server that is installed: vllm or transformers.

    Raises:
        ConfigError: when neither can run, naming what to install.
    """
    if find_spec("vllm"):
        return "vllm"
    if missing := [name for name in NEEDED if not find_spec(name)]:
        raise ConfigError(
            f"serve: not installed: {', '.join(missing)}; expected vllm, or what transformers' server needs. "
            "pip install vllm on a GPU machine, else pip install 'amazon-ft[serve]'."
        )
    return "transformers"


def merged_copy(saved: Saved, say: Callable[[str], None]) -> Path:
    """The model merged into its base, made at the first call."""
    adapter = file_digest(saved.path / "adapter_model.safetensors")
    base, template = saved.lineage["base_model"]["digest"], file_digest(saved.path / "chat_template.jinja")
    folder = home() / "served" / text_digest(f"{adapter} {base} {template}")[:32]
    path = folder / saved.recipe.name
    with locked(folder.with_suffix(".lock"), remove=True):
        if not path.is_dir():
            announce(export_model(saved, Format.MERGED, path), path, say)
    return path


def command(server: str, model: Path, port: int) -> list[str]:
    """The server's command line, which calls the model as its directory is called."""
    if server == "transformers":
        return [sys.executable, "-m", "flows.models.endpoint", str(model), str(port)]
    own = [str(Path(sys.executable).parent / "vllm"), "serve", str(model), "--served-model-name", model.name]
    return [*own, "--host", HOST, "--port", str(port), "--middleware", "flows.models.endpoint.ThisMachineOnly"]


def become_server(saved: Saved, port: int, say: Callable[[str], None]) -> None:
    """Become the server, until Ctrl-C; it listens on this machine only, and wants the key of AMAZON_FT_API_KEY if there is one.

    Raises:
        ConfigError: when no server is installed.
    """
    server = check_server()
    model = merged_copy(saved, say)
    key = os.environ.get(API_KEY)
    lock = f"with the key in {API_KEY}" if key else f"without a key: {API_KEY} is not set"
    say(f"{server} serves model {model.name} at http://{HOST}:{port}/v1/chat/completions, {lock}; Ctrl-C ends it")
    line = command(server, model, port)
    # All that it needs is here, and what else lies in the Hub's cache is not for its clients.
    own = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(model.parent), "DO_NOT_TRACK": "1"} | ({"VLLM_API_KEY": key} if key else {})
    os.execve(line[0], line, os.environ | own)
