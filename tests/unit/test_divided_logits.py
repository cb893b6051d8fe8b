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
    # Over T < 1, live logits come to lie under -1e4: the masking must stay under them.
    assert given[:, 3][:, ~hidden].min() / 1e-3 < -1e4
    assert torch.equal(quick, quick.where(~hidden, -1e4 * BETAS.clamp(min=1)))
    assert bool((quick.softmax(-1)[:, :, hidden] == 0).all())
    assert torch.equal(quick[:, 1][:, ~hidden], (given[:, 1] * BETAS[0, 1, 0, 0])[:, ~hidden])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_additive_mask_of_mild_constants_stays_a_mask(dtype):
    """As models of diffusers add it, -1e4, beside infinite ones; 0 stays 0."""
    mask = torch.tensor([0.0, -1e4, -math.inf, torch.finfo(dtype).min], dtype=dtype)
    over_t = dividing.scaled_mask(mask[None, None, None], BETAS, -5e3)
    assert over_t.dtype == dtype
    assert bool((over_t[..., 0] == 0).all())
    cold, own = over_t[0, 3, 0, 1].item(), over_t[0, 2, 0, 1].item()
    assert own == mask[1].item()
    assert cold == max(mask[1].item() * 1e3, torch.finfo(dtype).min) or dtype == torch.bfloat16
    assert cold < -6e4
    assert bool((over_t[..., 2] == -math.inf).all())
    assert bool((over_t[..., 3] == torch.finfo(dtype).min).all())


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
