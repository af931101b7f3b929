"""A model that one GPU can't train, its matrices shared out over several: seconds a step, and memory beside its estimate.

    python -m tests.bench.gpu_shared make TOKENIZER_DIR MODEL_DIR [LAYERS]
    python -m tests.bench.gpu_shared train MODEL_DIR DATA_DIR DEVICE HELD DEVICES WORK

`make` writes Llama-3-70B's shape in NF4, one random layer again and again; `train` trains ten steps of a pack a GPU, and prints a
line `RESULT {...}`. The peak of memory is counted from the second step on, after loading.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

STEPS = 10


def make_large(tokenizer: Path, target: Path, layers: int, changes: dict[str, Any], device: str) -> Path:
    """A model directory of so many layers."""
    from safetensors.torch import load_file, save_file

    from flows.bench.shapes import SHAPES, make_shape
    from tasks.reading.model_files import directory_tokenizer
    from tasks.training.loading import load_base

    large = SHAPES["llama-3-70b"]
    SHAPES["one layer"] = replace(large, settings=large.settings | changes | {"num_hidden_layers": 1})
    target.mkdir(parents=True)
    with TemporaryDirectory(dir=target.parent) as scratch:
        one, packed = Path(scratch, "one"), Path(scratch, "packed")
        make_shape("one layer", one, directory_tokenizer(tokenizer), device)
        load_base(one, "bfloat16", load_in_4bit=True, device=device).save_pretrained(packed)
        tensors = {name: tensor for file in packed.glob("*.safetensors") for name, tensor in load_file(file).items()}
        config = json.loads((packed / "config.json").read_text())
    first = "model.layers.0."
    files = {"around": {name: tensor for name, tensor in tensors.items() if not name.startswith(first)}}
    layer = {name.removeprefix(first): tensor for name, tensor in tensors.items() if name.startswith(first)}
    files |= {f"layer-{number}": {f"model.layers.{number}.{name}": layer[name] for name in layer} for number in range(layers)}
    for name, part in files.items():
        save_file(part, target / f"{name}.safetensors", metadata={"format": "pt"})
    where = {tensor: f"{name}.safetensors" for name, part in files.items() for tensor in part}
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    for file in tokenizer.glob("tokenizer*"):
        (target / file.name).write_bytes(file.read_bytes())
    return target


def train_shared(model: Path, data: Path, device: str, held: str, devices: int, work: Path) -> dict[str, Any]:
    """What a training took."""
    from tasks.training.parallel import launch
    from tasks.training.watch import LOG, read_log
    from tests.bench.gpu_devices import train_on_some

    launch.PROCESS = "tests.bench.gpu_shared"
    found = train_on_some(model, data, device, f"{held} shared", devices, devices, STEPS, work)
    records = read_log(work / LOG)
    estimated = found["resolved"]["estimated_gib"]
    return {
        "devices": devices,
        "held": held,
        "seconds_a_step": round((records[-1].seconds - records[STEPS // 2 - 1].seconds) / (STEPS - STEPS // 2), 3),
        "tokens_per_second": found["tokens_per_second"],
        "losses": found["losses"],
        "estimated_gib": estimated,
        "peak_gib": found["peak_gib"],
        "estimate_over_peak": round(estimated["total"] / found["peak_gib"], 3),
        "free_gib": found["resolved"]["free_gib"],
    }


def train_rank_without_loading(folder: Path) -> None:
    """Train as one process of several, whose peak of memory forgets the loading."""
    from tasks.rank import read_job, see_one_device

    see_one_device(read_job(folder).resolved.device)  # before torch looks
    import torch

    from tasks.rank import train_rank
    from tasks.training.watch import Watch

    step_ended = Watch.step_ended

    def watched(watch: Watch, step: int, held_out_loss: float | None) -> None:
        step_ended(watch, step, held_out_loss)
        if step == 1 and torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    Watch.step_ended = watched
    train_rank(folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    if "RANK" in os.environ:
        train_rank_without_loading(Path(sys.argv[1]))
    elif sys.argv[1] == "make":
        tokenizer_dir, model_dir, *some = sys.argv[2:]
        small = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2} if some else {}
        make_large(Path(tokenizer_dir), Path(model_dir), int(some[0]) if some else 80, small, "cpu" if some else "cuda")
    else:
        model_dir, data_dir, kind, way, count, scratch_dir = sys.argv[2:]
        print("RESULT", json.dumps(train_shared(Path(model_dir), Path(data_dir), kind, way, int(count), Path(scratch_dir))))
