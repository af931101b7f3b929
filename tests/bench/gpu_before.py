"""The code of another checkout and this one in turn, each pair on one GPU: what a change made faster, and where.

Phase `before` of tests/bench/gpu_session.py, given --before CHECKOUT. Both train the same models on the same packs. As many pairs
run at once as there are GPUs; nothing is shared between them but the host and what torch has compiled.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.bench.gpu_fast import called, each_on_a_gpu
from tests.bench.gpu_prepare import PACK_TOKENS

if TYPE_CHECKING:
    from tests.bench.gpu_session import Session

SMALL_SHAPE = "llama-3.2-1b"


class Pair(NamedTuple):
    """What both sides do."""

    kind: str
    """`bench`: `amazon-ft bench train`; else one of tests/bench/gpu_fast_worker.py."""
    of: str
    """How the base matrices are held, or the cap of memory in GiB."""
    data: str = "turns-3"
    small: bool = False
    """With the small shape in place of Llama-3-8B's."""

    @property
    def name(self) -> str:
        return " ".join([self.kind, self.of, *({self.data} - {"turns-3"}), *([SMALL_SHAPE] if self.small else [])])


PAIRS = (
    *(Pair("bench", held) for held in ("fp8", "plain", "fp8-backward")),
    *(Pair("profile", held) for held in ("fp8", "plain", "fp8-backward")),
    *(Pair("bench", "fp8", f"packs-{tokens}") for tokens in PACK_TOKENS),
    *(Pair("bench", held, small=True) for held in ("fp8", "plain")),
    *(Pair("capped", gib) for gib in ("12", "24")),
)
REHEARSED = (Pair("bench", "plain"), Pair("profile", "plain"), Pair("bench", "plain", small=True))


def before(session: Session, found: dict[str, Any]) -> None:
    """{pair: what each side told, and how many times as fast this code is}, as far as pairs come to their ends."""
    other = session.before
    if other is None:
        raise RuntimeError("--before: expected the checkout of the code that this one is held against")
    pairs = [pair for pair in (REHEARSED if session.rehearse else PAIRS) if pair.name in (session.pairs or {pair.name})]
    small = make_small_shape(session) if any(pair.small for pair in pairs) and not session.rehearse else session.llama

    def measure(pair: Pair, gpu: str | None) -> None:
        told = found.setdefault(pair.name, dict[str, Any]())
        try:
            for when, checkout in (("before", other), ("after", Path.cwd())):
                told[when] = side(session, pair, when, checkout, small if pair.small else session.llama, gpu)
            told["times"] = round(speed(told["after"]) / speed(told["before"]), 3)
        except RuntimeError as error:
            told["failed"] = str(error)

    each_on_a_gpu(pairs, measure)
    if failed := [name for name, told in found.items() if "failed" in told]:
        raise RuntimeError(f"{', '.join(failed)}: failed; see there")


def make_small_shape(session: Session) -> Path:
    """A model directory of the small shape."""
    from flows.bench.shapes import make_shape
    from tasks.reading.model_files import directory_tokenizer

    target = session.work / SMALL_SHAPE
    make_shape(SMALL_SHAPE, target, directory_tokenizer(session.home / "tok"), session.device)
    shutil.copytree(session.home / "tok", target, dirs_exist_ok=True)
    return target


def side(session: Session, pair: Pair, when: str, checkout: Path, model: Path, gpu: str | None) -> dict[str, Any]:
    """What one checkout's code told, in a process of its own.

    Raises:
        RuntimeError: with the end of its log, when it fails.
    """
    data, target = session.home / "speed" / pair.data, session.work / f"{pair.name} {when}.json"
    if pair.kind == "bench":
        words = ("flows.cli", "bench", "train", "--held", pair.of, "--model", model, "--data", data, "--json", target)
    else:
        words = ("tests.bench.gpu_fast_worker", pair.kind, model, data, session.device, pair.of)
    printed = called(session, f"{pair.name} {when}", *map(str, words), visible=gpu, checkout=checkout)
    return json.loads(target.read_text() if pair.kind == "bench" else printed.splitlines()[-1].removeprefix("RESULT "))


def speed(told: dict[str, Any]) -> float:
    """Tokens a second of what a side told, of its only training."""
    windows = next(iter(told["sides"].values()))["windows"] if "sides" in told else told.get("trained", told)["windows"]
    return sorted(windows)[len(windows) // 2]


__all__ = ["before"]
