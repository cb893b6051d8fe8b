"""Gradients of the posterior: against differences in 60 digits, identities, limits, gradcheck."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from tempering import posterior
from tests.unit import posterior_oracle as oracle

inf = math.inf
PER_ROW = (
    "log_partition",
    "free_energy",
    "mean_energy",
    "entropy",
    "support",
    "heat_capacity",
    "peak",
)


def leaf(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("name", PER_ROW)
@pytest.mark.parametrize("temperature", [0.05, 0.8, 30.0])
def test_gradients_match_differences_in_60_digits(name, temperature):
    row = [0.3, -1.2, 2.5, inf, -1.0]
    d, T = leaf(row), leaf(temperature)
    by_energy, by_temperature = grad(getattr(posterior, name)(d, T), (d, T))
    wanted = [
        0.0 if e == inf else oracle.slope(name, row, temperature, i) for i, e in enumerate(row)
    ]
    assert by_energy.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-13)
    slope = oracle.slope(name, row, temperature, None)
    assert float(by_temperature) == pytest.approx(slope, rel=1e-9)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "function",
    [*(getattr(posterior, name) for name in PER_ROW), posterior.responsibilities,
     posterior.susceptibility, posterior.information],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_gradcheck(function, ties):
    d = torch.randn(3, 4, dtype=torch.float64, generator=torch.manual_seed(5))
    if ties and function is not posterior.peak:  # the peak has a kink where minimisers tie
        d[1] = torch.tensor([0.2, 0.2, 0.9, 0.2])
    inputs = (d.requires_grad_(), leaf([0.4, 1.0, 3.0]))
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_canonical_gradcheck():
    d = torch.randn(3, 4, dtype=torch.float64, generator=torch.manual_seed(6)).requires_grad_()
    assert gradcheck(lambda d: tuple(posterior.canonical(d)), (d,))


def test_thermodynamic_identities():
    d = torch.randn(50, 9, dtype=torch.float64, generator=torch.manual_seed(7)).requires_grad_()
    T = torch.logspace(-1.5, 2, 50, dtype=torch.float64).requires_grad_()
    state = posterior.thermodynamics(d, T)

    def slope(value, by):
        return grad(value.sum(), by, retain_graph=True)[0]

    close = {"rtol": 1e-9, "atol": 1e-12}
    F, U, S, C = state.free_energy, state.mean_energy, state.entropy, state.heat_capacity
    torch.testing.assert_close(slope(F, d), state.responsibilities, **close)
    torch.testing.assert_close(slope(F, T), -S, **close)
    torch.testing.assert_close(slope(U, T), C, **close)
    torch.testing.assert_close(slope(S, T), C / T, **close)
    torch.testing.assert_close(S, (U - F) / T, **close)
    torch.testing.assert_close(S, state.log_partition + U / T, **close)
    torch.testing.assert_close(state.support, S.exp(), **close)
    torch.testing.assert_close(state.peak, state.responsibilities.amax(-1), **close)


def test_implicit_em_identity():
    d = torch.randn(6, 5, dtype=torch.float64, generator=torch.manual_seed(8)).requires_grad_()
    loss = -posterior.log_partition(d)
    torch.testing.assert_close(grad(loss.sum(), d)[0], posterior.responsibilities(d))


def test_susceptibility_is_the_jacobian_of_responsibilities():
    d = torch.randn(5, dtype=torch.float64, generator=torch.manual_seed(9))
    jacobian = torch.autograd.functional.jacobian(lambda d: posterior.responsibilities(d, 0.3), d)
    torch.testing.assert_close(posterior.susceptibility(d, 0.3), jacobian)


ROWS = [
    [0.0, 1.0, 3.0, inf],
    [2.0, 2.0, 2.0, 2.0],
    [-1.0, -1.0, inf, inf],
    [inf, inf, inf, 5.0],
    [0.0, 1e-9, 1e9, inf],
]


# Not float16: tied minimisers have slopes of 1/T, which it can't hold at 1e-30.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-3, 1.0, 1e4, 1e30, inf])
def test_gradients_are_finite_everywhere(dtype, temperature):
    for name in ("responsibilities", *PER_ROW):
        d = leaf(ROWS, dtype)
        T = leaf([temperature] * len(ROWS), torch.float32)
        value = getattr(posterior, name)(d, T)
        # Weights, because a plain sum of responsibilities is constant.
        lean = torch.linspace(0.3, 1.7, value.shape[-1])
        keep = torch.isfinite(value)
        by_energy, by_temperature = grad((value * lean)[keep].sum(), (d, T), allow_unused=True)
        assert torch.isfinite(by_energy).all(), (name, by_energy)
        if name == "log_partition" and 0 < temperature < 1e-20:
            continue  # dlogZ/dT = U/T^2 lies beyond float32
        assert torch.isfinite(by_temperature).all(), (name, by_temperature)
        assert not by_energy[torch.isinf(d)].any(), name


@pytest.mark.parametrize("temperature", [0.0, inf])
def test_gradients_at_the_limits(temperature):
    row = [1.0, 1.0, 4.0, inf]
    d, T = leaf(row), leaf(temperature)
    state = posterior.thermodynamics(d, T)
    for name in ("entropy", "support", "heat_capacity", "peak"):
        for slope in grad(getattr(state, name), (d, T), retain_graph=True):
            assert not slope.any(), name
    # F and U still answer their energies: dF/dd = r and U = sum r d with r fixed.
    for value in (state.free_energy, state.mean_energy):
        slope = grad(value, d, retain_graph=True)[0]
        torch.testing.assert_close(slope, state.responsibilities, rtol=1e-15, atol=0)
    if temperature == 0:
        assert grad(state.free_energy, T)[0] == -state.entropy


def test_each_row_keeps_its_own_gradient_in_a_mixed_temperature():
    d = leaf([[0.0, 1.0, 3.0]] * 3)
    T = leaf([0.0, 0.7, inf])
    by_energy, by_temperature = grad(posterior.entropy(d, T).sum(), (d, T))
    alone_d, alone_T = leaf([0.0, 1.0, 3.0]), leaf(0.7)
    alone = grad(posterior.entropy(alone_d, alone_T), (alone_d, alone_T))
    assert torch.equal(by_energy[1], alone[0])
    assert torch.equal(by_temperature[1], alone[1])
    assert not by_energy[[0, 2]].any()
    assert not by_temperature[[0, 2]].any()


def test_gradient_reaches_a_low_precision_leaf_and_a_broadcast_temperature():
    d = leaf([[0.0, 1.0], [2.0, 0.0]], torch.bfloat16)
    T = leaf(0.5, torch.float64)
    by_energy, by_temperature = grad(posterior.entropy(d, T).sum(), (d, T))
    assert by_energy.dtype == torch.bfloat16
    assert by_temperature.dtype == torch.float64
    assert by_temperature.shape == ()
