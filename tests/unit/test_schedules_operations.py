"""Operations on patterns against oracles in plain Python; controls and what they keep."""

import math
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from tempering.errors import ScheduleError
from tempering.schedules import controls, schedule
from tempering.schedules.patterns import Throb

THROB = schedule("throb(12,3,1,12)")
STAGES = st.lists(st.floats(0.1, 10), min_size=2, max_size=5).map(tuple)
PROGRESS = st.floats(0, 1)


def log(values):
    return [math.log(value) for value in values]


def mean(values):
    return sum(values) / len(values)


@given(STAGES, PROGRESS, st.floats(0, 3))
def test_room_raises_to_a_power(stages, u, f):
    pattern = Throb(stages)
    assert pattern.room(f)(u) == pytest.approx(pattern(u) ** f, rel=1e-12)


def test_room_at_its_ends():
    for text in ("throb(12,3,1,12)", "steps(0,1,inf)"):
        pattern = schedule(text)
        assert pattern.room(0).sample(8).tolist() == [1] * 8
        assert pattern.room(1).sample(8).tolist() == pattern.sample(8).tolist()


@given(STAGES, PROGRESS, st.floats(1, 5))
def test_amplitude_maps_the_log_range(stages, u, a):
    pattern, low, high = Throb(stages), math.log(min(stages)), math.log(max(stages))
    if high - low < 1e-6:
        return
    place = (math.log(pattern(u)) - low) / (high - low)
    want = math.exp(-math.log(a) + 2 * math.log(a) * place)
    assert pattern.amplitude(a)(u) == pytest.approx(want, rel=1e-6)


def test_amplitude_reaches_its_ends_exactly():
    tempered = THROB.amplitude(1.15)
    assert tempered(0) == 1.15 and tempered(2 / 3) == 1 / 1.15 and tempered(1) == 1.15
    assert schedule("constant(7)|amplitude(1.15)")(0.4) == 1
    assert schedule("steps(3,3)|amplitude(1.15)").sample(4).tolist() == [1] * 4
    assert THROB.amplitude(1).sample(9).tolist() == [1] * 9


def test_amplitude_is_of_the_pattern_and_not_of_the_clock():
    # on 6 points no layer stands on the coldest stage, so none is as cold as 1/a
    values = THROB.amplitude(2).sample(12)
    assert values.max() == 2 and 0.5 < values.min() < 0.6
    assert values.tolist() == pytest.approx([THROB.amplitude(2)(i / 11) for i in range(12)])


def test_amplitude_follows_what_it_is_applied_to():
    for text in (
        "reverse(throb(12,3,1,12))",
        "repeat(throb(12,3,1,12), 3)",
        "throb(12,3,1,12)|room(0.3)",
        "throb(12,3,1,12)|clip(2,5)",
        "throb(12,3,1,12)|amplitude(3)",
        "steps(1,4,2)",
    ):
        values = schedule(text).amplitude(1.5).sample(301)
        assert values.max().item() == pytest.approx(1.5, rel=1e-3), text
        assert values.min().item() == pytest.approx(1 / 1.5, rel=2e-2), text
        assert values.max() <= 1.5 and values.min() >= 1 / 1.5


@given(STAGES, PROGRESS, st.floats(0.1, 3), st.floats(0, 3))
def test_clip(stages, u, lo, more):
    pattern = Throb(stages)
    assert pattern.clip(lo, lo + more)(u) == min(max(pattern(u), lo), lo + more)


@given(STAGES, PROGRESS)
def test_reverse(stages, u):
    pattern = Throb(stages)
    assert pattern.reversed()(u) == pytest.approx(pattern(1 - u), rel=1e-12)
    assert pattern.reversed().sample(20).tolist() == pattern.sample(20).tolist()[::-1]
    assert pattern.reversed().reversed().sample(20).tolist() == pattern.sample(20).tolist()


@given(STAGES, st.integers(1, 6), st.integers(0, 5), st.floats(0.001, 0.999))
def test_repeat(stages, n, cycle, t):
    pattern, cycle = Throb(stages), cycle % n
    assert pattern.repeat(n)((cycle + t) / n) == pytest.approx(pattern(t), rel=1e-9)


def test_repeat_at_its_joints():
    twice = schedule("repeat(geometric(1,4), 2)")
    assert twice.stages == 4
    assert [twice(u) for u in (0, 0.25, 0.5, 0.75, 1)] == [1, 2, 1, 2, 4]
    assert schedule("repeat(steps(1,2), 7)").sample(29).tolist() == [1, 1, 2, 2] * 7 + [2]


