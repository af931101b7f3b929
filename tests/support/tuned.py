"""A saved model made by the real save stage of a tiny base model and an adapter that changes what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flows.recipes import load_recipe
from tasks.caching.store import publish
from tasks.config import SaveConfig
from tasks.reading.model_files import directory_model
from tasks.refs import Adapter, Artifact, Evaluation, Lineage, SavedModel, Special
from tasks.save import publish_link, save
from tasks.template import describe_template, parse_template
from tests.support.tiny import BOS, EOS

SCORES = {"nll": 3.5, "perplexity": 33.1}, {"nll": 0.25, "perplexity": 1.284}
METRICS: dict[str, Any] = {
    "rows": 2,
    "tokens": 9,
    "base": SCORES[0],
    "tuned": SCORES[1],
    "per_row": [{"uids": [f"u{row}"], "tokens": 4, "base_nll": 3.5, "tuned_nll": row / 4} for row in range(2)],
}


def artifact_of(kind: str, files: dict[str, str | bytes], rows: int = 1) -> Artifact:
    """An artifact with these files."""
    with publish(kind) as draft:
        for name, content in files.items():
            (draft / name).write_bytes(content.encode() if isinstance(content, str) else content)
        draft.rows = rows
    return draft.artifact


def make_tiny_adapter(base: Path, path: Path) -> Path:
    """A LoRA adapter with random weights for a model's directory."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(path)
    return path


def save_tuned(base: Path, adapter: Path, **overrides: str) -> SavedModel:
    """Save it and link it as models/demo/unsloth_model_optimized; the recipe names the base model's directory."""
    settings = {"model.id": str(base), "evaluate.max_new_tokens": "6", **overrides}
    recipe = load_recipe("demo", [f"{key}={value}" for key, value in settings.items()])
    model = directory_model(base, name="org/tiny")
    special = Special(bos=BOS, eos=EOS)
    template = describe_template(parse_template(recipe.template.chat_template, special), special, recipe.template)
    names = ("adapter_model.safetensors", "adapter_config.json")
    said = [{"uid": f"u{row}", "prompt": "What?", "reference": "A pan.", "base": "?", "tuned": "A pan."} for row in range(2)]
    saved = save.fn(
        Adapter(
            data=artifact_of("adapter", {name: (adapter / name).read_bytes() for name in names}),
            log=artifact_of("training-log", {"train_log.jsonl": "", "resolved.json": "{}"}),
        ),
        Evaluation(
            data=artifact_of(
                "evaluation",
                {"metrics.json": json.dumps(METRICS), "generations.jsonl": "".join(f"{json.dumps(row)}\n" for row in said)},
            )
        ),
        artifact_of("template", {"template.json": json.dumps(template)}),
        model,
        model.tokenizer,
        model.name,
        SaveConfig(),
        Lineage(name=recipe.name, recipe=recipe.model_dump(mode="json")),
    )
    publish_link(saved, "demo")
    return saved
