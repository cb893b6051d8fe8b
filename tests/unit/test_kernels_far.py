"""Student-t noise at lengths whose squares no dtype holds."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import tempering as tp

LENGTHS = [0.0, 1e-30, 1e-3, 0.3, 1.0, 1.0000001, 3.0, 50.0, 1e6, 1e17, 1e19, 1e37, 3.4e38]
KERNELS = [
    (1.0, 1.0, 3.0),
    (1.0, 1e-10, 3.0),
    (2.0, 1e-25, 1.0),
    (5.0, 1e10, 3.0),
    (1e19, 1.0, 3.0),
]


def oracle(z, m, sigma, nu):
    """(nu + 1)/2 log of the exact ratio of 1 + (z + m)^2/(nu sigma^2) and its mirror image."""
    z, m, sigma, n = map(Fraction, (z, m, sigma, nu))
    scale = n * sigma * sigma
    less_one = 4 * abs(z) * m / (scale + (abs(z) - m) ** 2)
    if less_one < 1e9:
        log = math.log1p(float(less_one))
    else:
        ratio = 1 + less_one
        log = math.log(ratio.numerator) - math.log(ratio.denominator)
    return math.copysign((nu + 1) / 2 * log, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_log_odds_at_every_length(dtype, kernel):
    m, sigma, nu = (float(torch.tensor(value, dtype=dtype)) for value in kernel)
    lengths = LENGTHS + ([1e160, 1e300, 1.7e308] if dtype == torch.float64 else [])
    z = torch.tensor([*lengths, *(-length for length in lengths)], dtype=dtype, requires_grad=True)
    student = tp.StudentT(m, sigma=sigma, nu=nu)
    odds = student.log_odds(z)
    expected = [oracle(float(value), m, sigma, nu) for value in z.detach()]
    kind = torch.finfo(dtype)
    for found, wanted in zip(odds.tolist(), expected):
        assert found == pytest.approx(wanted, rel=30 * kind.eps, abs=4 * kind.tiny)
    (slope,) = torch.autograd.grad(odds.sum(), z)
    assert torch.isfinite(slope).all() and torch.equal(slope[: len(lengths)], slope[len(lengths) :])
    energies = student.energies(z.detach())
    assert torch.isfinite(energies).all() and (energies >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("statistic", ["mean", "mode", "full", "variance", "entropy", "gate-mean"])
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0, 1e30, math.inf])
def test_activations_far_out(dtype, statistic, temperature):
    """Far out the odds are 4 m/z and more: the mean falls as 1/z, and the limits hold."""
    z = torch.tensor([1e37, 9e37, 3e38, -1e37], dtype=dtype, requires_grad=True)
    a = tp.activation(z, "student-t", statistic, temperature)
    assert torch.isfinite(a).all()
    if a.requires_grad:
        (slope,) = torch.autograd.grad(a.sum(), z)
        assert torch.isfinite(slope).all()
    if statistic == "mean":
        odds = 8 / z.detach().double()  # (nu + 1)/2 x 4 m/z
        expected = {0.0: odds.sign(), math.inf: 0 * odds}.get(
            temperature, torch.tanh(odds / 2 / max(temperature, 1e-30))
        )
        assert torch.allclose(a.detach().double(), expected, rtol=1e-5, atol=1e-43)


def test_prototypes_far_out():
    vectors = torch.tensor([[0.0, 1.0], [1.0, 0.0], [3e20, 3e20]])
    z = torch.tensor([[1e37, 5e36], [2e38, -2e38], [0.3, 0.1]], requires_grad=True)
    kernel = tp.StudentT(tp.Prototypes(vectors))
    exact = tp.StudentT(tp.Prototypes(vectors.double())).energies(z.detach().double())
    energies = kernel.energies(z)
    assert torch.allclose(energies.double(), exact, rtol=1e-5)
    r = tp.activation(z, kernel, "full")
    assert torch.allclose(r[:2], torch.full((2, 3), 1 / 3), atol=1e-5)
    (slope,) = torch.autograd.grad(r[:, 0].sum(), z)
    assert torch.isfinite(slope).all()
    # A row is what it is alone, also beside one that overflows.
    few = torch.tensor([[1e37, 5e36], [0.3, 0.1]])
    plain = tp.StudentT(tp.Prototypes(vectors[:2]))
    assert torch.equal(plain.energies(few)[1:], plain.energies(few[1:]))


def test_values_that_are_equal_but_for_rounding_tell_no_inputs_apart():
    """0 lies on an edge of 256 levels over -1..1: its roundings to both sides are one value."""
    from tempering.units.measures import _levels_of

    values = torch.tensor([-1.0, -1e-17, 0.0, 1e-17, 1.0], dtype=torch.float64).unsqueeze(1)
    assert len(set(_levels_of(values, 256)[1:4, 0].tolist())) == 1
