"""Searches for a score without a gradient."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import pytest
import torch

from tempering import Profile, layout, tempered
from tempering.attention.tuning import pattern_basis, search, uniform_basis
from tempering.errors import (
    ConvergenceWarning,
    InputError,
    MissingExtraError,
    RefusedError,
    TemperingWarning,
)
from tests.integration.tuning_tiny import LAYERS, tiny_llama

TEXT = torch.arange(12)[None]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def closeness(model):
    """How near the model's answers are to those under T = 0.7; best there."""
    with torch.no_grad(), tempered(model, Profile.from_schedule(0.7, model)):
        goal = model(input_ids=TEXT).logits

    def score(network):
        return -float((network(input_ids=TEXT).logits - goal).square().mean())

    return score


def test_the_best_temperature_is_found(model, closeness):
    found = search(
        model, closeness, per=uniform_basis(layout(model)), trials=25, held_out=closeness
    )
    assert float(found.theta.exp()) == pytest.approx(0.7, abs=0.03)
    assert found.score == max(trial.score for trial in found.trials) > found.untempered
    assert found.trials[0].theta == (0.0,) and found.trials[0].score == found.untempered
    assert found.held_out == (found.untempered, found.score)
    assert torch.allclose(found.profile.temperature, found.theta.exp().expand(LAYERS, 4), rtol=0.05)
    assert found.stopped_because == "all trials made"
    with torch.no_grad(), tempered(model, found.profile):
        assert closeness(model) == pytest.approx(found.score, rel=1e-4)
    assert not any(hasattr(module, "_tempering") for module in model.modules())


def test_a_search_that_was_stopped_goes_on_to_the_same_result(model, closeness, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TemperingWarning)  # three layers show a pattern poorly
        basis = pattern_basis(layout(model), ["linear(2,0.5)", "linear(0.5,2)"])
        whole = search(model, closeness, per=basis, trials=14, seed=3)
        calls = []

        def stopping(network):
            calls.append(1)
            if len(calls) in (5, 9):
                raise KeyboardInterrupt
            return closeness(network)

        stopping.__qualname__ = closeness.__qualname__
        state = tmp_path / "search"
        first = search(model, stopping, per=basis, trials=14, seed=3, state=state)
        assert first.stopped_because == "interrupted" and len(first.trials) == 4
        search(model, stopping, per=basis, trials=14, seed=3, state=state)
        found = search(model, stopping, per=basis, trials=14, seed=3, state=state)
    assert found.trials == whole.trials and len(calls) == 16


def test_a_search_that_finds_nothing_says_so(model):
    with pytest.warns(ConvergenceWarning, match="no trial scored above the untempered model's 1"):
        found = search(model, lambda network: 1.0, trials=3)
    assert torch.equal(found.profile.temperature, torch.ones(LAYERS, 4).double())


def test_what_cannot_be_searched_is_refused(model, monkeypatch):
    with pytest.raises(RefusedError, match=r"trial 0: the score is nan at T: T 1; return a finite"):
        search(model, lambda network: float("nan"), per=uniform_basis(layout(model)))
    with pytest.raises(InputError, match="at least 2 trials, not 1"):
        search(model, lambda network: 1.0, trials=1)
    wide = uniform_basis(layout(model))
    wide = replace(wide, matrix=torch.ones(12, 30).double(), names=tuple(map(str, range(30))))
    with pytest.raises(InputError, match=r"at most 24 numbers, and per='model' has 30"):
        search(model, lambda network: 1.0, per=wide)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"'optuna'.*pip install 'tempering\[tune\]'"):
        search(model, lambda network: 1.0)
