"""The document's data steps as written, with the libraries that it names; prints {step: seconds} as JSON.

usage: python -m flows.bench.document SOURCE TOKENIZER_DIR TURNS CONVERSATIONS CACHE_DIR     needs unsloth, datasets, transformers

Steps 2 to 5 of the document, then tokenizing as its trainer does, with two processes.
"""
# ruff: noqa: E402, I001  # unsloth must come first, and the environment before it
# pyright: basic, reportOptionalCall=false, reportMissingImports=false

from __future__ import annotations

import os
import sys
import time

source, tokenizer_directory, turns, rows, cache = sys.argv[1:]
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=cache, UNSLOTH_DISABLE_STATISTICS="1")

seconds: dict[str, float] = {}
begin = last = time.perf_counter()


def lap(name: str) -> None:
    """Note how long the step took."""
    global last
    seconds[name], last = time.perf_counter() - last, time.perf_counter()


from unsloth.chat_templates import apply_chat_template, standardize_sharegpt, to_sharegpt
from datasets import load_dataset
from transformers import AutoTokenizer

from flows.bench.ours import told
from tasks.config import CHAT_TEMPLATE

lap("import")
dataset = load_dataset("json", data_files={"train": source})
lap("load_dataset")
dataset = dataset["train"].shuffle(seed=42).select(range(int(rows)))
lap("shuffle, select")
dataset = to_sharegpt(
    dataset,
    merged_prompt="Título do produto: {title}",
    output_column_name="content",
    conversation_extension=int(turns),
)
lap("to_sharegpt")
dataset = standardize_sharegpt(dataset)
lap("standardize_sharegpt")
tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
lap("tokenizer")
dataset = apply_chat_template(dataset, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)
lap("apply_chat_template")
dataset.map(
    lambda batch: tokenizer(batch["text"], truncation=True, max_length=2048),
    batched=True,
    num_proc=2,  # pyright: ignore[reportCallIssue]  # Dataset, not DatasetDict
    remove_columns=dataset.column_names,
)
lap("tokenize")
sys.stdout.write(told(seconds) + "\n")
