"""One training under a clock, in a process of its own: the document's own code, or this project's.

python -m tests.bench.gpu_train document|ours REQUEST.json      prints a line `RESULT {...}`; see Request and Clock.result
python -m tests.bench.gpu_train alternate REQUEST.json          both, round by round on one loaded model
python -m tests.bench.gpu_train plain REQUEST.json ADAPTER      the adapter in plain libraries

Both get the same rows: `texts.json`, which the document's trainer tokenizes, and `tokens.arrow`, the same texts tokenized.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

STARTED = psutil.Process().create_time()
SKIPPED_STEPS = 5
"""Left out of the mean: they compile and warm up."""
ROUNDS = ("document", "ours", *("ours", "document", "document", "ours") * 3)
"""Of `alternate`; the first two compile, and count for nothing."""
SKIPPED_OF_ROUND = 2
LOGIT_ROWS, LOGIT_TOKENS = 2, 256


@dataclass(frozen=True)
class Request:
    """What to train."""

    model: str
    rows: str
    """Directory with texts.json and tokens.arrow."""
    steps: int
    device: str
    work: str
    """Directory for checkpoints, compiled code and logits.pt."""
    warmup_steps: int
    logging_steps: int = 10
    seed: int = 3407


@dataclass
class Clock:
    """Notes when each step began and ended, and how many tokens carried text."""

    began: float = 0.0
    ends: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Of each micro-step."""

    def attach(self, trainer: Any) -> None:
        """Watch a transformers.Trainer."""
        import torch
        from transformers import TrainerCallback

        clock, collate = self, trainer.data_collator

        class Ticking(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock.began = clock.began or time.time()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                clock.ends.append(time.time())

        def counting(rows: Any) -> Any:
            batch = collate(rows)
            mask = batch.get("attention_mask")
            self.tokens.append(int(mask.sum()) if mask is not None else batch["input_ids"].numel())
            return batch

        trainer.data_collator = counting
        trainer.add_callback(Ticking())

    def result(self, trainer: Any) -> dict[str, Any]:
        """Seconds, tokens and memory of the training."""
        import torch

        accumulation = trainer.args.gradient_accumulation_steps
        steps = len(self.ends)
        tokens = [sum(self.tokens[step * accumulation : (step + 1) * accumulation]) for step in range(steps)]
        skipped = min(SKIPPED_STEPS, steps - 1)
        seconds = [end - start for start, end in zip([self.began, *self.ends], self.ends, strict=False)]
        counted = sum(seconds[skipped:])
        cuda = torch.cuda.is_available()
        return {
            "seconds_to_first_step": round(self.began - STARTED, 2),
            "seconds_of_steps": [round(second, 4) for second in seconds],
            "seconds_per_step": round(counted / (steps - skipped), 4),
            "tokens_of_steps": tokens,
            "tokens_per_second": round(sum(tokens[skipped:]) / counted, 1),
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None,
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3) if cuda else None,
        }


def document(request: Request, clock: Clock) -> dict[str, Any]:
    """The document's training, its items 7 to 10, but for arguments that current TRL names otherwise."""
    model, tokenizer = document_model(request)
    trainer = train_document(request, model, tokenizer, clock)
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    result = {name: [entry[name] for entry in logs] for name in ("loss", "grad_norm", "learning_rate")}
    adapter = Path(request.work, "adapter")
    trainer.save_model(str(adapter))
    tokenizer.save_pretrained(str(adapter))
    return result | clock.result(trainer) | {"first_ids": trainer.train_dataset[0]["input_ids"][:4]}


def document_model(request: Request) -> tuple[Any, Any]:
    """The document's model with its adapter, and its tokenizer."""
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        request.model, max_seq_length=2048, dtype=None, load_in_4bit=True, local_files_only=True
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
    return model, tokenizer


