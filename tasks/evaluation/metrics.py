"""Numbers of an evaluation: how likely the held-out answers are, with intervals, and how the written ones compare. Pure.

Intervals are 95 % percentile bootstraps over rows: rows are drawn again and again with replacement, the same for both models,
and the mean is taken anew. Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13; paired: Koehn,
Statistical Significance Tests for Machine Translation Evaluation, 2004.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGITS = 5
"""Decimals of every number."""
RESAMPLES = 1000
SEED = 3407
PERCENTILES = (2.5, 97.5)
DRAWN = 2**21
"""Row numbers in memory at once."""
REPEATED_WORDS = 4
"""Length of the runs of words that are looked for again. Source: seq-rep-4 of Welleck et al., 2020, arXiv:1908.04319."""


def resampled_means(tokens: Sequence[int], *columns: Sequence[float]) -> NDArray[np.float64]:
    """(columns, RESAMPLES): the mean per token of each column over rows drawn with replacement, the same for all columns.

    Args:
        tokens: of each row; how much the row weighs.
        columns: a number per token for each row.
    """
    weights = np.asarray(tokens, dtype=np.float64)
    sums = np.stack([weights, *(weights * np.asarray(column, dtype=np.float64) for column in columns)])  # (1 + columns, rows)
    draw, rows = np.random.default_rng(SEED), len(weights)
    step = max(1, DRAWN // max(1, rows))
    parts = [
        sums[:, draw.integers(0, rows, (min(step, RESAMPLES - done), rows))].sum(axis=2) for done in range(0, RESAMPLES, step)
    ]
    drawn = np.concatenate(parts, axis=1)  # (1 + columns, RESAMPLES)
    return drawn[1:] / np.maximum(drawn[0], 1)


def _minus(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # a ruined model's numbers may be infinite
        return first - second


def mean(tokens: Sequence[int], column: Sequence[float]) -> float:
    """The mean per token of a number per token for each row.

    >>> mean([1, 3], [4.0, 0.0])
    1.0
    """
    return float(sum(count * value for count, value in zip(tokens, column, strict=True)) / max(1, sum(tokens)))


def likelihood(tokens: Sequence[int], base: Sequence[float], tuned: Sequence[float]) -> dict[str, Any]:
    """Base, tuned, and tuned minus base: means in nats per token, perplexities, and their intervals.

    Args:
        tokens: labelled ones of each row.
        base: the base model's negative log-likelihood per labelled token of each row, in nats.
        tuned: the tuned model's.
    """
    resampled = resampled_means(tokens, base, tuned)
    return {
        "base": _with_perplexity(_summary(mean(tokens, base), resampled[0])),
        "tuned": _with_perplexity(_summary(mean(tokens, tuned), resampled[1])),
        "difference": _rounded(_summary(mean(tokens, tuned) - mean(tokens, base), _minus(resampled[1], resampled[0]))),
    }


def difference(tokens: Sequence[int], first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Second minus first on the same rows, {nll, nll_low, nll_high} in nats per token.

    >>> difference([2, 2], [1.0, 3.0], [0.5, 2.5])
    {'nll': -0.5, 'nll_low': -0.5, 'nll_high': -0.5}
    """
    resampled = resampled_means(tokens, first, second)
    return _rounded(_summary(mean(tokens, second) - mean(tokens, first), _minus(resampled[1], resampled[0])))


def length_buckets(tokens: Sequence[int], base: Sequence[float], tuned: Sequence[float]) -> list[dict[str, Any]]:
    """Means by length of the answer; a bucket reaches from a power of two to just below the next, both ends included.

    >>> length_buckets([9, 17, 31], [2.0, 1.0, 1.0], [1.0, 0.5, 0.5])  # doctest: +NORMALIZE_WHITESPACE
    [{'tokens_from': 8, 'tokens_to': 15, 'rows': 1, 'base_nll': 2.0, 'tuned_nll': 1.0},
     {'tokens_from': 16, 'tokens_to': 31, 'rows': 2, 'base_nll': 1.0, 'tuned_nll': 0.5}]
    """
    rows = [(count, one, other) for count, one, other in zip(tokens, base, tuned, strict=True) if count]
    found: list[dict[str, Any]] = []
    for bits in sorted({count.bit_length() for count, _, _ in rows}):
        counts, ones, others = zip(*(row for row in rows if row[0].bit_length() == bits), strict=True)
        means = {"base_nll": mean(counts, ones), "tuned_nll": mean(counts, others)}
        found.append({"tokens_from": 2 ** (bits - 1), "tokens_to": 2**bits - 1, "rows": len(counts), **_rounded(means)})
    return found


def text_scores(
    answers: Sequence[str], references: Sequence[str], titles: Sequence[str], ended: Sequence[bool]
) -> dict[str, float]:
    """How one model's answers compare with the references; nothing when there are none.

    ROUGE is a mean F of 0 to 1, BLEU and chrF are over the whole corpus, 0 to 100; each as its library computes it by default.
    """
    if not answers:
        return {}
    scores = {
        **_rouge(answers, references),
        **_bleu_and_chrf(answers, references),
        "length_ratio": length_ratio(answers, references),
        "repetition": repetition(answers),
        "ends": sum(ended) / len(ended),
        "copies_title": copied(answers, titles),
    }
    return _rounded(scores)


def length_ratio(answers: Iterable[str], references: Iterable[str]) -> float:
    """Words of all answers over words of all references.

    >>> length_ratio(["a b c"], ["a b"])
    1.5
    """
    return _words(answers) / max(1, _words(references))


def repetition(answers: Iterable[str]) -> float:
    """The share of runs of REPEATED_WORDS words that stand earlier in the same answer.

    >>> repetition(["a b c d a b c d", "short"])
    0.2
    """
    runs = [_runs(answer.split()) for answer in answers]
    total = sum(len(run) for run in runs)
    return (total - sum(len(set(run)) for run in runs)) / max(1, total)


def copied(answers: Sequence[str], titles: Sequence[str]) -> float:
    """The share of answers in which their product's title stands, whatever the case and the spacing.

    >>> copied(["The  Red kettle, in red.", "A pan."], ["Red Kettle", "Blue Pan"])
    0.5
    """
    pairs = [(_plain(answer), _plain(title)) for answer, title in zip(answers, titles, strict=True)]
    return sum(bool(title) and title in answer for answer, title in pairs) / max(1, len(pairs))


def _rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names)
    scored = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: sum(score[name].fmeasure for score in scored) / len(scored) for name in names}


def _bleu_and_chrf(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    scorers = {"bleu": BLEU(), "chrf": CHRF()}
    return {name: scorer.corpus_score(list(answers), [list(references)]).score for name, scorer in scorers.items()}


def _summary(value: float, resampled: NDArray[np.float64]) -> dict[str, float]:
    low, high = (float(bound) for bound in np.percentile(resampled, PERCENTILES, method="nearest"))
    return {"nll": value, "nll_low": low, "nll_high": high}


def _with_perplexity(summary: Mapping[str, float]) -> dict[str, float]:
    with np.errstate(over="ignore"):  # a ruined model's perplexity may be infinite
        perplexity = {name.replace("nll", "perplexity"): float(np.exp(value)) for name, value in summary.items()}
    return _rounded({**summary, **perplexity})


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, DIGITS) for name, value in numbers.items()}


def _words(texts: Iterable[str]) -> int:
    return sum(len(text.split()) for text in texts)


def _runs(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + REPEATED_WORDS]) for start in range(len(words) - REPEATED_WORDS + 1)]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
