"""Which trial is worse, and which may be the best, against enumeration and scipy."""

from __future__ import annotations

import itertools
import math
import statistics

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tempering.agents.ladder import Rung
from tempering.errors import InputError, ScheduleError
from tempering.evaluation.passk import pass_at_k, pass_at_share
from tempering.evaluation.policy_strategy import policy_strategy
from tempering.evaluation.trial_statistics import clearly_worse, may_be_best


def exact_p(differences: list[float]) -> float:
    """Wilcoxon's p by all signs; the differences have distinct sizes, none of which is 0."""
    order = sorted(differences, key=abs)
    up = sum(rank for rank, d in enumerate(order, 1) if d > 0)
    sums = [
        sum(rank for rank, sign in enumerate(signs, 1) if sign)
        for signs in itertools.product((0, 1), repeat=len(order))
    ]
    return sum(total <= up for total in sums) / len(sums)


@given(st.lists(st.integers(1, 40), min_size=3, max_size=8, unique=True), st.data())
def test_the_test_is_wilcoxons(sizes, data):
    signs = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    differences = [size if sign else -size for size, sign in zip(sizes, signs, strict=True)]
    best = [100.0] * len(sizes)
    own = [100.0 + d for d in differences]
    assert clearly_worse(own, best) == (exact_p(differences) < 0.1)


def test_equal_scores_never_condemn_a_trial():
    assert not clearly_worse([0.5] * 20, [0.5] * 20)
    assert not clearly_worse([0.5] * 19 + [0.25], [0.5] * 20)
    assert not clearly_worse([0.75] * 20, [0.5] * 20), "better is not worse"
    assert clearly_worse([0.25] * 10, [0.5] * 20), "the first tasks of the best count"
    assert not clearly_worse([0.0] * 3, [1.0] * 3), "three tasks tell nothing: p = 1/8"


@given(st.lists(st.integers(-8, 8), min_size=2, max_size=9))
def test_a_trial_may_be_best_where_the_paired_interval_reaches_0(sizes):
    differences = [size / 8 for size in sizes]
    mean = statistics.fmean(differences)
    quantile = stats.t.ppf(0.975, len(sizes) - 1)
    high = mean + quantile * statistics.stdev(differences) / math.sqrt(len(sizes))
    hypothesis.assume(abs(high) > 1e-9 or len(set(sizes)) == 1)
    best = [0.5] * (len(sizes) + 3)
    assert may_be_best([0.5 + d for d in differences], best) == (high >= 0)


def test_one_task_tells_no_trial_from_the_best():
    assert may_be_best([0.0], [1.0])
    assert not may_be_best([0.0, 0.0], [1.0, 1.0])


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), st.data())
def test_pass_between_whole_numbers_of_samples_lies_on_the_line(case, data):
    n, c = case
    k = data.draw(st.floats(0, n))
    low, high = int(k), min(int(k) + 1, n)
    ends = [pass_at_k(n, c, i) if i else 0.0 for i in (low, high)]
    expected = ends[0] + (k - low) * (ends[1] - ends[0])
    assert pass_at_share(n, c, k) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(InputError, match="0 <= k <= n"):
        pass_at_share(n, c, n + 0.5)


def test_a_constant_is_a_temperature_for_every_engine():
    assert policy_strategy("constant(0.7)", 3).rungs == (Rung(0.7),) * 3
    text = "phases(thinking=1, answer=0.2)"
    assert policy_strategy(text, 2).rungs == (Rung(1.0, token_policy=text),) * 2
    assert policy_strategy("constant(0.7)|clip(0.1,1)", 1).rungs[0].token_policy is not None
    with pytest.raises(ScheduleError, match="column 13"):
        policy_strategy("constant(hot", 1)
