"""The document's training as written, on given texts; ends with one line of JSON.

usage: python -m flows.bench.train_document MODEL_DIR TEXTS_JSON DEVICE STEPS WINDOWS      needs unsloth

Items 7 to 9 of the document (README.md, "The recipe"), with the arguments that current TRL has renamed.
"""
# ruff: noqa: I001  # unsloth must come first, and the environment before it
# pyright: basic, reportOptionalCall=false, reportMissingImports=false

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import mkdtemp

import psutil

STARTED = psutil.Process().create_time()
model_dir, texts_json, device, steps, windows = sys.argv[1:]
window, timed = int(steps), int(windows)
os.environ.update(HF_HUB_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_COMPILE_LOCATION=mkdtemp())
ACCUMULATION = 4
gpu = device == "cuda"

with redirect_stdout(sys.stderr):
    from unsloth import FastLanguageModel
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]  # where Unsloth puts its own

    from tasks.training.hardware import peak_gib

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_dir, max_seq_length=2048, dtype=None, load_in_4bit=True, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth",
        random_state=3407,
        use_rslora=False,
    )
    ends: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        """Notes when each step was done."""

        def on_step_end(self, *_: object, **__: object) -> None:
            """Wait for the device and look at the clock."""
            if gpu:
                torch.cuda.synchronize()
            ends.append(time.time())

    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": json.loads(Path(texts_json).read_text())}),
        args=SFTConfig(
            output_dir=mkdtemp(),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=ACCUMULATION,
            warmup_steps=2,
            max_steps=window * (timed + 1),
            learning_rate=2e-4,
            bf16=gpu,
            use_cpu=not gpu,
            logging_steps=10,
            optim="adamw_8bit" if gpu else "adamw_torch",
            weight_decay=0.01,
            lr_scheduler_type="linear",
            seed=3407,
            report_to="none",
            dataset_text_field="text",
            max_length=2048,
            packing=False,
            dataset_num_proc=2,
            save_strategy="no",
            disable_tqdm=True,
        ),
        callbacks=[Clock()],
    )
    collate = trainer.data_collator

    def counting(rows: list[dict[str, object]]) -> dict[str, object]:
        """Collate and note how many tokens carry text."""
        batch = collate(rows)
        mask = batch.get("attention_mask")
        tokens.append(int(mask.sum()) if mask is not None else batch["input_ids"].numel())
        return batch

    trainer.data_collator = counting
    trainer.train()

of_step = [sum(tokens[start : start + ACCUMULATION]) for start in range(0, len(tokens), ACCUMULATION)]
speeds = [
    sum(of_step[start : start + window]) / (ends[start + window - 1] - ends[start - 1])
    for start in range(window, window * (timed + 1), window)
]
found = {
    "windows": [round(speed, 1) for speed in speeds],
    "peak_gib": peak_gib(device),
    "seconds_to_first_step": round(ends[0] - STARTED, 1),
    "seconds_a_step": round((ends[-1] - ends[window - 1]) / (window * timed), 4),
    "tokens_a_step": round(sum(of_step[window : window * (timed + 1)]) / (window * timed)),
}
sys.stdout.write(json.dumps(found) + "\n")
