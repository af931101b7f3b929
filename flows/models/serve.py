"""amazon-ft serve: a saved model behind an OpenAI-compatible endpoint, by vLLM where it is installed, else by transformers.

vLLM serves the base model and beside it the adapter, unmerged, which middleware in its process swaps for the one promoted next
(flows/models/vllm_side). transformers' server takes no adapter, nor does vLLM one with DoRA or modules trained whole: they get
both merged, made once under AMAZON_FT_HOME/served. Before transformers' server stand our own routes (flows/models/endpoint.py),
which check what is asked; vLLM checks it itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from flows.choices import Format
from flows.models.export import announce, export_model
from flows.models.saved import Saved, find_saved
from flows.models.vllm_side import amazon_ft_vllm
from tasks.caching.files import file_digest, text_digest
from tasks.caching.locks import locked
from tasks.refs import ConfigError, InputError, PipelineError, home

HOST = "127.0.0.1"
API_KEY, VLLM = "AMAZON_FT_API_KEY", "AMAZON_FT_VLLM"
SIDE, SIDE_PATH = "amazon_ft_vllm", Path(__file__).parent / "vllm_side"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's choices of --max-lora-rank. Source: vLLM 0.32, vllm/config/lora.py."""
NEEDED = ("fastapi", "openai", "uvicorn")
"""Imports of transformers' server."""


def vllm_command() -> Path | None:
    """The program `vllm`: at AMAZON_FT_VLLM, else of this environment if vLLM is installed in it.

    Raises:
        ConfigError: when nothing is there.
    """
    if told := os.environ.get(VLLM):
        if not (program := Path(told).expanduser().absolute()).is_file():
            raise ConfigError(
                f"{VLLM}: no program: got {told}; expected the path of vllm, as ~/vllm/bin/vllm. Set it, or unset it."
            )
        return program
    return Path(sys.executable).parent / "vllm" if find_spec("vllm") else None


def check_transformers_server() -> None:
    """Check that transformers' server can run.

    Raises:
        ConfigError: when it can't, naming what to install.
    """
    if missing := [name for name in NEEDED if not find_spec(name)]:
        raise ConfigError(
            f"serve: not installed: {', '.join(missing)}; expected vllm, or what transformers' server needs. On a GPU machine "
            f"install vllm in an environment of its own and set {VLLM} to its program, else pip install 'amazon-ft[serve]'."
        )


def check_successor(model: Path, first: Path) -> None:
    """Refuse a model that can't take the place of one that is served, on its base model, with its tokenizer and template.

    Raises:
        InputError: when it is not as it was saved, or differs in one of them.
    """
    new, old = find_saved(str(model)), find_saved(str(first))
    differ = [name for name in ("digest", "tokenizer") if new.lineage["base_model"][name] != old.lineage["base_model"][name]]
    differ += [] if _template(new) == _template(old) else ["chat template"]
    differ += [] if takes_adapter(new) else ["kind of adapter"]
    if differ:
        raise InputError(
            f"serve: the model promoted is of another {' and '.join(differ)}: got {model}; expected {first}'s. Restart."
        )


def takes_adapter(saved: Saved) -> bool:
    """Whether vLLM computes an adapter beside its base. Source: vLLM 0.32, vllm/lora/peft_helper.py."""
    lora = saved.recipe.finetune.lora
    return lora.r <= RANKS[-1] and not lora.use_dora and not lora.modules_to_save and lora.bias == "none"


def _template(saved: Saved) -> str:
    return file_digest(saved.path / "chat_template.jinja")


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


def transformers_line(model: Path, port: int) -> list[str]:
    """The command line of transformers' server, which calls the model as its directory is called."""
    return [sys.executable, "-m", "flows.models.endpoint", str(model), str(port)]


def vllm_line(program: Path, model: Path, name: str, port: int) -> list[str]:
    """The command line of vLLM for a model's directory, for requests by this machine's name alone."""
    here = ["--host", HOST, "--port", str(port), "--middleware", f"{SIDE}.ThisMachineOnly"]
    return [str(program), "serve", str(model), "--served-model-name", name, *here]


def adapter_options(saved: Saved) -> list[str]:
    """Options of vLLM for an adapter beside its base model, in the number type and the template that it was trained with."""
    rank = next(rank for rank in RANKS if rank >= saved.recipe.finetune.lora.r)
    lora = [
        "--enable-lora",
        "--max-loras",
        "1",
        "--max-lora-rank",
        str(rank),
        "--lora-modules",
        f"{saved.recipe.name}={saved.path}",
    ]
    told = ["--tokenizer", str(saved.path), "--chat-template", str(saved.path / "chat_template.jinja")]
    dtype = saved.lineage["training"].get("dtype", "auto")
    return [*lora, *told, "--dtype", dtype, "--middleware", f"{SIDE}.PromotedAdapter"]


def follow_variables(saved: Saved, link: Path | None) -> dict[str, str]:
    """The environment variables that flows/models/vllm_side reads."""
    return {
        amazon_ft_vllm.NAME: saved.recipe.name,
        amazon_ft_vllm.ADAPTER: str(saved.path),
        amazon_ft_vllm.LINK: str(link or saved.path),
        amazon_ft_vllm.PYTHON: sys.executable,
    }


def become_server(saved: Saved, port: int, say: Callable[[str], None], *, link: Path | None = None) -> None:
    """Become the server, until Ctrl-C; it listens on this machine only, and wants the key of AMAZON_FT_API_KEY if there is one.

    vLLM serves whatever model `link` leads to when a request arrives.

    Raises:
        ConfigError: when no server is installed.
    """
    program, key = vllm_command(), os.environ.get(API_KEY)
    own = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    if program is None:
        check_transformers_server()
        model = merged_copy(saved, say)
        # All that it needs is here, and what else lies in the Hub's cache is not for its clients.
        line, own = transformers_line(model, port), own | {"HF_HUB_CACHE": str(model.parent)}
    else:
        own |= {"PYTHONPATH": os.pathsep.join([str(SIDE_PATH), *filter(None, [os.environ.get("PYTHONPATH")])])}
        own |= {"VLLM_API_KEY": key} if key else {}
        if takes_adapter(saved):
            base = saved.base()
            name = base.name if base.name != saved.recipe.name else f"{base.name}-base"
            line = [*vllm_line(program, Path(base.path), name, port), *adapter_options(saved)]
            own |= follow_variables(saved, link)
        else:
            line = vllm_line(program, merged_copy(saved, say), saved.recipe.name, port)
    lock = f"with the key in {API_KEY}" if key else f"without a key: {API_KEY} is not set"
    server = "vllm" if program else "transformers"
    say(f"{server} serves model {saved.recipe.name} at http://{HOST}:{port}/v1/chat/completions, {lock}; Ctrl-C ends it")
    os.execve(line[0], line, os.environ | own)


if __name__ == "__main__":
    try:
        check_successor(*map(Path, sys.argv[1:]))
    except PipelineError as error:
        sys.exit(str(error))