def test_nest_puts_a_pattern_inside_each_stage():
    nested = schedule("nest(steps(8,2), geometric(1,4))")  # geometric mean 2
    assert nested.stages == 4
    assert [nested(u) for u in (0, 0.25, 0.5, 0.75, 1)] == [4, 8, 1, 2, 4]
    # the stages of a throb are where it is interpolated, and one constant changes nothing
    assert schedule("nest(throb(12,3,1,12), constant(5))").sample(8).tolist() == [
        12, 12, 3, 3, 1, 1, 12, 12,
    ]  # fmt: skip


@given(STAGES, STAGES, st.integers(0, 4), st.floats(0.001, 0.999))
def test_nest_against_its_formula(outer, inner, stage, t):
    stage %= len(outer)
    middle = math.exp(mean(log(inner)))
    u = (stage + t) / len(outer)
    want = outer[stage] * Throb(inner)(t) / middle
    assert Throb(outer).nested(Throb(inner))(u) == pytest.approx(want, rel=1e-9)


@given(STAGES, st.integers(10, 30), st.integers(0, 2**40))
def test_shuffle_keeps_the_values(stages, n, seed):
    pattern = Throb(stages)
    values = pattern.shuffled(seed).sample(n).tolist()
    assert sorted(values) == sorted(pattern.sample(n).tolist())
    assert values == pattern.shuffled(seed).sample(n).tolist()


def test_shuffle_by_an_independent_draw():
    draw = random.Random(3)
    pairs = sorted(zip([draw.random() for _ in range(12)], THROB.sample(12).tolist()))
    assert THROB.shuffled(3).sample(12).tolist() == [value for _, value in pairs]
    orders = {tuple(THROB.shuffled(seed).sample(12).tolist()) for seed in range(10)}
    assert len(orders) == 10


def test_controls_of_an_honest_comparison():
    pattern, n = schedule("throb(12,3,1,6)|amplitude(1.3)"), 30
    values = pattern.sample(n).tolist()
    middle = mean(log(values))
    found = controls(pattern, n, seeds=[0, 5])
    assert list(found) == ["uniform", "reversed", "upside down", "shuffled 0", "shuffled 5"]
    sampled = {name: control.sample(n).tolist() for name, control in found.items()}
    assert sampled["uniform"] == pytest.approx([math.exp(middle)] * n, rel=1e-12)
    assert sampled["reversed"] == values[::-1]
    assert sampled["upside down"] == pytest.approx(
        [math.exp(2 * middle - x) for x in log(values)], rel=1e-12
    )
    for name, got in sampled.items():
        assert mean(log(got)) == pytest.approx(middle, abs=1e-12), name
        assert schedule(str(found[name])) == found[name]


def test_what_has_no_controls():
    with pytest.raises(ScheduleError, match="is 2 everywhere on 8 points, so its controls would"):
        controls(schedule("constant(2)"), 8)
    with pytest.raises(ScheduleError, match="has a limit, 0 or inf: clip it first"):
        controls(schedule("steps(0,1)"), 8)
    with pytest.raises(ScheduleError, match="has 4 stages and can't show them on 3 points"):
        controls(THROB, 3)


def test_operations_on_controls_act_on_their_values():
    shuffled = THROB.shuffled(1)
    values = shuffled.sample(9).tolist()
    assert shuffled.reversed().sample(9).tolist() == values[::-1]
    assert shuffled.room(2).sample(9).tolist() == pytest.approx([v**2 for v in values])
    assert shuffled.clip(2, 3).sample(9).tolist() == [min(max(v, 2), 3) for v in values]
    assert (
        shuffled.amplitude(1.2).sample(9).tolist()
        == THROB.amplitude(1.2).shuffled(1).sample(9).tolist()
    )
    assert THROB.uniform().amplitude(1.2).sample(9).tolist() == [1] * 9
    # upside down, then mapped, is the reciprocal of mapped
    assert THROB.inverted().amplitude(1.2).sample(9).tolist() == pytest.approx(
        [1 / v for v in THROB.amplitude(1.2).sample(9).tolist()]
    )
    assert THROB.inverted().inverted().sample(9).tolist() == pytest.approx(THROB.sample(9).tolist())


