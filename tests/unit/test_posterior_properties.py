"""Laws of the posterior, searched for counterexamples."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as arrays
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempering import posterior

energy = st.floats(-50, 50, width=32) | st.sampled_from([math.inf, 0.0, 1.0])


@st.composite
def rows(draw):
    """One to three rows of up to eight energies, each with a finite one; ties are likely."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 8)))
    values = draw(arrays.arrays(np.float64, shape, elements=energy))
    values[:, 0] = np.where(np.isfinite(values).any(1), values[:, 0], 0.0)
    return torch.from_numpy(values)


# No deadline: a busy machine is no counterexample.
law = settings(deadline=None)
temperatures = st.floats(1e-4, 1e4)
# Powers of two change no digit, so gauge invariance holds to the rounding of the shift alone.
scales = st.integers(-20, 20).map(lambda n: 2.0**n)


@law
@given(rows(), temperatures)
def test_ranges(d, T):
    state = posterior.thermodynamics(d, T)
    finite = torch.isfinite(d).sum(-1).double()
    r = state.responsibilities
    assert ((r >= 0) & (r <= 1)).all()
    assert not r[torch.isinf(d)].any()
    torch.testing.assert_close(r.sum(-1), torch.ones(len(d), dtype=torch.float64))
    assert (state.entropy >= 0).all()
    assert (state.support >= 1).all()
    assert (state.support <= finite * (1 + 1e-12)).all()
    assert (state.heat_capacity >= 0).all()
    assert ((state.peak >= 1 / finite * (1 - 1e-12)) & (state.peak <= 1)).all()
    least = torch.where(torch.isinf(d), math.inf, d).amin(-1)
    assert (state.free_energy <= least + 1e-9).all()
    assert (state.mean_energy >= least).all()


@law
@given(rows(), temperatures, scales)
def test_scale_gauge_is_exact(d, T, a):
    before, after = posterior.thermodynamics(d, T), posterior.thermodynamics(a * d, a * T)
    for name in ("responsibilities", "entropy", "support", "heat_capacity", "peak"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name


@law
@given(rows(), st.floats(0.01, 100), st.floats(-100, 100))
def test_shift_gauge(d, T, c):
    before, after = posterior.thermodynamics(d, T), posterior.thermodynamics(d + c, T)
    bound = 1e-13 / T + 1e-13
    for name in ("responsibilities", "entropy", "support", "heat_capacity", "peak"):
        a, b = getattr(before, name), getattr(after, name)
        torch.testing.assert_close(a, b, rtol=100 * bound, atol=100 * bound)
    torch.testing.assert_close(before.free_energy + c, after.free_energy, rtol=1e-9, atol=1e-9)


@law
@given(rows(), temperatures, st.floats(1.0, 100.0))
def test_support_rises_with_temperature(d, T, factor):
    cold, hot = posterior.support(d, T), posterior.support(d, T * factor)
    assert (hot >= cold * (1 - 1e-13)).all()
    strict = torch.where(torch.isinf(d), d.amin(-1, keepdim=True), d).amax(-1) > d.amin(-1)
    measurable = strict & (posterior.heat_capacity(d, T) > 1e-6)
    if factor > 1.001:
        assert (hot > cold)[measurable].all()


@law
@given(rows())
def test_limits_are_limits(d):
    finite = torch.isfinite(d)
    ties = (d == d.amin(-1, keepdim=True)).sum(-1).double()
    assert torch.equal(posterior.support(d, 0.0), ties)
    assert torch.equal(posterior.support(d, math.inf), finite.sum(-1).double())
    torch.testing.assert_close(
        posterior.responsibilities(d, math.inf), posterior.responsibilities(d, 1e14)
    )
    assert torch.equal(posterior.responsibilities(d, 0.0), posterior.responsibilities(d, 1e-310))


@law
@given(rows(), temperatures)
def test_canonical_is_one_gauge_for_all(d, T):
    gauge = posterior.canonical(d)
    shift, spread = gauge.shift.unsqueeze(-1), gauge.spread.unsqueeze(-1)
    assert (gauge.spread > 0).all()
    torch.testing.assert_close(shift + spread * gauge.energies, d)
    assert not gauge.energies.amin(-1).any()
    assert torch.equal(posterior.canonical(4.0 * d).energies, gauge.energies)
    grid = (8 * d).round() / 8  # so that a shift loses no digit
    moved = posterior.canonical(grid - 1.0).energies
    assert torch.equal(moved, posterior.canonical(grid).energies)
    bound = 1e-11 * (1 + 1 / T)
    torch.testing.assert_close(
        posterior.responsibilities(d, T),
        posterior.responsibilities(gauge.energies, T / gauge.spread),
        rtol=bound,
        atol=bound,
    )


@law
@given(rows(), temperatures)
def test_information_is_between_zero_and_the_entropy_of_the_mixture(d, T):
    kept = float(posterior.information(d, T))
    assert 0 <= kept <= math.log(min(d.shape)) + 1e-12


@law
@given(rows(), st.floats(0.001, 0.999))
def test_solved_temperature_gives_back_the_support(d, share):
    low, high = posterior.support(d, 0.0), posterior.support(d, math.inf)
    d = d[low < high]
    wanted = (low + share * (high - low))[low < high]
    T = posterior.temperature_for(d, wanted)
    torch.testing.assert_close(posterior.support(d, T), wanted, rtol=1e-9, atol=0)


@law
@given(rows(), st.floats(0.05, 20.0))
def test_support_gives_back_the_temperature(d, T):
    d = d[posterior.heat_capacity(d, T) > 1e-3]
    back = posterior.temperature_for(d, posterior.support(d, T))
    torch.testing.assert_close(back, torch.full_like(back, T), rtol=1e-8, atol=0)
