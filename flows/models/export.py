"""amazon-ft export: a saved model in the form that others take, checked by loading it again; and to the Hub.

adapter         a copy of the saved directory, in PEFT's format
merged-16bit    adapter and base model as one transformers model, in bfloat16 or float16
gguf            the same as one file for llama.cpp, Ollama and LM Studio (Llama models)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import yaml

from flows.choices import Format
from flows.models.saved import Saved
from tasks.caching.files import space_checked
from tasks.caching.manifest import MANIFEST
from tasks.reading.model_files import TOKENIZER
from tasks.refs import ConfigError, InputError, Model, PipelineError

if TYPE_CHECKING:
    from tasks.training.exporting.merging import Difference

TOKEN = "HF_TOKEN"
GGUF = "model.gguf"
TOLD = ("lineage.json", "recipe.yaml", "metrics.json", "generations.jsonl", "LICENSE", "NOTICE")
USE = {
    "merged-16bit": (
        "transformers",
        """from transformers import pipeline

generate = pipeline("text-generation", model=".", dtype="auto")
print(generate([{"role": "user", "content": "..."}], max_new_tokens=128)[0]["generated_text"][-1]["content"])""",
    ),
    "gguf": ("gguf", """# llama-cli -m model.gguf --jinja"""),
}
"""{format: (library_name of its card, how to use it)}."""


def export_model(saved: Saved, how: Format, out: Path) -> Difference:
    """Write a model to a directory that is not there yet, whole or not at all; how far its answers are from the adapter's.

    Raises:
        InputError: when the directory is there, or the model can't be written in this format.
        PipelineError: when what was written does not answer as the adapter does.
    """
    if out.exists():
        raise InputError(f"export {out}: is there already; expected a directory to be made. Remove it or name another.")
    base = saved.base()
    draft = out.with_name(f".{out.name}.{uuid4().hex}")
    with space_checked(draft, _need_bytes(how, base)):
        draft.mkdir(parents=True)
        try:
            difference = {Format.MERGED: _merged, Format.GGUF: _gguf, Format.ADAPTER: _adapter}[how](saved, base, draft)
            draft.rename(out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return difference


def push_to_hub(directory: Path, repository: str, token: str) -> str:
    """Upload a directory to a model repository of the Hub, made private if it is new; its URL.

    Raises:
        PipelineError: when the Hub refuses or can't be reached.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        made = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=directory, commit_message="Upload by amazon-ft export")
    except (HfHubHTTPError, HFValidationError, HTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0].replace(token, "***")
        raise PipelineError(
            f"export --push {repository}: {type(error).__name__}: {reason}; expected a repository that {TOKEN} may write to, "
            f"such as you/name. What was exported is kept; upload it with: hf upload --private {repository} {directory}"
        ) from None
    return str(made)


def read_token() -> str:
    """The Hub's token from the environment.

    Raises:
        ConfigError: when there is none.
    """
    if not (token := os.environ.get(TOKEN, "").strip()):
        raise ConfigError(f"export --push: {TOKEN} is not set; expected a token that may write. Export it in the environment.")
    return token


def sixteen_bits(saved: Saved) -> str:
    """The number type of an export: the recipe's where that has 16 bits."""
    return "float16" if saved.recipe.model.dtype == "float16" else "bfloat16"


def card(readme: str, how: str) -> str:
    """The saved model's card for another format: its front matter and numbers, and another way of use."""
    library, code = USE[how]
    _, front, body = readme.split("---\n", 2)
    metadata = yaml.safe_load(front) | {"library_name": library}
    told = body.split("## Use")[0].replace("A LoRA adapter for", f"Exported as {how}: a LoRA adapter merged into")
    front = yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True)
    return f"---\n{front}---\n{told}## Use\n\n```python\n{code}\n```\n"


def _merged(saved: Saved, base: Model, draft: Path) -> Difference:
    from tasks.training.exporting import merging
    from tasks.training.loading import is_quantized

    merged = merging.merge(saved.path, base, sixteen_bits(saved))
    # transformers 5.17 can't undo the conversions that loading four bits took; the weights are back in their own format
    merged.model.save_pretrained(draft, save_original_format=not is_quantized(Path(base.path)))
    _copy(saved.path, draft, (*TOKENIZER, *TOLD))
    _write_card(saved, draft, Format.MERGED)
    return merging.check_loaded(merged, draft, base)


def _gguf(saved: Saved, base: Model, draft: Path) -> Difference:
    from transformers import AutoConfig

    from tasks.training.exporting import gguf, merging

    gguf.check_exportable(AutoConfig.from_pretrained(base.path, local_files_only=True), saved.path)
    merged = merging.merge(saved.path, base, sixteen_bits(saved))
    gguf.write_gguf(merged.model, saved.path, draft / GGUF, saved.recipe.name)
    _copy(saved.path, draft, TOLD)
    _write_card(saved, draft, Format.GGUF)
    return merging.check_loaded(merged, draft, base, gguf=GGUF)


def _adapter(saved: Saved, base: Model, draft: Path) -> Difference:
    from tasks.training.exporting import merging

    _copy(saved.path, draft, tuple(file.name for file in saved.path.iterdir() if file.name != MANIFEST))
    return merging.check_copy(saved.path, draft, base, sixteen_bits(saved))


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_card(saved: Saved, draft: Path, how: Format) -> None:
    readme = (saved.path / "README.md").read_text(encoding="utf-8")
    (draft / "README.md").write_text(card(readme, how.value), encoding="utf-8")


def _need_bytes(how: Format, base: Model) -> int:
    """Room for the base model's weights in 16 bits, which four-bit files are a quarter of."""
    from tasks.training.loading import is_quantized

    stored = sum(file.stat().st_size for file in Path(base.path).glob("*.safetensors"))
    return 0 if how is Format.ADAPTER else stored * (4 if is_quantized(Path(base.path)) else 1)


def announce(difference: Difference, out: Path, say: Callable[[str], None]) -> None:
    """Where the export lies, and what loading it again showed."""
    say(f"exported: {out}")
    say(f"loaded again: logits differ from the adapter's by at most {difference.max_logit:.3g}, {difference.kl:.2g} nats")
