"""Aggregators against sums by hand, and the limits that tie them together."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempering.agents.aggregators import (
    AGGREGATORS,
    Answer,
    best_of_n,
    difficulty_aware,
    majority,
    settled,
    support_so_far,
    synthesis,
    synthesis_prompt,
    tempered_vote,
)
from tempering.errors import InputError

texts = st.sampled_from(["a", "b", "c", None])
scores = st.floats(-5, 0)
answers_of = st.lists(
    st.builds(Answer, text=texts, score=scores, temperature=st.sampled_from([0.5, 1.0, 1.5])),
    min_size=1,
    max_size=9,
)


def given_by(*pairs: tuple[str | None, float]) -> list[Answer]:
    return [Answer(text, score=score) for text, score in pairs]


def entropy_support(shares: list[float]) -> float:
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


@given(answers_of)
def test_majority_counts(answers):
    verdict = majority(answers)
    counts = Counter(answer.text for answer in answers if answer.text is not None)
    if not counts:
        assert verdict == (verdict.__class__)(None, None, {}, 0.0, 0)
        return
    n = sum(counts.values())
    assert verdict.n == n and counts[str(verdict.answer)] == max(counts.values())
    assert verdict.shares == pytest.approx({text: c / n for text, c in counts.items()})
    assert verdict.support == pytest.approx(entropy_support([c / n for c in counts.values()]))
    assert verdict.index is not None and answers[verdict.index].text == verdict.answer
    # Of several with the same count, the one given first.
    top = [
        answer.text for answer in answers if counts.get(str(answer.text)) == max(counts.values())
    ]
    assert verdict.answer == top[0]


@given(answers_of, st.floats(0.05, 5))
def test_tempered_vote_is_the_posterior_by_definition(answers, temperature):
    verdict = tempered_vote(answers, temperature=temperature)
    weights: dict[str, float] = {}
    for answer in answers:
        if answer.text is not None and answer.score is not None:
            weight = math.exp(answer.score / temperature)
            weights[answer.text] = weights.get(answer.text, 0.0) + weight
    total = sum(weights.values())
    assert verdict.shares == pytest.approx({k: v / total for k, v in weights.items()}, abs=1e-9)
    if weights:
        assert weights[str(verdict.answer)] == pytest.approx(max(weights.values()))
        assert verdict.support == pytest.approx(
            entropy_support([v / total for v in weights.values()]), abs=1e-6
        )


@given(answers_of)
def test_the_vote_runs_from_best_of_n_to_the_majority(answers):
    hot, cold = (
        tempered_vote(answers, temperature=math.inf),
        tempered_vote(answers, temperature=0.0),
    )
    assert hot.answer == majority(answers).answer
    assert hot.shares == pytest.approx(majority(answers).shares)
    best = best_of_n(answers)
    if best.answer is not None:
        scores = {a.score for a in answers if a.text is not None}
        tied = [a.text for a in answers if a.text is not None and a.score == max(scores)]
        assert cold.answer in tied and best.answer == tied[0]


@given(answers_of)
def test_all_have_one_signature_and_abstentions_change_nothing(answers):
    for aggregate in AGGREGATORS.values():
        verdict = aggregate(answers)
        assert 0 <= verdict.support <= max(1, len(verdict.shares)) + 1e-9
        assert verdict.shares == {} or sum(verdict.shares.values()) == pytest.approx(1)
    more = [*answers, Answer(None)]
    for aggregate in (majority, tempered_vote, best_of_n):
        assert aggregate(more) == aggregate(answers)


def test_likelihood_beats_number_when_cold():
    answers = given_by(("a", -3.0), ("a", -3.0), ("a", -3.0), ("b", -0.1))
    assert majority(answers).answer == "a"
    assert tempered_vote(answers).answer == "b"
    assert tempered_vote(answers, temperature=100.0).answer == "a"
    assert best_of_n(answers).answer == "b" and best_of_n(answers).index == 3


def test_a_scorer_of_ones_own():
    answers = given_by(("a", -0.1), ("bbb", -9.0), ("cc", -1.0))
    longest = partial(best_of_n, scorer=lambda answer: float(len(answer.text or "")))
    assert longest(answers).answer == "bbb"
    with pytest.raises(InputError, match="score of sample 0 is NaN"):
        best_of_n(answers, scorer=lambda answer: math.nan)


def test_without_likelihoods_the_vote_is_refused():
    answers = [Answer("a"), Answer("b")]
    assert majority(answers).answer == "a"
    for aggregate in (tempered_vote, best_of_n):
        with pytest.raises(InputError, match="sample 0 has no score.*engine local"):
            aggregate(answers)


def heated(*rows: tuple[str | None, float, float]) -> list[Answer]:
    return [Answer(text, temperature=t, heat=heat) for text, t, heat in rows]


def test_cold_explorers_decide_what_they_agree_on():
    easy = heated(("4", 0.3, 1.0), ("4", 0.5, 1.0), ("7", 1.0, 1.0), ("7", 1.2, 1.0))
    assert difficulty_aware(easy).answer == "4"
    hard = heated(("4", 0.3, 1.0), ("5", 0.4, 1.0), ("6", 0.5, 1.0), ("7", 1.0, 1.0),
                  ("7", 1.1, 1.0), ("8", 1.2, 1.0))  # fmt: skip
    assert difficulty_aware(hard).answer == "7"
    assert difficulty_aware(hard, settled=3.5).answer == "4"
    # Attention's heat comes before the sampling temperature.
    swapped = heated(("4", 1.2, 0.9), ("4", 1.0, 0.9), ("7", 0.3, 1.1), ("7", 0.5, 1.1))
    assert difficulty_aware(swapped).answer == "4"
    assert difficulty_aware(swapped).index == 0


def test_equally_hot_explorers_vote():
    alike = heated(("4", 1.0, 1.0), ("7", 1.0, 1.0), ("7", 1.0, 1.0))
    assert difficulty_aware(alike) == majority(alike)
    half = heated((None, 0.3, 1.0), ("7", 1.2, 1.0))
    assert difficulty_aware(half).answer == "7", "a half without an answer decides nothing"


def test_synthesis_asks_once_and_reads_the_answer():
    asked = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return "It is b."

    answers = given_by(("a", -1.0), ("a", -1.0), ("b", -1.0))
    merge = partial(synthesis, ask=ask, read=lambda text: text[-2], task="Which?")
    verdict = merge(answers)
    assert verdict.answer == "b" and verdict.index == 2
    assert asked == [synthesis_prompt(answers, "Which?")]
    assert "- a (given 2 of 3 times)" in asked[0] and "- b (given 1 of 3 times)" in asked[0]
    assert merge([Answer(None)]).answer is None and len(asked) == 1, "nothing to merge"
    new = partial(synthesis, ask=lambda p: "z", read=lambda text: text, task="Which?")(answers)
    assert new.answer == "z" and new.index is None


def test_support_so_far_expects_one_more_answer():
    for n in range(1, 9):
        p = [n / (n + 1), 1 / (n + 1)]
        assert support_so_far([Answer("a")] * n) == pytest.approx(entropy_support(p), abs=1e-6)
    mixed = [Answer("a"), Answer("b"), Answer("a"), Answer(None)]
    assert support_so_far(mixed) == pytest.approx(entropy_support([0.5, 0.25, 0.25]), abs=1e-6)


def test_stopping_early_needs_samples_that_agree():
    assert not settled([Answer("a")], 1.9), "one sample settles nothing"
    assert not settled([], 1.9) and not settled([Answer(None)] * 9, 1.9), "no answer settles less"
    assert settled([Answer("a")] * 6, 1.53)
    assert not settled([Answer("a")] * 5, 1.53)
    assert not settled([Answer(str(i)) for i in range(12)], 1.5)
    with pytest.raises(InputError, match="above 1, got 1"):
        settled([Answer("a")], 1.0)
