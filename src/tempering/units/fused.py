"""Closed-form activations in one pass over memory, as PyTorch's own activations are.

tanh(c z) as a formula reads and writes the whole tensor twice. On a CPU the work here goes piece by
piece: a scaled piece is still in the cache when tanh overwrites it, so memory is passed over once.
The backward pass does the same. On a GPU there is one piece.

torch.compile fuses the same formulas. On 4 million float32 values, one thread, its code took 0.3 to
0.9 of the time of this module for tanh, the gate and sech^2, and 2 to 3 times as long for the hard
tanh (the formula without either: 1.1 to 2.5 times as long). But it needs a C++ compiler on the
user's machine, takes 7 to 20 seconds to compile each curve, and compiles again for each new c, so
for each new temperature. So this module is the default, and it leaves the formula to the compiler
where a user compiles the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

# A piece of the input and one of the output fit in a core's second-level cache; at this size the
# calls into torch cost a few per cent of the work (benchmarks/activations.py).
PIECE_BYTES = 512 * 1024
# Torch splits elementwise work over threads in grains of this many elements.
GRAIN = 32_768

_tanh_backward = torch.ops.aten.tanh_backward.grad_input
_softplus_backward = torch.ops.aten.softplus_backward.grad_input
# Log odds above which sigmoid rounds to 1 in float64 too: exp(-40) is under 2^-53.
_SURE = 40.0
_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_silu_backward = torch.ops.aten.silu_backward.grad_input
_hardtanh_backward = torch.ops.aten.hardtanh_backward.grad_input


@dataclass(frozen=True)
class Curve(ABC):
    """An elementwise activation in closed form; c is its slope of log odds, 1/unit of z."""

    c: float

    keeps_input: ClassVar[bool] = True
    keeps_output: ClassVar[bool] = True

    def __call__(self, z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The curve at z, in the dtype of z; the work is done in float32 at least."""
        if z.dtype in (torch.float16, torch.bfloat16):
            return self.plain(z.float()).to(z.dtype)
        if self.is_builtin or not _goes_in_pieces(z):
            return self.plain(z)
        return _Pieces.apply(z, self)

    @property
    def is_builtin(self) -> bool:
        """Whether `plain` is a single call of PyTorch."""
        return False

    @abstractmethod
    def plain(self, z: Tensor) -> Tensor:
        """The formula, in differentiable operations."""

    @abstractmethod
    def fill(self, z: Tensor, out: Tensor) -> None:
        """Write the curve at z into `out`."""

    @abstractmethod
    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        """The derivative, in differentiable operations; y is the curve at z."""

    @abstractmethod
    def pull(self, grad: Tensor, z: Tensor, y: Tensor, out: Tensor) -> None:
        """Write grad times the slope into `out`."""


@dataclass(frozen=True)
class _Shifted(Curve):
    """A curve of x = c (z - origin) + bias."""

    origin: float = 0.0
    bias: float = 0.0

    @property
    def is_builtin(self) -> bool:
        return self.c == 1 and self.origin == 0 and self.bias == 0

    def argument(self, z: Tensor) -> Tensor:
        z = z - self.origin if self.origin else z
        z = z * self.c if self.c != 1 else z
        return z + self.bias if self.bias else z

    def argument_into(self, z: Tensor, out: Tensor) -> None:
        if self.origin:
            torch.sub(z, self.origin, out=out).mul_(self.c)
        else:
            torch.mul(z, self.c, out=out)
        if self.bias:
            out.add_(self.bias)


@dataclass(frozen=True)
class Tanh(_Shifted):
    """tanh(x): the mean of the signed Gaussian."""

    keeps_input = False

    def plain(self, z: Tensor) -> Tensor:
        return torch.tanh(self.argument(z))

    def fill(self, z: Tensor, out: Tensor) -> None:
        self.argument_into(z, out)
        out.tanh_()

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        return self.c * (1 - y.square())

    def pull(self, grad: Tensor, z: Tensor, y: Tensor, out: Tensor) -> None:
        _tanh_backward(grad, y, grad_input=out)
        out.mul_(self.c)


@dataclass(frozen=True)
class Sigmoid(_Shifted):
    """1/(1 + exp(-x)): a responsibility of two hypotheses; the mean of centres 0 and 1."""

    keeps_input = False

    def plain(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.argument(z))

    def fill(self, z: Tensor, out: Tensor) -> None:
        self.argument_into(z, out)
        out.sigmoid_()

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        return self.c * y * (1 - y)

    def pull(self, grad: Tensor, z: Tensor, y: Tensor, out: Tensor) -> None:
        _sigmoid_backward(grad, y, grad_input=out)
        out.mul_(self.c)


