"""The model card: Hub metadata, numbers of base and tuned model, and a snippet that runs. Pure.

Source of the metadata: https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from tasks.refs import Model

LICENSES = {"smollm2": "apache-2.0", "llama-3": "llama3"}
"""By what the base model's name contains."""

SNIPPET = """from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter = Path(".")  # this directory
base = {base}
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base{revision}, dtype="auto"), adapter)

messages = [{{"role": "user", "content": {prompt}}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=128, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def model_card(name: str, model: Model, recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """README.md of a saved model."""
    front = yaml.safe_dump(metadata(model, recipe), sort_keys=True, allow_unicode=True)
    return f"""---
{front}---

# {name}

A LoRA adapter for `{model.name}`, trained by recipe `{recipe.get("name", "")}` of amazon-ft to describe a
product from its title. Settings: `recipe.yaml`. Where it comes from, to the byte: `lineage.json`.

## Held-out products

{comparison(metrics)}

Both models' answers lie side by side in `generations.jsonl`.

## Use

```python
{snippet(model, example_prompt(recipe))}
```
"""


def metadata(model: Model, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What the Hub reads of a card."""
    generated = recipe.get("catalogue") is not None
    known = (licence for part, licence in LICENSES.items() if part in model.name.lower())
    return {
        "base_model": model.name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "language": ["pt", "en"],
        "license": next(known, "other"),
        "tags": ["amazon-ft", "lora", "sft", "product-descriptions"],
        "datasets": ["generated-catalogue" if generated else "AmazonTitles-1.3MM"],
    }


def comparison(metrics: Mapping[str, Any]) -> str:
    """A table of every number that both models have.

    >>> print(comparison({"base": {"nll": 2.5}, "tuned": {"nll": 0.125}, "rows": 9}))
    | | base | tuned |
    |---|---|---|
    | nll | 2.5 | 0.125 |
    """
    base, tuned = metrics.get("base") or {}, metrics.get("tuned") or {}
    names = [name for name in base if isinstance(base[name], (int, float)) and isinstance(tuned.get(name), (int, float))]
    if not names:
        return "Nothing was held out, so there is no number to judge it by."
    rows = [f"| {name.replace('_', ' ')} | {base[name]:.4g} | {tuned[name]:.4g} |" for name in names]
    return "\n".join(["| | base | tuned |", "|---|---|---|", *rows])


def snippet(model: Model, prompt: str) -> str:
    """Python that loads the adapter with plain peft and transformers and asks it."""
    revision = f', revision="{model.digest.split("@")[1]}"' if model.digest.startswith("hub:") else ""
    return SNIPPET.format(base=_base(model), revision=revision, prompt=repr(prompt))


def example_prompt(recipe: Mapping[str, Any]) -> str:
    """A prompt of the form that the model was trained on.

    >>> example_prompt({"sharegpt": {"merged_prompt": "Título do produto: {title}"}})
    'Título do produto: Girls Ballet Tutu Neon Pink'
    """
    title = "Girls Ballet Tutu Neon Pink" if recipe.get("catalogue") is None else "Aurora Brushed Tray 15 cm"
    return str(recipe.get("sharegpt", {}).get("merged_prompt", "{title}")).replace("{title}", title)


def _base(model: Model) -> str:
    """The expression that finds the base model; no absolute path, so that the card moves with its root."""
    if model.artifact is not None:
        folder = f"{model.artifact.kind}/{model.artifact.digest[:32]}"
        return f'adapter.resolve().parents[1] / "{folder}"  # {model.name}, fetched by amazon-ft'
    if model.digest.startswith("hub:"):
        return repr(model.name)
    return f"{model.name!r}  # the directory of the base model that it was trained on"


__all__ = ["comparison", "example_prompt", "metadata", "model_card", "snippet"]
