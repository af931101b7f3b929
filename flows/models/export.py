"""amazon-ft export: a saved model in the form that others take, checked by loading it again; and to the Hub.

adapter         a copy of the saved directory, in PEFT's format
merged-16bit    adapter and base model as one transformers model, in bfloat16 or float16
gguf            the same as one file for llama.cpp, Ollama and LM Studio, in 16 bits or 8, with a Modelfile
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import yaml

from flows.choices import Bits, Format
from flows.models.saved import Saved
from flows.reports.results import read_lines
from tasks.caching.files import space_checked
from tasks.caching.manifest import MANIFEST
from tasks.reading.model_files import TOKENIZER, read_json
from tasks.refs import ConfigError, InputError, Model, PipelineError

if TYPE_CHECKING:
    from tasks.training.exporting.llama_cpp import Agreement
    from tasks.training.exporting.merging import Difference

TOKEN = "HF_TOKEN"
GGUF = "model.gguf"
MODELFILE = "Modelfile"
TOLD = ("lineage.json", "recipe.yaml", "metrics.json", "generations.jsonl", "LICENSE", "NOTICE")
USE = {
    "merged-16bit": (
        "transformers",
        """from transformers import pipeline

generate = pipeline("text-generation", model=".", dtype="auto")
print(generate([{"role": "user", "content": "..."}], max_new_tokens=128)[0]["generated_text"][-1]["content"])""",
    ),
    "gguf": ("gguf", "# llama-cli -m model.gguf --jinja\n# ollama create mine -f Modelfile"),
}
"""{format: (library_name of its card, how to use it)}."""


@dataclass(frozen=True)
class Exported:
    """An export, and how it was found to answer."""

    difference: Difference
    agreement: Agreement | None = None
    """With llama.cpp, if it was asked."""


@dataclass(frozen=True)
class GgufOptions:
    """How to write a GGUF file."""

    bits: Bits | None = None
    """Else the model's own 16."""
    check: bool = False
    """Ask it the held-out questions in llama.cpp."""


DEFAULT = GgufOptions()


def export_model(saved: Saved, how: Format, out: Path, options: GgufOptions = DEFAULT) -> Exported:
    """Write a model to a directory that is not there yet, whole or not at all; how far its answers are from the adapter's.

    Raises:
        InputError: when the directory is there, the model can't be written in this format, or the options are another format's.
        PipelineError: when what was written does not answer as the adapter does.
    """
    if out.exists():
        raise InputError(f"export {out}: is there already; expected a directory to be made. Remove it or name another.")
    if how is not Format.GGUF and options != DEFAULT:
        raise InputError(f"export --bits, --check: got format {how}; expected gguf, whose bits and answers they are.")
    base = saved.base()
    draft = out.with_name(f".{out.name}.{uuid4().hex}")
    with space_checked(draft, _need_bytes(how, base)):
        draft.mkdir(parents=True)
        try:
            if how is Format.GGUF:
                exported = _gguf(saved, base, draft, options)
            else:
                exported = Exported({Format.MERGED: _merged, Format.ADAPTER: _adapter}[how](saved, base, draft))
            draft.rename(out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return exported


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


def _gguf(saved: Saved, base: Model, draft: Path, options: GgufOptions) -> Exported:
    from transformers import AutoConfig, AutoTokenizer

    from tasks.training.exporting import gguf, merging, modelfile
    from tasks.training.exporting.architectures import architecture_of

    config = AutoConfig.from_pretrained(base.path, local_files_only=True)
    gguf.check_exportable(config, saved.path)
    merged = merging.merge(saved.path, base, sixteen_bits(saved))
    bits: gguf.Bits = options.bits.name if options.bits else gguf.own_bits(merged.model)
    gguf.write_gguf(merged.model, saved.path, draft / GGUF, saved.recipe.name, bits)
    tokenizer = AutoTokenizer.from_pretrained(saved.path, local_files_only=True)
    (draft / MODELFILE).write_text(modelfile.make_modelfile(tokenizer, GGUF), encoding="utf-8")
    _copy(saved.path, draft, TOLD)
    _write_card(saved, draft, Format.GGUF)
    agreement = _ask_llama_cpp(saved, merged.model, tokenizer, draft) if options.check else None
    gguf.round_matrices(merged.model, bits)
    rereadable = architecture_of(config).rereadable
    found = merging.check_loaded(merged, draft, base, gguf=GGUF) if rereadable else merging.check_merged(merged, base)
    return Exported(found, agreement)


def _ask_llama_cpp(saved: Saved, model: Any, tokenizer: Any, draft: Path) -> Agreement | None:
    """The held-out questions asked in llama.cpp too; what came of it goes into metrics.json and the card."""
    from tasks.training.exporting import llama_cpp

    if not llama_cpp.has_runtime():
        return None
    prompts = [str(said["prompt"]) for said in read_lines(saved.path / "generations.jsonl")]
    found = llama_cpp.compare_answers(draft / GGUF, model, tokenizer, prompts, saved.recipe.evaluate.max_new_tokens)
    metrics = read_json(draft / "metrics.json") | {"llama_cpp": found.model_dump()}
    (draft / "metrics.json").write_text(json.dumps(metrics, indent=1, ensure_ascii=False), encoding="utf-8")
    with (draft / "README.md").open("a", encoding="utf-8") as card:
        card.write(f"\n{describe_agreement(found)}\n")
    return found


def describe_agreement(found: Agreement) -> str:
    """How an export answers in llama.cpp, in a sentence."""
    differs = f"; {found.first_difference}" if found.first_difference else ""
    return (
        f"In llama.cpp ({found.runtime}) {found.same_tokens} of {found.prompts} held-out prompts have the same tokens, and "
        f"{found.same_answers} of {found.prompts} greedy answers the same token ids as in transformers{differs}."
    )


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


def announce(exported: Exported, out: Path, say: Callable[[str], None], *, check: bool = False) -> None:
    """Where the export lies, and what loading it again showed."""
    difference = exported.difference
    say(f"exported: {out}")
    how = "loaded again" if difference.loaded else "merged (transformers reads no GGUF of this family)"
    say(f"{how}: logits differ from the adapter's by at most {difference.max_logit:.3g}, {difference.kl:.2g} nats")
    if exported.agreement:
        say(describe_agreement(exported.agreement))
    elif check:
        say('llama.cpp: not asked, for no runtime is installed here: pip install "amazon-ft[llamacpp]", then export again')
