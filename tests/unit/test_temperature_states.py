"""Temperatures stay within their bounds to the last bit, and load no state of another module."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tempering.errors import ScheduleError, TemperatureError
from tempering.temperature import Fixed, Learned, Scheduled, Targeted
from tempering.training import ScheduleStepper


@pytest.mark.parametrize(
    "bounds",
    [(0.01, 100.0), (0.05, 20.0), (1e-30, 1e30), (1e-50, 1e39), (0.1, 0.3), (1e-300, 1e300)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [-1e9, -30.0, 0.0, 30.0, 1e9, math.inf, -math.inf])
def test_no_rounding_carries_it_over_a_bound(bounds, dtype, x):
    low, high = bounds
    module = Learned(math.sqrt(low * high), bounds=bounds)
    with torch.no_grad():
        module.unbounded.fill_(x)
    for energies in (None, torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=torch.float16)):
        level = module(energies).item()
        assert low <= level <= high
        assert 0 < level < math.inf
    assert math.log(low) <= module.log_temperature.item() <= math.log(high)


def test_a_start_next_to_a_bound():
    for start in (99.9999999, 0.0100000001):
        level = Learned(start, bounds=(0.01, 100.0))().item()
        assert 0.01 <= level <= 100
        assert level == pytest.approx(start, rel=1e-6)
    with pytest.raises(TemperatureError, match=r"can't start at .*start further inside 0\.01"):
        Learned(math.nextafter(0.01, 1), bounds=(0.01, 100.0))


def test_gradients_are_those_of_the_formula_at_the_bounds_too():
    module = Learned(1.0, bounds=(0.01, 100.0))
    for x in (-7.0, 0.3, 6.5):
        with torch.no_grad():
            module.unbounded.fill_(x)
        (slope,) = torch.autograd.grad(module(), module.unbounded)
        width = math.log(100)
        place = math.tanh(x / width)
        expected = math.exp(width * place) * (1 - place**2)
        assert slope.item() == pytest.approx(expected, rel=1e-5)


def test_a_state_of_other_bounds_is_refused():
    saved = nn.ModuleDict({"t": Learned(2.0, bounds=(0.01, 100.0))}).state_dict()
    same = nn.ModuleDict({"t": Learned(1.0, bounds=(0.01, 100.0))})
    same.load_state_dict(saved)
    assert same["t"]().item() == pytest.approx(2.0, rel=1e-6)
    other = nn.ModuleDict({"t": Learned(1.0)})
    with pytest.raises(TemperatureError, match=r"bounds 0\.01 to 100, this one has 0\.05 to 20"):
        other.load_state_dict(saved)
    assert other["t"]().item() == pytest.approx(1.0)
    halves = {key: value.bfloat16() for key, value in saved.items()}
    same.load_state_dict(halves)
    assert same["t"]().item() == pytest.approx(2.0, rel=2e-2)


def test_a_state_of_before_names_no_bounds():
    saved = Learned(2.0).state_dict()
    del saved["limits"]
    module = Learned(1.0)
    module.load_state_dict(saved)  # strict
    assert module().item() == pytest.approx(2.0)
    with pytest.raises(RuntimeError, match="unbounded"):
        module.load_state_dict({})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_that_is_not_finite_is_refused(value):
    module = Learned(1.0, shape=(2, 2))
    saved = module.state_dict()
    saved["unbounded"] = saved["unbounded"].clone()
    saved["unbounded"][0, 1] = value
    with pytest.raises(TemperatureError, match=r"is not finite at \[0, 1\]; load an earlier one"):
        module.load_state_dict(saved)


@pytest.mark.parametrize("kind", [Scheduled, Targeted])
def test_a_state_of_another_schedule_is_refused(kind):
    first = kind("linear(2,4)")
    first.step(0.25)
    again = kind("linear(2,4)")
    again.load_state_dict(first.state_dict())
    assert again.reading.item() == 2.5 and again.progress.item() == 0.25
    with pytest.raises(ScheduleError, match=r"reads 2\.5 at u = 0\.25, and linear\(2,8\) is 3\.5"):
        kind("linear(2,8)").load_state_dict(first.state_dict())
    for u in (-0.5, math.nan, 3.0):
        state = {**first.state_dict(), "progress": torch.tensor(u, dtype=torch.float64)}
        with pytest.raises(ScheduleError, match="progress is a number in"):
            again.load_state_dict(state)
    assert again.reading.item() == 2.5
    constant = kind("constant(3)")
    constant.load_state_dict(kind("constant(3)").state_dict())


def test_a_fixed_state_is_a_temperature():
    module = Fixed([1.0, 2.0])
    with pytest.raises(TemperatureError, match=r"got -1 at position \[1\]"):
        module.load_state_dict({"value": torch.tensor([1.0, -1.0])})
    module.load_state_dict({"value": torch.tensor([0.0, math.inf])})
    assert module().tolist() == [0.0, math.inf]


def test_a_stepper_names_what_its_state_lacks():
    stepper = ScheduleStepper(Scheduled("linear(1,2)"), 10)
    with pytest.raises(ScheduleError, match="has no total_steps; it is not the state_dict"):
        stepper.load_state_dict({"completed": 2})
    with pytest.raises(ScheduleError, match=r"no completed and no total_steps.*holds nothing"):
        stepper.load_state_dict({})
    for wrong in (2.5, -1, True, "2"):
        with pytest.raises(ScheduleError, match="completed steps = .*; expected a whole number, 0"):
            type(stepper).load_state_dict.__wrapped__(
                stepper, {"completed": wrong, "total_steps": 10}
            )
    with pytest.raises(ScheduleError, match="11 completed steps lie outside this run of 10"):
        stepper.load_state_dict({"completed": 11, "total_steps": 10})
    assert stepper.completed == 0
    for five in (5, np.int64(5), torch.tensor(5)):
        state = {"completed": five, "total_steps": torch.tensor(10)}
        type(stepper).load_state_dict.__wrapped__(stepper, state)
        assert stepper.completed == 5 and type(stepper.state_dict()["completed"]) is int
