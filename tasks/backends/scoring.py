"""Asks a base model and its tuned self the same things: how likely the held-out answers are, and what they would say.

Both come from one load: PEFT switches the adapter off for the base. Plain transformers and PEFT are used whichever backend
trained, which also shows that the adapter loads there. Unsloth patches those libraries in its process, so after a training
with it the scoring runs in a process of its own:

    python -m tasks.backends.scoring REQUEST.json RESULT.json
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from tasks.backends.loading import load_base, load_tokenizer
from tasks.backends.memory import first_line, is_out_of_memory
from tasks.refs import Model, PipelineError, Value

HEAD_TOKENS = 1024
"""Positions whose logits are in memory at once; 128,256 float32 logits each with Llama-3's vocabulary, 0.5 GB."""
PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2): the kernel ends the process when its parent dies."""


class Prompt(Value):
    """A text to go on from."""

    uid: str
    text: str
    reference: str


class Request(Value):
    """What to load and what to ask."""

    model: Model
    adapter: str
    dtype: str
    load_in_4bit: bool
    device: str
    input_ids: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]
    """-100 where a token does not count."""
    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    batch_size: int


class Answers(Value):
    """What one model made of the request."""

    nll: tuple[float, ...] = ()
    """Negative log-likelihood of each row's labelled tokens, summed, in nats."""
    texts: tuple[str, ...] = ()
    """A greedy answer to each prompt."""
    ends_at_once: tuple[float, ...] = ()
    """The probability that the answer to each prompt is empty."""


class Result(Value):
    """Base and tuned model side by side."""

    base: Answers = Answers()
    tuned: Answers = Answers()
    error: str | None = None
    """What stopped the scoring, for the user."""


def score(request: Request) -> Result:
    """Score here, or in a fresh process where Unsloth has patched this one.

    Raises:
        PipelineError: when memory runs out.
    """
    _free_what_a_training_left(request.device)
    return _score_apart(request) if "unsloth" in sys.modules else score_here(request)


def _free_what_a_training_left(device: str) -> None:
    """A trainer and its model refer to each other, so both would stay in memory beside what is loaded now."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def score_here(request: Request) -> Result:
    """Score with the libraries as they are in this process."""
    from peft import PeftModel

    tokenizer = load_tokenizer(request.model)
    with _memory_errors_explained(request):
        base = load_base(Path(request.model.path), request.dtype, load_in_4bit=request.load_in_4bit, device=request.device)
        model = PeftModel.from_pretrained(base, request.adapter, torch_device=request.device).eval()
        tuned = _ask(model, tokenizer, request)
        with model.disable_adapter():
            return Result(base=_ask(model, tokenizer, request), tuned=tuned)


def _ask(model: Any, tokenizer: Any, request: Request) -> Answers:
    texts, ends = generate(model, tokenizer, request)
    return Answers(nll=row_nll(model, request), texts=texts, ends_at_once=ends)


def row_nll(model: Any, request: Request) -> tuple[float, ...]:
    """Negative log-likelihood of each row's labelled tokens, summed, in nats; rows in their order."""
    order = sorted(range(len(request.input_ids)), key=lambda row: (len(request.input_ids[row]), row))
    found: dict[int, float] = {}
    for rows in _batches(order, request.batch_size):
        sums = _batch_nll(model, [request.input_ids[row] for row in rows], [request.labels[row] for row in rows], request.device)
        found |= dict(zip(rows, sums, strict=True))
    return tuple(found[row] for row in range(len(order)))


def _batch_nll(model: Any, ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], device: str) -> list[float]:
    import torch
    from torch.nn.functional import cross_entropy

    causal = model.get_base_model()
    with torch.inference_mode():
        inputs = _padded(ids, 0, device)
        mask = _padded([[1] * len(row) for row in ids], 0, device)
        hidden = causal.get_decoder()(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        target = _padded(labels, -100, device)[:, 1:]
        picked = target != -100  # (rows, positions)
        nll = torch.zeros(target.shape, dtype=torch.float64, device=device)
        logits = (causal.get_output_embeddings()(part).float() for part in hidden[picked].split(HEAD_TOKENS))
        wanted = target[picked].split(HEAD_TOKENS)
        parts = [cross_entropy(part, ids, reduction="none").double() for part, ids in zip(logits, wanted, strict=True)]
        if parts:
            nll[picked] = torch.cat(parts)
        return [float(value) for value in nll.sum(dim=1).tolist()]


def generate(model: Any, tokenizer: Any, request: Request) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """A greedy answer to each prompt, and the probability of ending at once."""
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
    model.generation_config = model.get_base_model().generation_config = greedy
    texts: list[str] = []
    ends: list[float] = []
    for prompts in _batches(request.prompts, request.batch_size):
        batch = tokenizer(
            [prompt.text for prompt in prompts], add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(request.device)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.inference_mode():
            positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
            first = model(**inputs, position_ids=positions, logits_to_keep=1).logits[:, -1].float()
            ends.extend(first.softmax(dim=-1)[:, eos].tolist())
            said = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        texts.extend(tokenizer.batch_decode(said, skip_special_tokens=True))
    return tuple(texts), tuple(ends)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _padded(rows: Sequence[Sequence[int]], value: int, device: str) -> Any:
    """(rows, longest), padded on the right."""
    import torch

    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device=device)


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


def _score_apart(request: Request) -> Result:
    with tempfile.TemporaryDirectory() as directory:
        asked, told = Path(directory, "request.json"), Path(directory, "result.json")
        asked.write_text(request.model_dump_json())
        done = subprocess.run([sys.executable, "-m", __name__, str(asked), str(told)], stdout=sys.stderr, check=False)
        if not told.is_file():
            raise PipelineError(
                f"evaluate: the scoring process ended without a result: got exit code {done.returncode}; expected 0."
            )
        result = Result.model_validate_json(told.read_bytes())
    if result.error:
        raise PipelineError(result.error)
    return result


def main(asked: Path, told: Path) -> None:
    """The process of its own; it never outlives the one that started it."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    request = Request.model_validate_json(asked.read_bytes())
    try:
        result = score_here(request)
    except PipelineError as error:
        result = Result(error=str(error))
    told.write_text(result.model_dump_json())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
