"""The model card: Hub metadata, numbers of base and tuned model, and a snippet that runs. Pure.

Source of the metadata: https://huggingface.co/docs/hub/model-cards#model-card-metadata
Source of model-index: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

from tasks.refs import Model

LICENSES = {"smollm2": "apache-2.0", "llama-3": "llama3"}
"""By what the base model's name contains."""

FIGURES = {
    "nll": "nats per token",
    "perplexity": "perplexity",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "length_ratio": "words, answers to references",
    "repetition": "repeated runs of 4 words, share",
    "ends": "answers that end, share",
    "copies_title": "answers that hold the title, share",
}
"""{number of metrics.json: its name}, in the card's order."""
HUB_METRICS = {
    "perplexity": "perplexity",
    "rouge1": "rouge",
    "rouge2": "rouge",
    "rougeL": "rouge",
    "bleu": "bleu",
    "chrf": "chrf",
}
"""Numbers that the Hub knows, and its names for them."""

AMAZON = re.compile(r"trn\.json|LF-Amazon", re.IGNORECASE)
"""The names under which the document's data is distributed."""

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


ORIGINS = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Models whose weights are not the Hub's own, and the Hub's that they were made of: it lists a card below that one."""


def model_card(name: str, model: Model, recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """README.md of a saved model."""
    front = yaml.safe_dump(metadata(model, recipe) | index(name, recipe, metrics), sort_keys=True, allow_unicode=True)
    return f"""---
{front}---

# {name}

A LoRA adapter for `{model.name}`, trained by recipe `{recipe.get("name", "")}` of amazon-ft to {_task(recipe)}. \
Settings: `recipe.yaml`. Where it comes from, to the byte: `lineage.json`.

## Held-out {"conversations" if _converses(recipe) else "products"}

{comparison_table(metrics)}

In brackets: the 95 % interval, by bootstrap over the {metrics.get("rows", 0):,} held-out rows. Both models' answers lie side by
side in `generations.jsonl`.

## Use

```python
{snippet(model, example_prompt(recipe))}
```
"""


def metadata(model: Model, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The front matter that the Hub reads of a card."""
    known = (licence for part, licence in LICENSES.items() if part in model.name.lower())
    return {
        "base_model": ORIGINS.get(model.name, model.name),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "language": ["pt", "en"],
        "license": next(known, "other"),
        "tags": ["amazon-ft", "lora", "sft", "product-descriptions"],
        "datasets": [_data(recipe)],
    }


def index(name: str, recipe: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The tuned model's numbers as the Hub reads them; nothing where there are none."""
    tuned = metrics.get("tuned") or {}
    known = {figure: tuned[figure] for figure in HUB_METRICS if math.isfinite(tuned.get(figure, math.nan))}
    if not known:
        return {}
    results = {
        "task": {"type": "text-generation", "name": "Text Generation"},
        "dataset": {"type": _data(recipe).lower(), "name": _data(recipe), "split": "held-out"},
        "metrics": [{"type": HUB_METRICS[figure], "name": FIGURES[figure], "value": value} for figure, value in known.items()],
    }
    return {
        "metrics": list(dict.fromkeys(HUB_METRICS[figure] for figure in known)),
        "model-index": [{"name": name, "results": [results]}],
    }


def comparison_table(metrics: Mapping[str, Any]) -> str:
    """A table of every number that both models have, with its 95 % interval where it has one.

    >>> base, tuned = {"nll": 2.5, "nll_low": 2.25, "nll_high": 3.0}, {"nll": 0.125, "nll_low": 0.1, "nll_high": 0.2}
    >>> print(comparison_table({"base": base, "tuned": tuned, "rows": 9}))
    | | base | tuned |
    |---|---|---|
    | nats per token | 2.5 (2.25 to 3) | 0.125 (0.1 to 0.2) |
    """
    base, tuned = metrics.get("base") or {}, metrics.get("tuned") or {}
    names = [name for name in FIGURES if name in base and name in tuned]
    if not names:
        return "Nothing was held out, so there is no number to judge it by."
    rows = [f"| {FIGURES[name]} | {_figure(base, name)} | {_figure(tuned, name)} |" for name in names]
    return "\n".join(["| | base | tuned |", "|---|---|---|", *rows])


def _figure(numbers: Mapping[str, float], name: str) -> str:
    interval = [numbers.get(f"{name}_{end}") for end in ("low", "high")]
    shown = "" if None in interval else f" ({interval[0]:.4g} to {interval[1]:.4g})"
    return f"{numbers[name]:.4g}{shown}"


def _converses(recipe: Mapping[str, Any]) -> bool:
    return recipe.get("ingest", {}).get("kind", "products") not in ("auto", "products")


def _task(recipe: Mapping[str, Any]) -> str:
    """The task that the model was trained for; broken as the card's lines are."""
    return "answer as the\nassistant of its conversations does" if _converses(recipe) else "describe a\nproduct from its title"


def _data(recipe: Mapping[str, Any]) -> str:
    """A name for the data: the document's, the catalogue's, or that of the user's own file.

    >>> _data({"ingest": {"sources": ["data/LF-Amazon-1.3M.raw.zip"]}}), _data({"ingest": {"sources": ["my/products.csv.gz"]}})
    ('AmazonTitles-1.3MM', 'products')
    """
    if recipe.get("catalogue") is not None:
        return "generated-catalogue"
    sources = [source.rstrip("/").rpartition("/")[2] for source in recipe.get("ingest", {}).get("sources", ())]
    if not sources or any(AMAZON.match(name) for name in sources):
        return "AmazonTitles-1.3MM"
    return sources[0].split(".")[0] or "own-data"


def snippet(model: Model, prompt: str) -> str:
    """Python that loads the adapter with plain peft and transformers and asks it."""
    revision = f', revision="{model.digest.split("@")[1]}"' if model.digest.startswith("hub:") else ""
    return SNIPPET.format(base=_base(model), revision=revision, prompt=repr(prompt))


def example_prompt(recipe: Mapping[str, Any]) -> str:
    """A prompt of the form that the model was trained on.

    >>> example_prompt({"sharegpt": {"merged_prompt": "Título do produto: {title}"}})
    'Título do produto: Girls Ballet Tutu Neon Pink'
    """
    if _converses(recipe):
        return "..."
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
