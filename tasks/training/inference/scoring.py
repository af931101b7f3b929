"""Asks a base model, or its tuned self, how likely the held-out answers are and what it would say.

Plain transformers and PEFT are used, whichever backend trained. It runs in a process of its own:

    python -m tasks.training.inference.scoring REQUEST.json RESULT.json
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from tasks.caching.code.loading import collect_rarely
from tasks.refs import Model, PipelineError, Value
from tasks.training.errors import first_line, is_out_of_memory
from tasks.training.inference.likelihood import batches, row_nll
from tasks.training.loading import load_base, load_tokenizer

UNSLOTH_MARK = "UNSLOTH_IS_PRESENT"
"""Unsloth sets it in the environment when it is imported. Source: unsloth/__init__.py, 2026.10.9."""
PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2): the kernel ends the process when its parent dies."""


class Request(Value):
    """The model to load, and the questions to ask it."""

    model: Model
    adapter: str | None
    """A directory in PEFT's format; None asks the base model."""
    dtype: str
    load_in_4bit: bool
    device: str
    input_ids: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]
    """-100 where a token does not count."""
    prompts: tuple[str, ...]
    """Texts to go on from."""
    max_new_tokens: int
    batch_size: int


class Answers(Value):
    """The model's answers to a request; a ruined adapter's figures may be no numbers."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    nll: tuple[float, ...] = ()
    """Negative log-likelihood of each row's labelled tokens, summed, in nats."""
    texts: tuple[str, ...] = ()
    """A greedy answer to each prompt."""
    ended: tuple[bool, ...] = ()
    """Whether the answer came to its end, by EOS."""
    ends_at_once: tuple[float, ...] = ()
    """The probability that the answer to each prompt is empty."""


class Result(Value):
    """Handed back by a process of its own."""

    answers: Answers = Answers()
    out_of_memory: str | None = None
    """The library's message when memory ran out."""


def score(request: Request) -> Answers:
    """Score here, or in a fresh process where Unsloth has patched this one.

    Raises:
        PipelineError: when memory runs out.
    """
    _free_what_a_training_left(request.device)
    with _memory_errors_explained(request):
        return _score_apart(request) if UNSLOTH_MARK in os.environ else score_here(request)


def _free_what_a_training_left(device: str) -> None:
    """A trainer and its model refer to each other, so both would stay in memory beside what is loaded now."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def score_here(request: Request) -> Answers:
    """Score with the libraries as they are in this process."""
    tokenizer = load_tokenizer(request.model)
    model = load_base(Path(request.model.path), request.dtype, load_in_4bit=request.load_in_4bit, device=request.device)
    if request.adapter is not None:
        load_adapter(model, request.adapter, request.device)
    model.eval()
    said = generate(model, tokenizer, request)
    nll = row_nll(model, request.input_ids, request.labels, batch_size=request.batch_size, device=request.device)
    return said.model_copy(update={"nll": nll})


def load_adapter(model: Any, adapter: str, device: str) -> None:
    """Put an adapter's layers into a base model, in place."""
    from peft import PeftModel

    PeftModel.from_pretrained(model, adapter, torch_device=device)


def generate(model: Any, tokenizer: Any, request: Request) -> Answers:
    """A greedy answer to each prompt, whether it ended, and the probability of ending at once."""
    import torch
    from transformers import GenerationConfig

    eos = tokenizer.convert_tokens_to_ids(request.model.tokenizer.special.eos)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=request.max_new_tokens,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    model.generation_config = greedy
    texts: list[str] = []
    ended: list[bool] = []
    ends: list[float] = []
    for prompts in batches(request.prompts, request.batch_size):
        batch = tokenizer(list(prompts), add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt").to(
            request.device
        )
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.inference_mode():
            positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
            first = model(**inputs, position_ids=positions, logits_to_keep=1).logits[:, -1].float()
            ends.extend(first.softmax(dim=-1)[:, eos].tolist())
            said = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        texts.extend(tokenizer.batch_decode(said, skip_special_tokens=True))
        ended.extend((said == eos).any(dim=1).tolist())
    return Answers(texts=tuple(texts), ended=tuple(ended), ends_at_once=tuple(ends))


@contextlib.contextmanager
def _memory_errors_explained(request: Request) -> Generator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        half = max(1, request.batch_size // 2)
        raise PipelineError(
            f"evaluate: out of memory on {request.device}: got {first_line(error)}; expected the model and a batch to fit. "
            f"Set evaluate.batch_size={half} (now {request.batch_size}), lower "
            f"evaluate.max_new_tokens (now {request.max_new_tokens}) or tokenize.max_tokens."
        ) from error


def _score_apart(request: Request) -> Answers:
    with tempfile.TemporaryDirectory() as directory:
        asked, told = Path(directory, "request.json"), Path(directory, "result.json")
        asked.write_text(request.model_dump_json())
        done = subprocess.run([sys.executable, "-m", __name__, str(asked), str(told)], stdout=sys.stderr, check=False)
        if not told.is_file():
            raise PipelineError(
                f"evaluate: the scoring process ended without a result: got exit code {done.returncode}; expected 0."
            )
        result = Result.model_validate_json(told.read_bytes())
    if result.out_of_memory:
        raise MemoryError(result.out_of_memory)
    return result.answers


def score_file(asked: Path, told: Path) -> None:
    """Score a request in a process of its own, which never outlives the one that started it."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    collect_rarely()
    request = Request.model_validate_json(asked.read_bytes())
    try:
        result = Result(answers=score_here(request))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        result = Result(out_of_memory=first_line(error))
    told.write_text(result.model_dump_json())


if __name__ == "__main__":
    score_file(Path(sys.argv[1]), Path(sys.argv[2]))
