"""Patterns against oracles in plain Python; progress, clocks and depth."""

import math
import pickle
import warnings
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from tempering.errors import DepthWarning, ScheduleError
from tempering.schedules import PATTERNS, as_schedule, schedule
from tempering.schedules.patterns import Pattern, Steps, Throb

VALUES = st.floats(1e-3, 1e3)
PROGRESS = st.floats(0, 1)
TRIPLES = st.lists(VALUES, min_size=2, max_size=6)


def throb_oracle(stages, u):
    """Walk the segments one by one and interpolate the logarithms."""
    last = len(stages) - 1
    for k in range(last):
        if u <= (k + 1) / last:
            t = u * last - k
            return math.exp((1 - t) * math.log(stages[k]) + t * math.log(stages[k + 1]))
    raise AssertionError("u above 1")


@given(TRIPLES, PROGRESS)
def test_throb_interpolates_logs_between_equally_spaced_stages(stages, u):
    assert Throb(tuple(stages))(u) == pytest.approx(throb_oracle(stages, u), rel=1e-12)


def test_throb_of_the_definitions_meets_its_stages_exactly():
    throb = schedule("throb(12,3,1,12)")
    assert [throb(k / 3) for k in range(4)] == [12, 3, 1, 12]
    assert throb(1 / 6) == pytest.approx(6, rel=1e-15)  # sqrt(12 * 3)
    assert throb.sample(10)[::3].tolist() == [12, 3, 1, 12]


@given(VALUES, VALUES, PROGRESS)
def test_two_ended_patterns(a, b, u):
    def at(name):
        return schedule(f"{name}({a!r},{b!r})")(u)

    assert at("linear") == pytest.approx(a + (b - a) * u, rel=1e-12)
    assert at("geometric") == pytest.approx(a * (b / a) ** u, rel=1e-12)
    half = (1 - math.cos(math.pi * u)) / 2
    assert at("cosine") == pytest.approx(a + (b - a) * half, rel=1e-12)
    low, high = sorted((a, b))
    if low < high:
        up, down = (
            schedule(f"cold_to_hot({low!r},{high!r})"),
            schedule(f"hot_to_cold({high!r},{low!r})"),
        )
        assert up(u) == pytest.approx(low * (high / low) ** u, rel=1e-12)
        assert down(u) == pytest.approx(high * (low / high) ** u, rel=1e-12)


