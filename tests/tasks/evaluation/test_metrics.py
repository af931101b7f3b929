"""Numbers agree with the reference libraries, and intervals hold what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.evaluation.metrics import copied, difference, length_buckets, likelihood, repetition, text_scores

ANSWERS = ["The quick brown kettle is made of steel.", "A pan, a pan, a pan, a pan.", "", "Tutu for ballet, neon pink"]
REFERENCES = ["The brown kettle is made of brushed steel.", "A frying pan of iron.", "Nothing here", "Neon pink ballet tutu"]
TITLES = ["Quick Brown Kettle", "Iron Pan", "", "Ballet Tutu"]
ENDED = [True, False, True, True]


def test_rouge_is_that_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    got = text_scores(ANSWERS, REFERENCES, TITLES, ENDED)
    for name in ("rouge1", "rouge2", "rougeL"):
        scored = [
            RougeScorer([name]).score(reference, answer)[name].fmeasure
            for reference, answer in zip(REFERENCES, ANSWERS, strict=True)
        ]
        assert got[name] == pytest.approx(sum(scored) / 4, abs=1e-5)
    assert got["rouge1"] == pytest.approx((2 * (7 / 8) * (7 / 8) / (14 / 8) + 2 / 13 * 2 + 0 + 8 / 9) / 4, abs=1e-5)


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    import sacrebleu

    got = text_scores(ANSWERS, REFERENCES, TITLES, ENDED)
    assert got["bleu"] == pytest.approx(sacrebleu.corpus_bleu(ANSWERS, [REFERENCES]).score, abs=1e-5)
    assert got["chrf"] == pytest.approx(sacrebleu.corpus_chrf(ANSWERS, [REFERENCES]).score, abs=1e-5)
    perfect = text_scores(REFERENCES, REFERENCES, TITLES, ENDED)
    assert (perfect["rougeL"], perfect["bleu"], perfect["chrf"]) == (1, 100, 100)


def test_shares_and_ratios_count_by_hand() -> None:
    got = text_scores(ANSWERS, REFERENCES, TITLES, ENDED)
    assert got["ends"] == 0.75
    assert got["copies_title"] == 0.25
    assert got["length_ratio"] == pytest.approx((8 + 8 + 0 + 5) / (8 + 5 + 2 + 4), abs=1e-5)
    assert repetition([ANSWERS[1]]) == 1 / 5  # "pan, a pan, a" stands twice; case and punctuation count


def test_an_answer_without_a_title_copies_none() -> None:
    assert copied(["Anything"], [" "]) == 0


def test_without_answers_there_are_no_text_scores() -> None:
    assert text_scores([], [], [], []) == {}


rows = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=20)


@given(rows)
def test_a_mean_weighs_rows_by_their_tokens(drawn: list[tuple[int, float, float]]) -> None:
    tokens, base, tuned = ([row[column] for row in drawn] for column in range(3))
    got = likelihood([int(count) for count in tokens], base, tuned)
    for name, column in (("base", base), ("tuned", tuned)):
        wanted = np.average(column, weights=tokens)
        assert got[name]["nll"] == pytest.approx(wanted, abs=1e-5)
        assert got[name]["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)
        assert got[name]["nll_low"] <= got[name]["nll_high"]
    assert got["difference"]["nll"] == pytest.approx(got["tuned"]["nll"] - got["base"]["nll"], abs=2e-5)


@given(rows)
def test_a_model_against_itself_differs_by_nothing_for_certain(drawn: list[tuple[int, float, float]]) -> None:
    tokens, column = [row[0] for row in drawn], [row[1] for row in drawn]
    assert difference(tokens, column, column) == {"nll": 0, "nll_low": 0, "nll_high": 0}


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says() -> None:
    draw, held = np.random.default_rng(1), 0
    for _ in range(60):
        sample = draw.normal(2.0, 0.5, 120)
        got = likelihood([10] * 120, sample.tolist(), sample.tolist())["base"]
        held += got["nll_low"] <= 2.0 <= got["nll_high"]
    assert 51 <= held <= 60


def test_pairing_makes_a_small_steady_gain_certain() -> None:
    draw = np.random.default_rng(2)
    base = draw.normal(3.0, 1.0, 64)
    got = likelihood([20] * 64, base.tolist(), (base - 0.05).tolist())
    assert got["tuned"]["nll_high"] > got["base"]["nll_low"]
    assert got["difference"]["nll_high"] < 0


def test_equal_inputs_give_equal_intervals() -> None:
    assert likelihood([3, 4], [1.0, 2.0], [0.5, 1.0]) == likelihood([3, 4], [1.0, 2.0], [0.5, 1.0])


def test_more_rows_than_are_drawn_at_once_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, column = list(range(1, 33)), [1 / row for row in range(1, 33)]
    whole = likelihood(tokens, column, column)
    monkeypatch.setattr("tasks.evaluation.metrics.DRAWN", 32 * 7)
    assert likelihood(tokens, column, column) == whole


def test_numbers_of_a_ruined_model_stay_what_they_are() -> None:
    got = likelihood([1, 1], [1.0, 2.0], [math.nan, 800.0])
    assert math.isnan(got["tuned"]["nll"])
    assert likelihood([1, 1], [1.0, 2.0], [900.0, 900.0])["tuned"]["perplexity"] == math.inf


@given(rows)
def test_buckets_hold_every_row_once(drawn: list[tuple[int, float, float]]) -> None:
    tokens, base, tuned = ([row[column] for row in drawn] for column in range(3))
    buckets = length_buckets([int(count) for count in tokens], base, tuned)
    assert sum(bucket["rows"] for bucket in buckets) == len(drawn)
    for bucket in buckets:
        assert bucket["rows"] == sum(bucket["tokens_from"] <= count <= bucket["tokens_to"] for count in tokens)
