"""A GGUF file asked in llama.cpp itself, by the package xllamacpp, beside the model that it was made of in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tasks.refs import Value

RUNTIME = "xllamacpp"


class Agreement(Value):
    """How llama.cpp answers held-out questions greedily, set beside transformers."""

    prompts: int
    same_tokens: int
    """Prompts that both cut into the same tokens."""
    same_answers: int
    """Of the same token ids, to the end or to the most tokens of an answer."""
    first_difference: str | None
    """Of the first answer that differs: where, and the token of each."""
    runtime: str
    """The package and its version."""


def has_runtime() -> bool:
    """Whether llama.cpp can be asked here."""
    return find_spec(RUNTIME) is not None


def compare_answers(file: Path, model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> Agreement:
    """Let both answer prompts, which are written out as the chat template renders them."""
    from tasks.caching.versions import package_versions

    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    end = tokenizer.eos_token_id
    theirs = [_by_transformers(model, prompt, max_new_tokens, end) for prompt in ids]
    cut, ours = _by_llama_cpp(file, prompts, ids, max_new_tokens, end)
    apart = [(row, *pair) for row, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1]]
    return Agreement(
        prompts=len(prompts),
        same_tokens=sum(one == other for one, other in zip(cut, ids, strict=True)),
        same_answers=len(prompts) - len(apart),
        first_difference=_first_difference(*apart[0], tokenizer) if apart else None,
        runtime=" ".join(next(iter(package_versions([RUNTIME]).items()), (RUNTIME, ""))),
    )


def _first_difference(row: int, theirs: list[int], ours: list[int], tokenizer: Any) -> str:
    at = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), min(len(theirs), len(ours)))
    said = [tokenizer.decode(answer[at : at + 1]) or "the end" for answer in (theirs, ours)]
    return f"answer {row + 1}, token {at + 1}: transformers {said[0]!r}, llama.cpp {said[1]!r}"


def _by_transformers(model: Any, ids: list[int], max_new_tokens: int, end: int) -> list[int]:
    import torch
    from transformers import GenerationConfig

    greedy = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=end)
    with torch.inference_mode():
        said = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), generation_config=greedy)
    return _until(said[0, len(ids) :].tolist(), end)


def _by_llama_cpp(
    file: Path, prompts: Sequence[str], ids: Sequence[list[int]], max_new_tokens: int, end: int
) -> tuple[list[list[int]], list[list[int]]]:
    """How it cuts prompts into tokens, and what it answers to given ones."""
    import httpx

    server = serve_file(file, max(map(len, ids)) + max_new_tokens)
    cut, answers = list[list[int]](), list[list[int]]()
    with httpx.Client(base_url=server.listening_address, timeout=None) as client:  # an answer takes as long as the machine does
        for prompt, tokens in zip(prompts, ids, strict=True):
            asked = {"content": prompt, "add_special": False, "parse_special": True}
            cut.append(client.post("/tokenize", json=asked).json()["tokens"])
            asked = {
                "prompt": tokens,
                "n_predict": max_new_tokens,
                "temperature": 0,
                "cache_prompt": False,
                "return_tokens": True,
            }
            answers.append(_until(client.post("/completion", json=asked).json()["tokens"], end))
    return cut, answers


def serve_file(file: Path, tokens: int) -> Any:
    """llama.cpp's server of a file, on a free port of 127.0.0.1 as long as the value lives; `tokens` of prompt and answer."""
    from xllamacpp import CommonParams, Server  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

    params: Any = CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.port = str(file), tokens, 1, 0
    params.warmup, params.verbosity = False, 0
    return Server(params)


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