@given(st.integers(1, 60), st.integers(0, 70))
def test_steps_split_a_clock_by_whole_numbers(count, more):
    # i/(n-1) is rounded, and must not fall into the stretch before its own
    n = count + more
    values = tuple(float(k) for k in range(count))
    want = [values[min(i * count // max(n - 1, 1), count - 1)] for i in range(n)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DepthWarning)
        assert Steps(values).sample(n).tolist() == want


@given(st.lists(VALUES, min_size=2, max_size=5), st.integers(10, 60))
def test_a_clock_is_the_function_at_its_points(stages, n):
    pattern = Throb(tuple(stages))
    want = [pattern(i / (n - 1)) for i in range(n)]
    assert pattern.sample(n).tolist() == pytest.approx(want, rel=1e-14)


@given(TRIPLES, st.integers(12, 40))
def test_values_stay_within_the_stages(stages, n):
    values = Throb(tuple(stages)).sample(n)
    assert min(stages) <= values.min() and values.max() <= max(stages)


def test_limits_are_written_as_such():
    assert schedule("constant(0)")(0.3) == 0
    assert schedule("constant(inf)")(0.3) == math.inf
    assert schedule("steps(0,inf)").sample(4).tolist() == [0, 0, math.inf, math.inf]
    assert schedule("linear(1,0)")(1.0) == 0
    assert schedule("throb(3,3)")(0.37) == 3


def test_a_clock_of_one_point_stands_at_the_start():
    assert schedule("constant(2)").sample(1).tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_progress_keep_shape_and_give_at_least_float32(dtype):
    u = torch.tensor([[0.0, 0.25], [0.5, 1.0]], dtype=dtype)
    got = schedule("linear(1,3)")(u)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert got.tolist() == [[1, 1.5], [2, 3]]


def test_gradient_in_progress():
    u = torch.tensor([0.1, 0.4, 0.77], dtype=torch.float64, requires_grad=True)
    for text in ("throb(12,3,1,12)|amplitude(1.5)", "linear(1,2)|room(0.5)", "cosine(1,2)"):
        assert torch.autograd.gradcheck(schedule(text), (u,))


@pytest.mark.parametrize("u", [-0.1, 1.1, math.nan, math.inf])
def test_progress_outside_is_refused(u):
    with pytest.raises(ScheduleError, match=r"progress is a number in \[0, 1\], got"):
        schedule("linear(1,2)")(u)
    with pytest.raises(ScheduleError, match=r"at position \[1, 0\]"):
        schedule("linear(1,2)")(torch.tensor([[0.5], [u]]))


@pytest.mark.parametrize(
    ("u", "kind"),
    [
        (np.linspace(0, 1, 3), "ndarray"),
        (np.array(0.5), "ndarray"),
        ([0.0, 1.0], "list"),
        ("0.5", "str"),
        (None, "NoneType"),
        (0.5j, "complex"),
        (torch.tensor([0.5j]), "torch.complex64"),
    ],
)
def test_progress_of_another_kind_is_refused(u, kind):
    with pytest.raises(ScheduleError, match=f"got {kind}; an array becomes a tensor"):
        schedule("linear(1,2)")(u)


@pytest.mark.parametrize("u", [np.float32(0.25), np.float64(0.25), Fraction(1, 4)])
def test_numbers_of_other_libraries_are_progress(u):
    value = schedule("linear(1,3)")(u)
    assert value == 1.5 and type(value) is float


def test_depth():
    throb = schedule("throb(12,3,1,12)")
    assert throb.stages == 4
    for n in (-1, 0, 1, 3):
        with pytest.raises(ScheduleError, match=rf"has 4 stages and can't show them on {n} point"):
            throb.sample(n)
    with pytest.raises(ScheduleError, match="has 1 stage and can't show it on 0 points"):
        schedule("constant(1)").sample(0)
    for n in (4, 7):
        with pytest.warns(DepthWarning, match=f"4 stages on {n} points.*8 points or more"):
            throb.sample(n)
    assert throb.sample(8).shape == (8,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("throb(1,0)", r"takes values > 0, finite; got 0 as its number 2"),
        ("throb(inf,1)", r"takes values > 0, finite; got inf as its number 1"),
        ("geometric(-1,2)", r"takes values > 0, finite; got -1 as its number 1"),
        ("linear(1,inf)", r"takes values >= 0, finite; got inf as its number 2"),
        ("constant(-1)", r"takes values >= 0, inf included; got -1 as its number 1"),
        ("throb(1)", r"takes 2 numbers or more, got 1"),
        ("linear(1,2,3)", r"takes 2 numbers, got 3"),
        ("constant()", r"takes 1 number, got 0"),
        ("hot_to_cold(1,2)", r"starts hotter than it ends, got 1 then 2; swap them"),
        ("cold_to_hot(2,2)", r"starts colder than it ends, got 2 then 2"),
    ],
)
def test_numbers_that_a_pattern_has_no_place_for(text, message):
    with pytest.raises(ScheduleError, match=message):
        schedule(text)


def test_nan_is_refused_from_python_too():
    with pytest.raises(ScheduleError, match="got nan as its number 1"):
        as_schedule(math.nan)


def test_as_schedule():
    throb = schedule("throb(2,1)")
    assert as_schedule(throb) is throb
    assert as_schedule("throb(2,1)") == throb
    assert as_schedule(1.5) == schedule("constant(1.5)") == as_schedule("constant(1.5)")
    assert as_schedule(2) == schedule("constant(2)")


def test_schedules_are_values():
    a, b = schedule("throb(12,3,1,12)|room(0.5)"), schedule(" throb( 12.0,3e0,1, 12 ) | room(.5)")
    assert a == b and hash(a) == hash(b) and pickle.loads(pickle.dumps(a)) == a
    assert a != schedule("throb(12,3,1,12)") != schedule("geometric(12,3)")
    assert schedule("geometric(12,3)") != schedule("throb(12,3)")
    assert repr(a) == "schedule('throb(12,3,1,12)|room(0.5)')"
    with pytest.raises(AttributeError):
        a.inner = b
    assert schedule("constant(-0)") == schedule("constant(0)")
    assert str(schedule("constant(-0.0)")) == "constant(0)"


@pytest.mark.parametrize("name", PATTERNS)
def test_the_table_of_patterns(name):
    signature, summary, example = PATTERNS[name]
    assert name in signature and summary and "\n" not in summary
    assert str(schedule(example)) == example
    assert name in example
    values = schedule(example).sample(2 * schedule(example).stages)
    assert bool(((values > 0) & values.isfinite()).all())


def test_the_table_begins_with_patterns():
    kinds = [isinstance(schedule(example), Pattern) for _, _, example in PATTERNS.values()]
    assert kinds == sorted(kinds, reverse=True) and 0 < sum(kinds) < len(kinds)
