"""gradcheck over every differentiable path: inputs, temperature, parameters, prior."""

from __future__ import annotations

import pytest
import torch

from tempering.kernels import (
    Angular,
    Centred,
    Gaussian,
    Huber,
    Laplace,
    Logistic,
    Mahalanobis,
    Prototypes,
    PseudoHuber,
    Signed,
    StudentT,
)
from tempering.temperature import Targeted
from tempering.units import Activation, activation

LINE = (Gaussian, Laplace, StudentT, Huber, PseudoHuber, Logistic, Angular)
SMOOTH = ("mean", "full", "variance", "entropy", "gate-mean")
# Off the kinks of Laplace and Huber, and off z = 0, where the formulas by |z| change sides.
Z = torch.tensor([[-2.3, 0.45], [1.1, -0.37]], dtype=torch.float64)


def leaf(*values: float) -> torch.Tensor:
    tensor = torch.tensor(values, dtype=torch.float64)
    return (tensor.squeeze() if len(values) == 1 else tensor).requires_grad_()


def check(function, *leaves):
    assert torch.autograd.gradcheck(function, leaves, atol=1e-7)


@pytest.mark.parametrize("kind", LINE)
@pytest.mark.parametrize("statistic", SMOOTH)
def test_signed(kind, statistic):
    check(
        lambda z, m, width, level, prior: activation(
            z, kind(Signed(m, prior), width), statistic, level
        ),
        Z.clone().requires_grad_(), leaf(1.3), leaf(0.9), leaf(0.7), leaf(1.0, 2.0),
    )  # fmt: skip


@pytest.mark.parametrize("kind", LINE)
@pytest.mark.parametrize("statistic", SMOOTH)
def test_centred(kind, statistic):
    check(
        lambda z, centres, width, level, prior: activation(
            z, kind(Centred(centres, prior), width), statistic, level
        ),
        Z.clone().requires_grad_(), leaf(-1.5, 0.21, 1.9), leaf(0.9), leaf(0.7, 1.4),
        leaf(1.0, 2.0, 0.5),
    )  # fmt: skip


@pytest.mark.parametrize("kind", LINE)
@pytest.mark.parametrize("statistic", SMOOTH)
def test_prototypes(kind, statistic):
    vectors = torch.tensor([[0.0, 1.0], [-1.0, 0.5], [2.0, -1.0]], dtype=torch.float64)
    check(
        lambda z, vectors, width, level: activation(
            z, kind(Prototypes(vectors), width), statistic, level
        ),
        Z.clone().requires_grad_(), vectors.requires_grad_(), leaf(0.9), leaf(0.7),
    )  # fmt: skip


@pytest.mark.parametrize("statistic", SMOOTH)
def test_mahalanobis(statistic):
    root = torch.tensor([[1.2, 0.0], [0.4, 0.8]], dtype=torch.float64).requires_grad_()
    check(
        lambda z, m, root: activation(z, Mahalanobis(m, root @ root.mT), statistic, 0.7),
        Z.clone().requires_grad_(), leaf(1.0, -0.5), root,
    )  # fmt: skip


@pytest.mark.parametrize("kind", LINE)
def test_slopes_at_the_origin_and_at_a_centre(kind):
    """Formulas that change sides at 0 must join there; autograd's sign(0) = 0 would not."""
    for point in (0.0, 1.3):
        if kind in (Laplace, Huber) and point == 1.3:
            continue  # a true kink
        check(lambda z: activation(z, kind(1.3, 0.9), "mean", 0.7), leaf(point))


def test_slopes_on_the_seam_of_huber():
    """z - m = -delta but for rounding: clips on different sides must not mix their slopes."""
    z, m, delta = leaf(0.4), leaf(1.3), leaf(0.9)
    assert torch.autograd.gradcheck(
        lambda *given: activation(given[0], Huber(*given[1:]), "mean"), (z, m, delta), atol=1e-5
    )


@pytest.mark.parametrize("statistic", ["mode", "gate-mode"])
def test_modes_pass_no_gradient_but_through_the_gate(statistic):
    for kernel in (Gaussian(), Gaussian(Signed(1.0, (1, 2))), Gaussian(Centred([-1.0, 0.0, 2.0]))):
        z = Z.clone().requires_grad_()
        found = activation(z, kernel, statistic, 0.7)
        if statistic == "mode" and not found.requires_grad:
            continue
        (grad,) = torch.autograd.grad(found.sum(), z)
        on = torch.zeros_like(Z) if statistic == "mode" else (found.detach() / Z)
        torch.testing.assert_close(grad, on)


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-30, float("inf")])
@pytest.mark.parametrize("statistic", SMOOTH)
def test_gradients_at_the_limits_are_finite(statistic, temperature):
    for hypotheses in (Signed(1.0), Signed(1.0, (1, 2)), Centred([-1.0, 0.0], (1, 2))):
        z = Z.float().requires_grad_()
        level = torch.tensor(temperature, requires_grad=True)
        found = activation(z, Logistic(hypotheses), statistic, level)
        grads = torch.autograd.grad(found.sum(), (z, level), allow_unused=True)
        for grad in grads:
            assert grad is None or torch.isfinite(grad).all()


@pytest.mark.parametrize("statistic", SMOOTH)
def test_targeted_temperature_is_differentiated_through(statistic):
    vectors = torch.tensor([[0.0, 1.0], [-1.0, 0.5], [2.0, -1.0]], dtype=torch.float64)
    module = Activation(Gaussian(Prototypes(vectors)), statistic, Targeted(1.8))
    check(module, Z.clone().requires_grad_())
