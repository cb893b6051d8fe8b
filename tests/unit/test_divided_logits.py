"""Logits over T where masking is one known value: the same as entry by entry, in fewer passes."""

from __future__ import annotations

import math

import pytest
import torch

from tempering.attention.hooks import dividing

BETAS = torch.tensor([1e-3, 0.7, 1.0, 1e3])[None, :, None, None]


def logits(dtype, masking):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, 4, 9, 9, generator=generator) * 30
    hidden = torch.ones(9, 9).triu(1).bool() | (torch.arange(9) == 2)
    return drawn.to(dtype).masked_fill(hidden, masking), hidden


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("infinite", [False, True])
def test_fewer_passes_change_no_bit(dtype, infinite):
    lowest = -math.inf if infinite else torch.finfo(dtype).min
    given, hidden = logits(dtype, lowest)
    floor = torch.finfo(dtype).min / 2
    quick = dividing.divided(given, BETAS, floor, lowest)
    assert torch.equal(quick, dividing.scaled(given, BETAS, floor))
    assert quick.dtype == dtype
    assert bool((quick[:, :, hidden] == lowest).all())
    assert torch.equal(quick[:, 2], given[:, 2])


def test_another_value_of_masking_is_found_entry_by_entry():
    given, hidden = logits(torch.float32, -1e4)
    quick = dividing.divided(given, BETAS, -5e3, None)
    assert bool((quick[:, :, hidden] == -1e4).all())
    assert torch.equal(quick[:, 1][:, ~hidden], (given[:, 1] * BETAS[0, 1, 0, 0])[:, ~hidden])


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float64).min, -math.inf])
def test_gradients_pass(lowest):
    _, hidden = logits(torch.float64, lowest)
    live = torch.randn(2, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    beta = BETAS.double().requires_grad_()

    def weights(divide):
        masked = live.masked_fill(hidden, lowest)
        return divide(masked, beta).softmax(-1).square().sum()

    floor = torch.finfo(torch.float64).min / 2
    quick = torch.autograd.grad(
        weights(lambda x, b: dividing.divided(x, b, floor, lowest)), (live, beta)
    )
    plain = torch.autograd.grad(weights(lambda x, b: dividing.scaled(x, b, floor)), (live, beta))
    for own, other in zip(quick, plain, strict=True):
        assert bool(own.isfinite().all())
        torch.testing.assert_close(own, other)