@dataclass(frozen=True)
class HardTanh(Curve):
    """tanh(c clip(z, -m, m) + bias): the mean of the signed Laplace, a variant of hard tanh."""

    m: float = 1.0
    bias: float = 0.0

    def plain(self, z: Tensor) -> Tensor:
        return torch.tanh(functional.hardtanh(z, -self.m, self.m) * self.c + self.bias)

    def fill(self, z: Tensor, out: Tensor) -> None:
        torch.clamp(z, -self.m, self.m, out=out).mul_(self.c)
        if self.bias:
            out.add_(self.bias)
        out.tanh_()

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        return self.c * (1 - y.square()) * (z.abs() < self.m)

    def pull(self, grad: Tensor, z: Tensor, y: Tensor, out: Tensor) -> None:
        _tanh_backward(grad, y, grad_input=out)
        out.mul_(self.c)
        _hardtanh_backward(out, z, -self.m, self.m, grad_input=out)


@dataclass(frozen=True)
class Gate(Curve):
    """z sigmoid(c z): the gate by mean of the signed Gaussian; SiLU at c = 1."""

    keeps_output = False

    @property
    def is_builtin(self) -> bool:
        return self.c == 1

    def plain(self, z: Tensor) -> Tensor:
        return functional.silu(z) if self.is_builtin else z * torch.sigmoid(z * self.c)

    def fill(self, z: Tensor, out: Tensor) -> None:
        # sigmoid(c z) is the slope of softplus, and torch multiplies a gradient by that slope in
        # one operation. Not silu(c z)/c, in which c z may overflow or c underflow.
        _softplus_backward(z, z, self.c, _SURE, grad_input=out)

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        odds = z * self.c
        on = torch.sigmoid(odds)
        return on * (1 + odds * (1 - on))

    def pull(self, grad: Tensor, z: Tensor, y: Tensor, out: Tensor) -> None:
        # d/dz z sigmoid(c z) is the slope of silu at c z.
        torch.mul(z, self.c, out=out)
        _silu_backward(grad, out, grad_input=out)


@dataclass(frozen=True)
class SechSquared(_Shifted):
    """sech(x)^2 = 1 - tanh(x)^2: the variance of the signed Gaussian."""

    @property
    def is_builtin(self) -> bool:
        return False

    def plain(self, z: Tensor) -> Tensor:
        return SechSquared._of(self.argument(z))

    @staticmethod
    def _of(x: Tensor) -> Tensor:
        # 4 r (1 - r) with the smaller r: where x is large, 1 - tanh^2 has no digits left.
        odds = 2 * x
        return 4 * torch.sigmoid(odds) * torch.sigmoid(-odds)

    def fill(self, z: Tensor, out: Tensor) -> None:
        self.argument_into(z, out)
        out.abs_().mul_(-2).sigmoid_()
        out.addcmul_(out, out, value=-1).mul_(4)

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        return -2 * self.c * torch.tanh(self.argument(z)) * y

    def pull(self, grad: Tensor, z: Tensor, y: Tensor, out: Tensor) -> None:
        self.argument_into(z, out)
        out.tanh_().mul_(y).mul_(grad).mul_(-2 * self.c)


class _Pieces(torch.autograd.Function):
    """Apply a curve, and its slope in the backward pass, a cached piece at a time."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, curve: Curve) -> Tensor:
        out = torch.empty_like(z)
        for piece, result in zip(_pieces(z), _pieces(out)):
            curve.fill(piece, result)
        ctx.curve = curve
        ctx.save_for_backward(z if curve.keeps_input else None, out if curve.keeps_output else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        z, y = ctx.saved_tensors
        kept = z if y is None else y
        z, y = (kept if z is None else z), (kept if y is None else y)
        if torch.is_grad_enabled():  # a second derivative is wanted
            return grad * ctx.curve.slope(z, y), None
        grad = grad.contiguous()
        out = torch.empty_like(kept)
        for piece in zip(_pieces(grad), _pieces(z), _pieces(y), _pieces(out)):
            ctx.curve.pull(*piece)
        return out, None


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.device.type != "cpu":
        return (tensor.view(-1),)
    size = max(PIECE_BYTES // tensor.element_size(), GRAIN * torch.get_num_threads())
    return tensor.view(-1).split(size)


def _goes_in_pieces(z: Tensor) -> bool:
    """Whether pieces gain anything, and no compiler or transform needs to see the formula."""
    device = z.device.type
    return (
        ((device == "cpu" and z.nbytes > PIECE_BYTES) or (device == "cuda" and z.numel() > 0))
        and z.is_contiguous()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad.unpack_dual(z).tangent is None
    )
