"""Tiny random models of each family served by vLLM with an unmerged adapter, beside transformers and PEFT: greedy ids.

    python -m tests.bench.bench_vllm_families make DIR
    ~/vllm/bin/python -m tests.bench.bench_vllm_families ask DIR [--out JSON]      in vLLM's environment

`make` writes each model, an adapter on all its maps, and the ids that transformers and PEFT say; `ask` prints how many of vLLM's
are equal, or why vLLM does not load the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROMPTS, TOKENS, NEW_TOKENS = 6, 12, 12
RESULT = "RESULT "
HEADS: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
"""vLLM's attention on a CPU takes heads of 32 at least."""
WHOLE: dict[str, dict[str, Any]] = {
    "smollm3": {"use_sliding_window": False, "sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, "sliding_window": None},
}
"""What vLLM takes otherwise, or not at all."""
SMALLER = {"gemma2": 0.02, "gemma3_text": 0.02}
"""Embeddings that are the head too, and as large as they are drawn would say each token again, whatever the layers do."""


def make(folder: Path) -> None:
    """One directory a family: base/, adapter/, said.json."""
    import torch

    from tasks.training.fast.families import FAMILIES
    from tests.support.families import tiny_base, with_adapter

    random = torch.Generator().manual_seed(0)
    asked = torch.randint(3, 440, (PROMPTS, TOKENS), generator=random)
    for name in FAMILIES:
        base = tiny_base(name, **HEADS | WHOLE.get(name, {}))
        base.get_input_embeddings().weight.data *= SMALLER.get(name, 1)
        base.save_pretrained(folder / name / "base")
        said = {"prompts": asked.tolist(), "base": greedy(base, asked)}
        wrapped = with_adapter(base, name)
        wrapped.save_pretrained(folder / name / "adapter")
        (folder / name / "said.json").write_text(json.dumps(said | {"adapter": greedy(wrapped, asked)}))


def greedy(model: Any, asked: Any) -> list[list[int]]:
    """The ids after each prompt."""
    answers = model.eval().generate(input_ids=asked, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
    return answers[:, asked.shape[1] :].tolist()


def ask(folder: Path) -> dict[str, Any]:
    """{family: counts, or the reason that vLLM gives}; each in a process of its own."""
    found: dict[str, Any] = {}
    for path in sorted(file.parent for file in folder.glob("*/said.json")):
        command = [sys.executable, "-m", "tests.bench.bench_vllm_families", "one", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = (done.stdout + done.stderr).splitlines()
        told = [line.removeprefix(RESULT) for line in lines if line.startswith(RESULT)]
        reasons = [line for line in lines if "Error: " in line]
        found[path.name] = json.loads(told[0]) if told else {"failed": reasons[:1]}
        print(path.name, found[path.name], flush=True)
    return found


def ask_one(path: Path) -> dict[str, Any]:
    """How many prompts vLLM goes on with as transformers and PEFT do, with the adapter and without."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]  # vLLM's environment
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    said = json.loads((path / "said.json").read_text())
    model = LLM(
        str(path / "base"),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=8,
        gpu_memory_utilization=0.3,  # of the main memory
    )
    how = SamplingParams(temperature=0, min_tokens=NEW_TOKENS, max_tokens=NEW_TOKENS, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in said["prompts"]]
    counts: dict[str, Any] = {"prompts": len(prompts)}
    for name, lora in (("base", None), ("adapter", LoRARequest("adapter", 1, str(path / "adapter")))):
        answers = [list(answer.outputs[0].token_ids) for answer in model.generate(prompts, how, lora_request=lora)]
        counts[f"equal, {name}"] = sum(one == other for one, other in zip(answers, said[name], strict=True))
    return counts | {"changed by the adapter": sum(a != b for a, b in zip(said["base"], said["adapter"], strict=True))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("step", choices=("make", "ask", "one"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.step == "make":
        make(options.folder)
    elif options.step == "one":
        print(RESULT + json.dumps(ask_one(options.folder)), flush=True)
    else:
        from tests.bench.bench_vllm import versions

        answers = ask(options.folder) | {"versions": versions()}
        if options.out:
            options.out.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")
