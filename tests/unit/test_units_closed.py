"""Closed forms: chosen where they should be, and equal to the two-hypothesis softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from tempering.kernels import (
    Angular,
    Centred,
    Gaussian,
    Huber,
    Kernel,
    Laplace,
    Logistic,
    Mahalanobis,
    PseudoHuber,
    Signed,
    StudentT,
)
from tempering.posterior import responsibilities
from tempering.units import STATISTICS, activation, closed_form
from tempering.units.closed import Between, ReLU, SignStep
from tempering.units.fused import Gate, HardTanh, SechSquared, Sigmoid, Tanh

Z = torch.linspace(-4, 4, 81, dtype=torch.float64)
SKEWED = Signed(0.8, (1.0, 4.0))


def softmax(kernel: Kernel, statistic: str, temperature: float) -> torch.Tensor:
    """The statistic by way of energies and responsibilities, which no closed form touches."""
    energies = kernel.energies(Z)
    r = responsibilities(energies, temperature)
    if kernel.hypotheses.prior is not None:
        r = r * torch.as_tensor(kernel.hypotheses.prior, dtype=r.dtype)
        r = r / r.sum(-1, keepdim=True)
    values = kernel.hypotheses.values(Z)
    if statistic == "mode":
        return torch.sign(r[:, 1] - r[:, 0])
    if statistic == "gate-mode":
        return Z * (r[:, 1] > r[:, 0])
    if statistic == "gate-mean":
        return Z * r[:, 1]
    mean = (r * values).sum(-1)
    return mean if statistic == "mean" else (r * (values - mean.unsqueeze(-1)) ** 2).sum(-1)


CASES = [
    (Gaussian(0.8, 0.9), "mean", 0.7, Tanh),
    (Gaussian(SKEWED, 0.9), "mean", 0.7, Tanh),
    (Laplace(0.8, 0.9), "mean", 0.7, HardTanh),
    (Laplace(SKEWED, 0.9), "mean", 0.7, HardTanh),
    (Gaussian(0.8, 0.9), "variance", 0.7, SechSquared),
    (Gaussian(SKEWED, 0.9), "variance", 0.7, SechSquared),
    (Gaussian(0.8, 0.9), "gate-mean", 0.7, Gate),
    (Gaussian(Centred([0.0, 1.0]), 0.9), "mean", 0.7, Sigmoid),
    (Gaussian(Centred([0.0, 1.0], (1, 3)), 0.9), "mean", 0.7, Sigmoid),
    (Gaussian(Centred([-2.0, 0.5], (1, 3)), 0.9), "mean", 0.7, Between),
    (Gaussian(Centred([2.0, -0.5]), 0.9), "mean", 0.7, Between),
    (Gaussian(0.8), "mean", 0.0, SignStep),
    (Laplace(0.8), "mean", 0.0, SignStep),
    (Gaussian(0.8), "gate-mean", 0.0, ReLU),
]
CASES += [
    (kind(0.8), statistic, temperature, form)
    for kind in (Gaussian, Laplace, StudentT, Huber, PseudoHuber, Logistic)
    for statistic, form in (("mode", SignStep), ("gate-mode", ReLU))
    for temperature in (0.0, 0.7)
]


@pytest.mark.parametrize(("kernel", "statistic", "temperature", "form"), CASES)
def test_closed_form_is_chosen_and_equals_the_softmax(kernel, statistic, temperature, form):
    assert type(closed_form(kernel, statistic, temperature)) is form
    torch.testing.assert_close(
        activation(Z, kernel, statistic, temperature),
        softmax(kernel, statistic, temperature),
        rtol=1e-9, atol=1e-12,
    )  # fmt: skip


def test_names_that_everybody_knows():
    torch.testing.assert_close(activation(Z, "gaussian", "mean"), torch.tanh(Z))
    silu = activation(Z, Gaussian(1.0, math.sqrt(2.0)), "gate-mean")
    torch.testing.assert_close(silu, functional.silu(Z))
    torch.testing.assert_close(activation(Z, "gaussian", "gate-mean", 0.0), functional.relu(Z))
    torch.testing.assert_close(activation(Z, "laplace", "gate-mode"), functional.relu(Z))
    torch.testing.assert_close(
        activation(Z, "gaussian", "full")[:, 1], torch.sigmoid(2 * Z), rtol=1e-12, atol=1e-15
    )
    # exp(1/2) of prior odds moves the threshold between the centres 0 and 1 back to 0.
    logit = Gaussian(Centred([0.0, 1.0], torch.tensor([1.0, math.exp(0.5)]).double()))
    torch.testing.assert_close(activation(Z, logit, "mean"), torch.sigmoid(Z))
    torch.testing.assert_close(activation(Z, "gaussian", "mode"), torch.sign(Z))
    torch.testing.assert_close(activation(Z, "gaussian", "variance"), torch.cosh(Z) ** -2)
    torch.testing.assert_close(
        activation(Z, Laplace(0.5, 2.0), "mean", 0.25), torch.tanh(Z.clamp(-0.5, 0.5) / 0.5)
    )


def test_the_builtin_itself_where_nothing_is_left_to_scale():
    z = torch.randn(1000)
    assert torch.equal(activation(z, "gaussian", "mean"), torch.tanh(z))
    gate = closed_form(Gaussian(0.5), "gate-mean")
    assert gate is not None and torch.equal(gate(z), functional.silu(z))


@pytest.mark.parametrize(
    ("kernel", "statistic", "temperature"),
    [
        (Gaussian(), "mean", math.inf),
        (Gaussian(SKEWED), "mode", 0.5),
        (Gaussian(SKEWED), "gate-mean", 0.5),
        (Gaussian(SKEWED), "mean", 0.0),
        (Gaussian(torch.tensor([1.0, 2.0])), "mean", 0.5),
        (Gaussian(1.0, torch.tensor(1.0, requires_grad=True)), "mean", 0.5),
        (Gaussian(), "mean", torch.tensor(0.5, requires_grad=True)),
        (Gaussian(), "mean", torch.tensor([0.5])),
        (Gaussian(), "mean", 1e-30),
        (Laplace(), "mean", 1e-300),
        (Gaussian(), "entropy", 1.0),
        (Gaussian(), "full", 1.0),
        (Angular(), "mode", 1.0),
        (StudentT(), "mean", 1.0),
        (Laplace(Centred([0.0, 1.0])), "mean", 1.0),
        (Gaussian(Centred([0.0, 1.0, 2.0])), "mean", 1.0),
        (Gaussian(Centred(torch.zeros(3, 2) + torch.tensor([0.0, 1.0]))), "mean", 1.0),
        (Mahalanobis(torch.ones(2), torch.eye(2)), "mean", 1.0),
    ],
)
def test_no_closed_form_where_there_is_none(kernel, statistic, temperature):
    assert closed_form(kernel, statistic, temperature) is None


def test_a_number_in_a_tensor_counts_as_a_number():
    assert closed_form(Gaussian(), "mean", torch.tensor(0.5)) == Tanh(2.0, bias=0.0)
    assert closed_form(Gaussian(torch.tensor(2.0)), "mean", 0.5) == Tanh(4.0, bias=0.0)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_too_cold_for_a_closed_form_is_exact_all_the_same(statistic):
    """1e-30 puts c z beyond float32 for large z; the general path saturates instead."""
    near = [-1.0, -1e-3, 0.0, 1e-3, 1.0]
    for kernel, far in (
        (Gaussian(), 1e10),
        (Laplace(), 1e10),
        (Gaussian(Centred([0.0, 1.0])), 9.0),
    ):
        z = torch.tensor([-far, *near, far], requires_grad=True)
        cold = activation(z, kernel, statistic, 1e-30)
        limit = activation(z, kernel, statistic, 0.0)
        torch.testing.assert_close(cold, limit)
        if cold.requires_grad:
            (grad,) = torch.autograd.grad(cold.sum(), z)
            assert torch.isfinite(grad[z.detach() != 0]).all()