@pytest.mark.parametrize("text", ["shuffle(throb(2,1), seed=0)", "uniform(linear(2,1))"])
@pytest.mark.parametrize("around", ["{}", "reverse({})", "{}|room(0.5)", "{}|amplitude(2)"])
def test_controls_exist_only_on_a_clock(text, around):
    pattern = schedule(around.format(text))
    assert pattern.clock_only
    with pytest.raises(ScheduleError, match=r"exists only on a clock: read it with sample\(n\)"):
        pattern(0.5)
    steps = pattern.on_clock(6)
    assert not steps.clock_only
    assert [steps(i / 5) for i in range(6)] == pattern.sample(6).tolist()


@pytest.mark.parametrize("text", ["repeat(shuffle(throb(2,1), seed=0), 2)",
                                  "nest(throb(2,1), invert(throb(2,1))|room(2))"])  # fmt: skip
def test_controls_have_no_place_where_a_pattern_is_read_elsewhere(text):
    with pytest.raises(ScheduleError, match="reads its pattern at points of its own, but"):
        schedule(text)


def test_shuffled_stages_may_hold_a_nested_pattern():
    nested = schedule("nest(shuffle(steps(1,2,4), seed=0), constant(1))")
    assert not nested.clock_only
    assert nested.sample(6).tolist() == [
        v for v in schedule("shuffle(steps(1,2,4), seed=0)")._all(3).tolist() for _ in range(2)
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "throb(2,1)|amplitude(0.5)",
            r"takes a >= 1, finite; got 0.5.*invert\(...\)\|amplitude\(2",
        ),
        ("throb(2,1)|amplitude(inf)", "takes a >= 1, finite; got inf"),
        ("throb(2,1)|amplitude(-2)", "takes a >= 1, finite; got -2\n"),
        ("throb(2,1)|room(-1)", r"room takes f >= 0, finite; got -1.*invert"),
        ("throb(2,1)|room(inf)", "room takes f >= 0, finite; got inf"),
        ("throb(2,1)|clip(2,1)", "0 <= lo <= hi, got lo = 2 and hi = 1"),
        ("throb(2,1)|clip(-1,1)", "0 <= lo <= hi, got lo = -1 and hi = 1"),
        ("repeat(throb(2,1), 0)", "n >= 1 cycles, got 0"),
        ("shuffle(throb(2,1), seed=-1)", "a seed from 0 to 2.53 - 1, got -1"),
        ("repeat(throb(2,1), 500001)", "repeat makes 1000002 stages; at most 1000000"),
    ],
)
def test_arguments_that_an_operation_has_no_place_for(text, message):
    with pytest.raises(ScheduleError, match=message):
        schedule(text)


@pytest.mark.parametrize("operation", ["{}|amplitude(2)", "uniform({})", "invert({})"])
def test_a_limit_has_no_logarithm(operation):
    with pytest.raises(ScheduleError, match="works on logarithms and takes values > 0, finite"):
        schedule(operation.format("steps(0,1)")).sample(4)


def test_no_limit_appears_by_overflow():
    for text in ("constant(1e200)|room(2)", "constant(1e-200)|room(2)"):
        with pytest.raises(ScheduleError, match="goes beyond the numbers that float64 holds"):
            schedule(text)(0.5)
    with pytest.raises(ScheduleError, match="goes beyond the numbers that float64 holds"):
        schedule("nest(constant(1e300), steps(1e30,1e-30))")(0.1)
    assert schedule("steps(0,inf)|room(2)").sample(4).tolist() == [0, 0, math.inf, math.inf]


def test_a_pattern_of_too_many_parts():
    pattern = THROB
    for _ in range(49):
        pattern = pattern.room(0.99)
    assert pattern(0) == pytest.approx(12 ** (0.99**49)) and schedule(str(pattern)) == pattern
    with pytest.raises(ScheduleError, match="made of 51 parts; at most 50"):
        pattern.room(0.99)


def test_every_operation_runs_on_tensors_of_any_shape():
    text = "nest(repeat(reverse(throb(12,3,1,6)), 2)|room(0.5), cosine(1,2))|clip(1,4)|amplitude(2)"
    pattern, u = schedule(text), torch.rand(3, 4, dtype=torch.float64)
    want = [[pattern(x) for x in row] for row in u.tolist()]
    torch.testing.assert_close(pattern(u), torch.tensor(want, dtype=torch.float64))
