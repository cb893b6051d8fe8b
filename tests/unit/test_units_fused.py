"""Curves computed piece by piece: the same values and slopes as the plain formula."""

from __future__ import annotations

import pytest
import torch

from tempering.units import fused
from tempering.units.fused import Gate, HardTanh, SechSquared, Sigmoid, Tanh

CURVES = [
    Tanh(1.7),
    Tanh(0.3, bias=0.4),
    Sigmoid(-1.7),
    Sigmoid(0.3, origin=0.5, bias=-0.4),
    HardTanh(1.7, m=0.6),
    HardTanh(0.3, m=2.0, bias=0.4),
    Gate(1.7),
    Gate(-0.3),
    SechSquared(1.7),
    SechSquared(0.3, bias=0.4),
]
EVERY = pytest.mark.parametrize("curve", CURVES, ids=str)


@pytest.fixture
def pieces(monkeypatch):
    """Pieces of 7 elements in float64, so that small tensors go through several and a rest."""
    monkeypatch.setattr(fused, "PIECE_BYTES", 56)
    monkeypatch.setattr(fused, "GRAIN", 1)
    taken = []
    apply = fused._Pieces.apply
    monkeypatch.setattr(fused._Pieces, "apply", lambda z, c: taken.append(c) or apply(z, c))
    return taken


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_equal_the_plain_formula(curve, dtype, pieces):
    torch.manual_seed(0)
    z = torch.randn(5, 19, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, 19, dtype=dtype)
    y, plain = curve(z), curve.plain(z)
    assert pieces == [curve]
    torch.testing.assert_close(y, plain)
    (grad,) = torch.autograd.grad((weight * y).sum(), z)
    (expected,) = torch.autograd.grad((weight * plain).sum(), z)
    torch.testing.assert_close(grad, expected)


@EVERY
def test_gradcheck_twice(curve, pieces):
    torch.manual_seed(1)
    z = torch.randn(23, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(curve, z)
    assert torch.autograd.gradgradcheck(curve, z)
    assert pieces


@EVERY
def test_expanded_gradient_and_inputs_that_are_not_contiguous(curve, pieces):
    z = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(curve(z).sum(), z)  # the gradient of a sum has stride 0
    (strided,) = torch.autograd.grad(curve(z.t()).sum(), z)
    torch.testing.assert_close(grad, strided)
    assert len(pieces) == 1
    torch.testing.assert_close(curve(z[:, ::2]), curve.plain(z)[:, ::2])


@EVERY
def test_half_precision_works_in_float32(curve):
    z = torch.linspace(-3, 3, 50).bfloat16().requires_grad_()
    y = curve(z)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, curve.plain(z.float()).bfloat16())
    y.sum().backward()
    assert z.grad.dtype == torch.bfloat16


def test_transforms_and_the_compiler_see_the_formula(pieces, monkeypatch):
    z = torch.randn(40, dtype=torch.float64)
    curve = Tanh(1.7)
    slopes = 1.7 * (1 - torch.tanh(1.7 * z) ** 2)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(curve))(z), slopes)
    torch.testing.assert_close(torch.func.jvp(curve, (z,), (torch.ones_like(z),))[1], slopes)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, torch.ones_like(z))
        tangent = torch.autograd.forward_ad.unpack_dual(curve(dual)).tangent
    torch.testing.assert_close(tangent, slopes)
    assert not pieces
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(curve(z), curve.plain(z))
    assert not pieces


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EVERY
def test_on_a_gpu(curve):
    z = torch.randn(1000, 33, device="cuda", requires_grad=True)
    y = curve(z)
    assert type(y.grad_fn).__name__ == "_PiecesBackward"
    torch.testing.assert_close(y, curve.plain(z))
    weight = torch.randn_like(z)
    (grad,) = torch.autograd.grad(y, z, weight)
    torch.testing.assert_close(grad, torch.autograd.grad(curve.plain(z), z, weight)[0])


def test_a_large_tensor_goes_in_pieces_by_itself():
    z = torch.linspace(-3, 3, 600_001, requires_grad=True)
    curve = Gate(0.5)
    y = curve(z)
    assert type(y.grad_fn).__name__ == "_PiecesBackward"
    torch.testing.assert_close(y, curve.plain(z))
    assert type(Tanh(1.0)(z).grad_fn).__name__ == "TanhBackward0"


def test_the_gate_is_exact_from_end_to_end():
    odds = torch.linspace(-100, 100, 4001, dtype=torch.float64)
    filled = torch.zeros_like(odds)
    Gate(0.25).fill(4 * odds, filled)
    torch.testing.assert_close(filled, 4 * odds * torch.sigmoid(odds), rtol=1e-15, atol=0.0)


def test_a_small_variance_keeps_its_digits():
    z = torch.tensor([20.0, -30.0])
    exact = torch.cosh(z.double()) ** -2
    plain, filled = SechSquared(1.0).plain(z), torch.zeros(2)
    SechSquared(1.0).fill(z, filled)
    for found in (plain, filled):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0.0)
