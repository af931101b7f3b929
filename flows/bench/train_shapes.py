"""`amazon-ft bench train --shape NAME`: the fast backend on random weights of published shapes, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from flows.bench.shapes import SHAPES, fit_packs, make_shape
from flows.bench.train import device_here, measure_sides
from flows.running.gpus import held_gpus
from tasks.refs import Tokenizer


def bench_shapes(
    names: Sequence[str], tokenizer: Tokenizer, data: Path, *, held: Sequence[str], devices: int, console: Console
) -> dict[str, Any]:
    """Measure each shape as `bench_train` measures a model: {"shapes": {name: its numbers}}.

    `data` holds packs.arrow, made with the tokenizer; ids beyond a shape's vocabulary are taken modulo its size. A shape's
    weights, 15 GB for 8 billion, lie on disk only while it is measured.
    """
    found: dict[str, Any] = {}
    with held_gpus("cuda", devices):
        for name in dict.fromkeys(names):
            with TemporaryDirectory() as scratch:
                found[name] = _measure(name, tokenizer, data, Path(scratch), held=held, devices=devices, console=console)
    return {"shapes": found}


def _measure(
    name: str, tokenizer: Tokenizer, data: Path, scratch: Path, *, held: Sequence[str], devices: int, console: Console
) -> dict[str, Any]:
    shape = SHAPES[name]
    vocabulary = shape.settings["vocab_size"]
    console.print(f"{name}: random weights; {shape.url}", highlight=False)
    model = make_shape(name, scratch / "model", tokenizer, device_here())
    (scratch / "data").mkdir()
    largest = fit_packs(data / "packs.arrow", vocabulary, scratch / "data" / "packs.arrow")
    if largest >= vocabulary:
        console.print(f"{name}: token ids up to {largest:,} are taken modulo its vocabulary of {vocabulary:,}", highlight=False)
    return {"source": shape.url} | measure_sides(model, scratch / "data", held, devices, console)
