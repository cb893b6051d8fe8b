"""Counts and seeds are whole numbers of any library; flags and fractions are none."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tempering as tp
from tempering.agents.strict_yaml import number, whole
from tempering.agents.tasks import generate_tasks
from tempering.attention.tuning.problem import make_problem
from tempering.counts import whole_number
from tempering.errors import InputError, ScheduleError
from tempering.evaluation.paired import bootstrap_mean
from tempering.evaluation.passk import pass_at_k
from tempering.training import ScheduleStepper

KINDS = [int, np.int8, np.int32, np.int64, np.uint16]
THROB = tp.schedule("throb(12,3,1,12)")


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_number_of_any_kind_is_an_int(kind):
    found = whole_number(kind(5), "bins", 1)
    assert found == 5 and type(found) is int


@pytest.mark.parametrize("value", [True, np.True_, 5.0, np.float64(5), "5", None, 0, np.int64(0)])
def test_what_is_no_count(value):
    with pytest.raises(InputError, match=r"bins = .*; expected a whole number, 1 or more"):
        whole_number(value, "bins", 1)


CALLS = {
    "schedule on a clock": lambda k: THROB.sample(k(8)).tolist(),
    "repeated schedule": lambda k: str(THROB.repeat(k(2))),
    "shuffled schedule": lambda k: THROB.shuffled(k(3)).sample(8).tolist(),
    "schedule as steps": lambda k: str(THROB.on_clock(k(8))),
    "pass@k": lambda k: pass_at_k(k(5), k(2), k(3)),
    "bootstrap": lambda k: bootstrap_mean(torch.arange(5.0), seed=k(1), draws=k(50)),
    "tasks": lambda k: generate_tasks(k(4), seed=k(2)),
    "stepper": lambda k: ScheduleStepper(tp.Scheduled("linear(1,2)"), k(9)).state_dict(),
    "prototypes": lambda k: tuple(tp.PrototypeLayer(k(2), k(3)).vectors.shape),
    "plan": lambda k: (whole(k(3), "width", 1), number(k(2), "temperature", 0.0, 3.0)),
}


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("name", CALLS)
def test_numpy_integers_give_what_integers_give(name, kind):
    assert CALLS[name](kind) == CALLS[name](int)


@pytest.mark.parametrize("flag", [True, np.True_])
@pytest.mark.parametrize("name", ["schedule on a clock", "repeated schedule", "pass@k", "stepper"])
def test_flags_are_refused(name, flag):
    # numpy's flag is no index, so the suite's check of annotations refuses it first
    with pytest.raises(
        Exception, match="expected a whole number|Type-check error|violates type hint"
    ):
        CALLS[name](lambda _: flag)


def test_a_plan_takes_no_flag_for_a_number():
    for flag in (True, np.True_):
        with pytest.raises(InputError, match="expected a whole number, 1 or more, got"):
            whole(flag, "width", 1)
        with pytest.raises(InputError, match="expected a number from 0 to 3, got"):
            number(flag, "temperature", 0.0, 3.0)


def test_a_fraction_of_cycles_is_refused():
    with pytest.raises(ScheduleError, match="the n|cycles = 2.5; expected a whole number"):
        type(THROB).repeat.__wrapped__(THROB, 2.5)


def test_requests_hold_numbers_of_any_library():
    for value in (np.float32(0.5), np.float64(0.5)):
        assert str(tp.policy_from_request({"temperature": value})) == "constant(0.5)"
    with pytest.raises(InputError, match="temperature is a number, got np.True_"):
        tp.policy_from_request({"temperature": np.True_})


def test_a_share_that_is_held_out_may_be_numpy_s():
    goals = [SimpleNamespace()]
    with pytest.raises(InputError, match="give an Objective to tune for"):
        make_problem.__wrapped__(goals, None, np.float32(0.2), 0)