def train_document(request: Request, model: Any, tokenizer: Any, clock: Clock) -> Any:
    """Train as the document does; the trainer."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    cuda = request.device == "cuda"
    bfloat16 = cuda and torch.cuda.is_bf16_supported()
    config = SFTConfig(
        output_dir=request.work,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=request.warmup_steps,
        max_steps=request.steps,
        num_train_epochs=3,
        learning_rate=2e-4,
        bf16=bfloat16,
        fp16=cuda and not bfloat16,
        use_cpu=not cuda,
        logging_steps=request.logging_steps,
        optim="adamw_8bit" if cuda else "adamw_torch",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=request.seed,
        report_to="none",
        dataset_text_field="text",
        max_length=2048,
        packing=False,
        dataset_num_proc=2,
        save_strategy="no",
    )
    texts = json.loads(Path(request.rows, "texts.json").read_text())
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=Dataset.from_dict({"text": texts}), args=config)
    clock.attach(trainer)
    trainer.train()
    return trainer


def ours(request: Request, clock: Clock) -> dict[str, Any]:
    """The unsloth backend with the recipe as-written, and the logits of the model that it trained."""
    from tasks.training import unsloth
    from tasks.training.watch import read_log

    job, library = our_job(request), unsloth.import_unsloth()
    model, tokenizer = unsloth.load(job)
    model = unsloth.attach_unsloth_adapter(model, job.config.lora, job.resolved.gradient_checkpointing)
    trainer = train_ours(job, model, tokenizer, clock)
    records = read_log(job.work / "train_log.jsonl")
    logged = {name: [getattr(record, name) for record in records] for name in ("loss", "grad_norm", "learning_rate")}
    result = clock.result(trainer) | logged | {"first_ids": trainer.train_dataset[0]["input_ids"][:4]}
    save_logits(trainer.model, request)
    return result | {"adapter": str(job.work / f"checkpoint-{request.steps}"), "unsloth": library.__version__}


def our_job(request: Request) -> Any:
    """What the stage finetune would ask its backend for, with the recipe as-written."""
    from flows.recipes import load_recipe
    from tasks.reading.model_files import directory_model
    from tasks.training import hardware
    from tasks.training.backend import Job

    settings = {
        "max_steps": request.steps,
        "warmup_steps": request.warmup_steps,
        "logging_steps": request.logging_steps,
        "save_steps": request.steps + -request.steps % request.logging_steps,
        "seed": request.seed,
    }
    recipe = load_recipe("as-written", [f"finetune.{name}={value}" for name, value in settings.items()])
    weights = recipe.model.weights
    if request.device == "cpu":
        weights = weights.model_copy(update={"dtype": "float32"})
    return Job(
        model=directory_model(Path(request.model), name="measured"),
        batches=Path(request.rows, "tokens.arrow"),
        packed=False,
        config=recipe.finetune,
        max_tokens=recipe.tokenize.max_tokens,
        resolved=hardware.resolve(recipe.finetune, weights, request.device),
        work=Path(request.work),
    )


def train_ours(job: Any, model: Any, tokenizer: Any, clock: Clock) -> Any:
    """Train as the backends do; the trainer."""
    from tasks.training.trainer import make_sft_trainer, run_trainer

    trainer = make_sft_trainer(job, model, tokenizer, {"max_length": job.max_tokens})
    clock.attach(trainer)
    run_trainer(job, trainer)
    return trainer


def alternate(request: Request) -> dict[str, Any]:
    """Seconds a step of both sides in turn, in one process on one loaded model, so that only their code differs.

    The adapter goes on through all rounds; the model's logits are kept, and the adapter that gave them.
    """
    model, tokenizer = document_model(request)
    seconds: dict[str, list[list[float]]] = {"document": [], "ours": []}
    tokens: dict[str, list[int]] = {}
    for number, side in enumerate(ROUNDS):
        clock, here = Clock(), replace(request, work=str(Path(request.work, f"round-{number}")))
        Path(here.work).mkdir(parents=True, exist_ok=True)
        if side == "document":
            trainer = train_document(here, model, tokenizer, clock)
        else:
            trainer = train_ours(our_job(here), model, tokenizer, clock)
        result = clock.result(trainer)
        tokens.setdefault(side, result["tokens_of_steps"])
        if number >= len(seconds):
            seconds[side].append(result["seconds_of_steps"][SKIPPED_OF_ROUND:])
    model.save_pretrained(str(adapter := Path(request.work, "adapter")))
    save_logits(model, request)
    medians = {side: statistics.median(step for steps in rounds for step in steps) for side, rounds in seconds.items()}
    return {
        "seconds_of_steps": seconds,
        "median_seconds_per_step": medians,
        "step_time_ratio": round(medians["ours"] / medians["document"], 4),
        "step_time_ratio_by_pair": [
            round(statistics.median(mine) / statistics.median(theirs), 4)
            for theirs, mine in zip(seconds["document"], seconds["ours"], strict=True)
        ],
        "same_tokens_each_step": tokens["ours"] == tokens["document"],
        "adapter": str(adapter),
    }


def save_logits(model: Any, request: Request) -> None:
    """logits.pt: what the model says to the first rows."""
    import torch

    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    model.eval()
    found = []
    with torch.inference_mode():
        for ids in first_rows(request.rows):
            inputs = torch.tensor([ids], device=request.device)
            output = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False)
            found.append(output.logits[0].float().cpu())
    torch.save(found, Path(request.work, "logits.pt"))


def first_rows(rows: str) -> list[list[int]]:
    """Ids of the rows whose logits are compared."""
    import pyarrow as pa

    with pa.memory_map(str(Path(rows, "tokens.arrow"))) as source:
        table = pa.ipc.open_stream(source).read_all().slice(0, LOGIT_ROWS)
    return [ids[:LOGIT_TOKENS] for ids in table["input_ids"].to_pylist()]


def plain(request: Request, adapter: str) -> dict[str, Any]:
    """How far plain transformers, PEFT and bitsandbytes are from the logits of the training process, with the saved adapter."""
    import torch
    from peft import PeftModel

    from tasks.training.hardware import resolve_dtype
    from tasks.training.loading import load_base

    cuda = request.device == "cuda"
    dtype = resolve_dtype("auto", request.device)
    model = PeftModel.from_pretrained(
        load_base(Path(request.model), dtype, load_in_4bit=True, device=request.device), adapter, torch_device=request.device
    ).eval()
    trained = torch.load(Path(request.work, "logits.pt"))
    off, base_off, agree, count = 0.0, 0.0, 0, 0
    for ids, there in zip(first_rows(request.rows), trained, strict=True):
        inputs = torch.tensor([ids], device="cuda" if cuda else "cpu")
        with torch.inference_mode():
            here = model(input_ids=inputs).logits[0].float().cpu()
            with model.disable_adapter():
                base = model(input_ids=inputs).logits[0].float().cpu()
        off = max(off, float((here - there).abs().max()))
        base_off = max(base_off, float((base - there).abs().max()))
        agree, count = agree + int((here.argmax(-1) == there.argmax(-1)).sum()), count + len(ids)
    largest = max(float(there.abs().max()) for there in trained)
    return {
        "max_abs_difference": round(off, 5),
        "max_abs_difference_without_the_adapter": round(base_off, 5),
        "largest_logit": round(largest, 4),
        "same_best_token": f"{agree} of {count}",
    }


def main() -> None:
    kind, request = sys.argv[1], Request(**json.loads(Path(sys.argv[2]).read_text()))
    Path(request.work).mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(Path(request.work, "compiled")),
    }
    if kind == "plain":
        result = plain(request, sys.argv[3])
    elif kind == "alternate":
        result = alternate(request)
    else:
        result = {"document": document, "ours": ours}[kind](request, Clock())
    print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
