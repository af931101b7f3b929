"""Data and model of `amazon-ft bench train` where none are given: generated products, and on a CPU a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from flows.recipes import load_recipe
from tasks.config import Recipe
from tasks.reading.model_files import directory_model
from tasks.refs import Model, Tokenizer

GPU_ROWS, CPU_ROWS = 20_000, 200
"""Products to generate."""
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_model(tokenizer: Path, directory: Path) -> Model:
    """A random Llama of a few megabytes with a real tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    shutil.copytree(tokenizer, directory, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "manifest.json"))
    size = len(AutoTokenizer.from_pretrained(str(directory)))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=size, **TINY)).save_pretrained(directory)
    return directory_model(directory, name="tiny random Llama")


def make_data(recipe: Recipe, tokenizer: Tokenizer, directory: Path) -> Path:
    """packs.arrow and texts.json of the recipe's products, generated or read, by its own stages."""
    from datasets import Dataset

    from tasks.catalogue import catalogue
    from tasks.ingest import ingest
    from tasks.pack import pack
    from tasks.reading.sources import locate_source
    from tasks.sample import sample
    from tasks.sharegpt import sharegpt
    from tasks.template import template
    from tasks.tokenize import tokenize

    assert recipe.pack, "a bench recipe packs"
    generated = recipe.catalogue is not None
    source = catalogue.execute({"config": recipe.catalogue}) if generated else locate_source(recipe.ingest.sources)
    products = ingest.execute({"source": source, "config": recipe.ingest})
    split = sample.execute({"products": products, "config": recipe.sample})
    conversations = sharegpt.execute({"split": split, "config": recipe.sharegpt})
    texts = template.execute({"conversations": conversations, "special": tokenizer.special, "config": recipe.template})
    tokens = tokenize.execute({"texts": texts, "tokenizer": tokenizer, "config": recipe.tokenize})
    packs = pack.execute({"tokens": tokens.train, "config": recipe.pack})
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(packs / "packs.arrow", directory / "packs.arrow")
    rows: Any = Dataset.from_file(str(texts.train / "texts.arrow"))
    (directory / "texts.json").write_text(json.dumps(rows["text"][:]))
    return directory


def bench_recipe(device: str) -> Recipe:
    """Recipe `fast` on generated products; on a CPU with short packs."""
    rows = GPU_ROWS if device == "cuda" else CPU_ROWS
    products = [f"catalogue.rows={rows}", "catalogue.malformed_lines=0", f"sample.rows={rows // 2}", "sample.eval_rows=0"]
    short = [] if device == "cuda" else ["pack.tokens=512", "tokenize.max_tokens=512", "tokenize.max_affected_share=1"]
    return load_recipe("fast", ["ingest.sources=[]", f"device={device}", *products, *short])
