"""The verdict on a tuned model: better than its base and than the model promoted before, or why not. Pure.

Better means: it loses less per token by at least the margin, and the 95 % interval of the difference, paired by rows, lies
below zero. Whatever is no number, changes nothing, or was measured on too few rows is never better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tasks.config import PromoteConfig
from tasks.evaluation.metrics import difference
from tasks.refs import Value

MIN_ROWS = 5
"""Of fewer rows the bootstrap draws the same few samples again and again, and its interval is too narrow."""


@dataclass(frozen=True)
class Candidate:
    """A saved model as the verdict sees it."""

    name: str
    """For people, such as `saved-model/1a2b3c4d`."""
    adapter: str
    """Digest of its adapter."""
    tokenizer: str
    """Digest of its tokenizer: likelihoods per token of different tokens can't be compared."""
    metrics: Mapping[str, Any]


class Verdict(Value):
    """Whether a saved model becomes the promoted one, and why."""

    promoted: bool
    reasons: tuple[str, ...]
    """Every reason against it; else what speaks for it."""
    against: tuple[str, ...] = ()
    """The models that it was compared with."""


def judge(new: Candidate, before: Candidate | None, config: PromoteConfig) -> Verdict:
    """Compare a saved model with its base, and with the one promoted before where both were asked the same."""
    if fault := _fault(new.metrics):
        return Verdict(promoted=False, reasons=(fault,))
    better, reason = _compare("the base model", new.metrics["difference"], config.margin)
    faults, merits, against = ([] if better else [reason]), ([reason] if better else []), ["base"]
    if before is not None:
        unlike = _unlike(new, before)
        if unlike:
            merits.append(unlike)
        else:
            better, reason = _compare(f"{before.name} (promoted before)", _against(new, before), config.margin)
            (merits if better else faults).append(reason)
            against.append(before.name)
    if not config.enabled:
        faults.append("promote.enabled is false")
    return Verdict(promoted=not faults, reasons=tuple(faults or merits), against=tuple(against))


def _fault(metrics: Mapping[str, Any]) -> str | None:
    """Why the numbers can't speak for any model."""
    rows = metrics.get("rows", 0)
    if not rows:
        return f"nothing was measured: {metrics.get('skipped', 'no held-out rows')}"
    if broken := next(_not_finite(metrics), None):
        return f"{broken[0]} is {broken[1]}: expected a number; the adapter is ruined"
    if all(row["base_nll"] == row["tuned_nll"] for row in metrics["per_row"]):
        return "the adapter changes nothing: base and tuned model lose the same on every row"
    if rows < MIN_ROWS:
        return f"too few held-out rows: got {rows}; expected at least {MIN_ROWS}. Raise sample.eval_rows"
    return None


def _not_finite(value: object, where: str = "") -> Iterator[tuple[str, float]]:
    """(where, number) of everything that is NaN or infinite.

    >>> list(_not_finite({"tuned": {"nll": float("nan")}, "per_row": [{"tokens": 3}]}))
    [('tuned.nll', nan)]
    """
    if isinstance(value, Mapping):
        for name, item in cast("Mapping[str, object]", value).items():
            yield from _not_finite(item, f"{where}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(cast("Sequence[object]", value)):
            yield from _not_finite(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield where, value


def _compare(other: str, found: Mapping[str, float], margin: float) -> tuple[bool, str]:
    """Whether the difference (new minus other) is an improvement, and how to say it."""
    change = f"{found['nll']:+.4f} nats per token (95 % interval {found['nll_low']:+.4f} to {found['nll_high']:+.4f})"
    if found["nll_high"] >= 0:
        return False, f"not better than {other} for certain: {change}; expected the interval below zero"
    if -found["nll"] < margin:
        return False, f"better than {other} by less than the margin: {change}; expected {-margin:+g} or less"
    return True, f"better than {other}: {change}"


def _unlike(new: Candidate, before: Candidate) -> str | None:
    """Why two saved models are not compared; the new one is then judged by its base alone."""
    if new.adapter == before.adapter:
        return f"the adapter is that of {before.name}, promoted before"
    if new.tokenizer != before.tokenizer or _rows(new) != _rows(before):
        return f"{before.name}, promoted before, was not scored on the same rows and tokens: judged by the base model alone"
    if next(_not_finite(before.metrics), None):
        return f"{before.name}, promoted before, has numbers that are none: judged by the base model alone"
    return None


def _against(new: Candidate, before: Candidate) -> dict[str, float]:
    """New minus before, row by row."""
    tokens = [tokens for _, tokens in _rows(new)]
    first, second = ([row["tuned_nll"] for row in _sorted_rows(model)] for model in (before, new))
    return difference(tokens, first, second)


def _rows(model: Candidate) -> list[tuple[tuple[str, ...], int]]:
    """Uids and tokens of the rows that a model was scored on; uids need not be unique."""
    return [(tuple(row["uids"]), row["tokens"]) for row in _sorted_rows(model)]


def _sorted_rows(model: Candidate) -> list[Mapping[str, Any]]:
    return sorted(model.metrics.get("per_row", []), key=lambda row: (row["uids"], row["tokens"], row["base_nll"]))
