"""A run that is stopped, at any moment and in any way, keeps what it has and goes on from it."""

from __future__ import annotations

import warnings

import pytest
import torch

from tempering import Profile
from tempering.attention.tuning import Constraint, from_batches, tune
from tempering.attention.tuning.batches import text_batches
from tempering.errors import InputError
from tests.integration.tuning_tiny import HEADS, LAYERS, sampled_text, tiny_llama


class Killed(BaseException):
    """What no handler expects, like the end of a process."""


class Stop:
    """Raises at the n-th time that it is told of progress."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.left, self.error, self.calls = at, error, 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        assert 0 < done <= total
        self.calls += 1
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def data(model):
    generator = torch.Generator().manual_seed(1)
    truth = torch.exp(torch.randn(LAYERS, HEADS, generator=generator) * 0.5)
    ids = sampled_text(model, Profile.from_matrix(truth, model), 60, 16, seed=3)
    other = sampled_text(model, None, 30, 16, seed=4)
    return from_batches("text", text_batches(ids)), from_batches("other", text_batches(other))


def _tune(model, data, method, **more):
    options = {"rows": 15, "damping": 0.3, "radius": 0.3, "rate": 0.1, **more}
    steps = 2 if method == "newton" else 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        constraint = Constraint(data[1], 0.05)
        return tune(model, data[0], constraint=constraint, method=method, steps=steps, **options)


def _same(one, other):
    assert torch.equal(one.theta, other.theta)
    assert [tuple(row) for row in one.history] == [tuple(row) for row in other.history]
    assert one.trade_off == other.trade_off and one.stopped_because == other.stopped_because
    assert torch.equal(one.profile.temperature, other.profile.temperature)


@pytest.mark.parametrize("method", ["newton", "adam"])
def test_a_killed_run_goes_on_to_the_same_result(model, data, method, tmp_path):
    counter = Stop(10**9, Killed)
    whole = _tune(model, data, method, progress=counter)
    # Killed again and again, each time a little later, until a run gets through.
    state, lives = tmp_path / "run.state", 0
    while True:
        try:
            found = _tune(model, data, method, state=state, progress=Stop(11, Killed))
            break
        except Killed:
            lives += 1
            assert lives < counter.calls
    assert lives >= 2
    _same(whole, found)
    # The finished run's result is given again, without learning anew.
    again = Stop(10**9, Killed)
    _same(whole, _tune(model, data, method, state=state, progress=again))
    assert again.calls < counter.calls / 2


def test_ctrl_c_at_any_moment_keeps_the_best_so_far(model, data, tmp_path):
    counter = Stop(10**9, KeyboardInterrupt)
    whole = _tune(model, data, "newton", progress=counter)
    early = 0
    for at in range(1, counter.calls + 1, 2):
        state = tmp_path / f"{at}.state"
        try:
            found = _tune(model, data, "newton", state=state, progress=Stop(at, KeyboardInterrupt))
        except KeyboardInterrupt:
            early += 1  # nothing at all was known yet
        else:
            assert found.stopped_because == "interrupted"
            assert found.after <= found.before
            assert (found.cost or 0.0) <= 0.05
        assert not any(hasattr(module, "_tempering") for module in model.modules())
        assert all(weight.requires_grad for weight in model.parameters())
        if at % 6 == 1:
            _same(whole, _tune(model, data, "newton", state=state))
    assert early < 4


def test_steps_are_told_as_they_come(model, data):
    rows = []
    found = _tune(model, data, "newton", on_step=rows.append)
    assert [row.step for row in rows] == [row.step for row in found.history]
    assert rows[0].loss is not None and rows[0].cost == 0.0
    told = rows[1].row()
    assert told["step"] == 1 and told["held_out"] == rows[1].held_out and "layer" in told["moved"]


def test_the_state_of_another_run_is_refused(model, data, tmp_path):
    state = tmp_path / "run.state"
    _tune(model, data, "newton", state=state)
    with pytest.raises(InputError, match=r"keeps another run \(another .*seed"):
        _tune(model, data, "newton", state=state, seed=5)
    with pytest.raises(InputError, match="another model"):
        _tune(tiny_llama(seed=1), data, "newton", state=state)
    with pytest.raises(InputError, match="another .*radius"):
        _tune(model, data, "newton", state=state, radius=0.1)
