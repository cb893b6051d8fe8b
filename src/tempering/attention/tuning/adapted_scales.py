"""Rivals of temperatures that scale what passes through the model, and several of them at once.

weights of norms       w (1 + theta), for every weight of every norm       (Norm Tweaking, Li 2023)
output scale of heads  o_h exp(theta_h), one number for each head's output (SEAL-H, Lee 2025)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.attention.control.handle import Tempering
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.layout import Layout
from tempering.attention.profiles.profile import Profile
from tempering.attention.tuning.adapted import Slots, opened_parameter
from tempering.attention.tuning.objectives import Piece
from tempering.attention.tuning.tunable import Tunable, frozen
from tempering.errors import RefusedError


class HeadScales(Tunable):
    """Multiplies the output of each head by exp(theta), before the heads are mixed."""

    def __init__(self, model: nn.Module, plan: Layout, handle: Tempering) -> None:
        self.model: Any = model
        self.heads = plan.heads
        self.size = sum(plan.heads)
        self._handle = handle

    def set(self, theta: Float[Tensor, "*rows numbers"]) -> None:
        self._handle.set_scales(torch.atleast_2d(theta).exp().split(list(self.heads), dim=1))

    def untempered(self) -> None:
        self._handle.set_scales([None] * len(self.heads))

    def extent(self, theta: Float[Tensor, "numbers"]) -> tuple[float, float]:
        return 1.0, 1.0

    def moved(self, before: Float[Tensor, "numbers"], after: Float[Tensor, "numbers"]) -> str:
        return f"output scales: largest change {float((after - before).abs().max()):.3g}"

    def trouble(self, theta: Tensor | None, piece: Piece, gradient: Tensor | None) -> str:
        return "output scales went too far; try a smaller rate"


class Together(Tunable):
    """Several tunables of one model, their numbers one after the other.

    units: what each part's numbers are multiplied by, so that one rate suits parts of any scale.
    """

    def __init__(self, parts: Sequence[Tunable], units: Sequence[float]) -> None:
        self.model = parts[0].model
        self.parts, self.units = tuple(parts), tuple(units)
        self.sizes = [part.size for part in parts]
        self.size = sum(self.sizes)

    def set(self, theta: Float[Tensor, "*rows numbers"]) -> None:
        for part, own in zip(self.parts, self._own(theta), strict=True):
            part.set(own)

    def untempered(self) -> None:
        for part in self.parts:
            part.untempered()

    def extent(self, theta: Float[Tensor, "numbers"]) -> tuple[float, float]:
        ends = [part.extent(own) for part, own in zip(self.parts, self._own(theta), strict=True)]
        return min(low for low, _ in ends), max(high for _, high in ends)

    def moved(self, before: Float[Tensor, "numbers"], after: Float[Tensor, "numbers"]) -> str:
        pairs = zip(self.parts, self._own(before), self._own(after), strict=True)
        return "; ".join(part.moved(one, other) for part, one, other in pairs)

    def trouble(self, theta: Tensor | None, piece: Piece, gradient: Tensor | None) -> str:
        return "; ".join(part.trouble(None, piece, None) for part in self.parts)

    def _own(self, theta: Tensor) -> list[Tensor]:
        """The numbers of each part, in its units."""
        apart = theta.split(self.sizes, dim=-1)
        return [own * unit for own, unit in zip(apart, self.units, strict=True)]


@contextlib.contextmanager
def norm_weights(model: nn.Module) -> Iterator[Slots]:
    """The model with a factor on every weight of every norm, until the end.

    Raises RefusedError for a model without norms that have weights.
    """
    norms: list[Any] = [
        module
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    ]
    if not norms:
        raise RefusedError("the model has no norm with weights, so there are none to learn")
    with frozen(model), contextlib.ExitStack() as stack:
        slots = []
        for module in norms:
            slots.append((module, "weight", module.weight.detach().clone()))
            stack.enter_context(opened_parameter(module, "weight"))
        tunable = Slots(model, slots, "weights of norms", relative=True)
        tunable.untempered()
        yield tunable


@contextlib.contextmanager
def head_scales(model: nn.Module) -> Iterator[HeadScales]:
    """The model with a factor on the output of every head, until the end."""
    plan = layout(model)
    with frozen(model), tempered(model, Profile.neutral(plan)) as handle:
        yield HeadScales(model, plan, handle)


@contextlib.contextmanager
def together(
    *ways: contextlib.AbstractContextManager[Tunable], units: Sequence[float] | None = None
) -> Iterator[Together]:
    """Several of them in one model, until the end; none may change the same numbers.

    units: see `Together`; 1 without them.
    """
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(way) for way in ways]
        yield Together(parts, [1.0] * len(parts) if units is None else units)
