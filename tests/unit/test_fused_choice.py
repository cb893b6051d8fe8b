"""The fused kernel is used where it runs and agrees; elsewhere measuring says so and goes on."""

from __future__ import annotations

import warnings

import pytest
import torch

from tempering.attention.logits import AttentionCall
from tempering.attention.measuring import fused, streaming
from tempering.errors import TemperingWarning

CPU = torch.device("cpu")
works = fused._works.__wrapped__


@pytest.fixture
def triton(monkeypatch):
    """As if Triton were installed."""
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: object())


def agreeing(call, first=0, value=None, beta=None):
    return fused.Fused(streaming.moments(call, first), streaming.first_key(call), None)


def test_a_kernel_that_agrees_is_used(triton, monkeypatch):
    monkeypatch.setattr(fused, "run", agreeing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert works(CPU)


@pytest.mark.parametrize("kind", ["off", "nan", "raises"])
def test_one_that_does_not_is_named_and_left(triton, monkeypatch, kind):
    def run(call, first=0, value=None, beta=None):
        if kind == "raises":
            raise RuntimeError("no kernel image is available\nfor this device")
        found = agreeing(call, first)
        wrong = found.moments.second * (float("nan") if kind == "nan" else 1.5)
        return found._replace(moments=found.moments._replace(second=wrong))

    monkeypatch.setattr(fused, "run", run)
    reason = "RuntimeError: no kernel image is available" if kind == "raises" else "it is off by"
    with pytest.warns(TemperingWarning, match=rf"doesn't work on cpu \({reason}"):
        assert not works(CPU)


def test_without_triton_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    assert not works(CPU)


def test_what_the_kernel_can_not_read_goes_the_other_way():
    query, key = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 3, 8)
    call = AttentionCall(query, key, 1.0)
    assert fused.can_run(call) and not fused.serves(call)  # not on a CPU
    for more in ({"mask": torch.zeros(1, 1, 3, 3)}, {"cap": torch.ones(1, 2, 3, 1)}):
        assert not fused.can_run(AttentionCall(query, key, 1.0, **more))
    assert not fused.can_run(AttentionCall(query.double(), key.double(), 1.0))
    assert not fused.can_run(AttentionCall(query, key.bfloat16(), 1.0))
    wide = torch.zeros(1, 2, 3, 264)
    assert not fused.can_run(AttentionCall(wide, wide, 1.0))
