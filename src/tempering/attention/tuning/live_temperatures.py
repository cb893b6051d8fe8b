"""A model whose temperatures are live: gradients reach them, and none is formed for a weight.

    log T = b tanh((B theta)/b)      b = log of the highest T where B theta > 0, of the lowest else

so T is 1 at theta = 0, log T is B theta itself nearby, and T can't leave its bounds. The output
scales s of heads, where they are learned too, have numbers of their own, within the same bounds:

    log s = b tanh((S theta')/b)

With a law of length, log T also depends on how many keys a query sees (`live_law`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from tempering.attention.control.handle import Tempering
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.examining.subject import without_peft
from tempering.attention.hooks import interface_patch
from tempering.attention.hooks.site import state_of
from tempering.attention.layout import Layout
from tempering.attention.profiles.profile import Profile
from tempering.attention.tuning.basis import Basis
from tempering.attention.tuning.live_law import (
    SLOPE_UNIT,
    LawRange,
    LiveLaw,
    ends,
    line_between,
    powers,
    slope_basis,
)
from tempering.attention.tuning.objectives import Piece
from tempering.attention.tuning.tunable import Tunable, frozen
from tempering.errors import RefusedError, TemperatureError

_NAMED = 3  # so many of the numbers that moved most are named
Bounds = tuple[float | int, float | int]


class LiveTemperatures(Tunable):
    """A model under a handle whose temperatures are those of theta; made by `live_temperatures`.

    scales: the basis of output scales, whose numbers come last.
    law: the lengths of a law, whose slopes come after the temperatures at its length; None for
    constants.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Layout,
        handle: Tempering,
        basis: Basis,
        bounds: Bounds,
        scales: Basis | None = None,
        law: LawRange | None = None,
    ) -> None:
        self.model: Any = model
        self.plan = plan
        self.basis, self.scales, self.law = basis, scales, law
        self.slopes = slope_basis(basis) if law else None
        parts = [part for part in (basis, self.slopes, scales) if part is not None]
        self.names = tuple(name for part in parts for name in part.names)
        self.size = len(self.names)
        self.bounds = bounds
        self._handle = handle
        self._laws: list[LiveLaw] = []
        if law is not None:
            self._laws = [LiveLaw(law.length, heads) for heads in plan.heads]
            handle.set_rules([(item,) for item in self._laws])

    def set(self, theta: Float[Tensor, "*rows numbers"]) -> None:
        rows = torch.atleast_2d(theta)
        levels, slopes = self._levels(rows)
        self._handle.set_rows([row.exp() for row in levels])
        for law, slope in zip(self._laws, slopes, strict=True):
            law.slope = slope
        if self.scales is not None:
            self._handle.set_scales(self.output_scales(rows))

    def untempered(self) -> None:
        self._handle.set_rows([torch.ones(1, heads) for heads in self.plan.heads])
        self._handle.set_scales([None] * len(self.plan.layers))
        for law in self._laws:
            law.slope = torch.zeros_like(law.slope[:1]).detach()

    def temperatures(self, theta: Float[Tensor, "numbers"]) -> list[Tensor]:
        """T of each layer, Float[Tensor, "heads"]; with a law, at its length."""
        return [level.exp() for level in self._levels(theta)[0]]

    def output_scales(self, theta: Float[Tensor, "*rows numbers"]) -> list[Tensor]:
        """s of each layer, Float[Tensor, "*rows heads"]; nothing where none are learned."""
        if self.scales is None:
            return []
        own = theta[..., self.size - len(self.scales.names) :]
        return [self._bounded(level).exp() for level in self.scales.rows(own)]

    def profile(self, theta: Float[Tensor, "numbers"]) -> Profile:
        """T, and s, as a profile of this model."""
        levels, slopes = self._levels(theta)
        rows = [level.exp() for level in levels]
        plain = Profile.from_rows(rows, self.plan).adopt(self.model)
        scales = (scale.detach().to("cpu", torch.float64) for scale in self.output_scales(theta))
        rules = () if self.law is None else powers(slopes, self.law)
        return replace(plain, output_scale=tuple(scales), rules=rules)

    def extent(self, theta: Float[Tensor, "numbers"]) -> tuple[float, float]:
        coldest, hottest = self.extents(theta)
        return float(coldest.nan_to_num(1.0).min()), float(hottest.nan_to_num(1.0).max())

    def extents(
        self, theta: Float[Tensor, "numbers"]
    ) -> tuple[Float[Tensor, "layers heads"], Float[Tensor, "layers heads"]]:
        """The coldest and the hottest T of each head; with a law, from 1 key to the longest text.

        NaN where a layer has fewer heads than the widest one.
        """
        levels, slopes = self._levels(theta.detach())
        wide = max(self.plan.heads)
        both = torch.full((2, len(levels), wide), math.nan, dtype=torch.float64)
        for index, level in enumerate(levels):
            lengths = [level]
            if self.law is not None:
                lengths += ends(level, slopes[index], self.law)
            every = torch.stack(lengths).exp().cpu().double()
            both[0, index, : len(level)] = every.amin(0)
            both[1, index, : len(level)] = every.amax(0)
        return both[0], both[1]

    def moved(self, before: Float[Tensor, "numbers"], after: Float[Tensor, "numbers"]) -> str:
        change = (after - before).abs()
        most = change.topk(min(_NAMED, len(change))).indices.tolist()
        first = len(self.basis.names)
        last = first + (len(self.slopes.names) if self.slopes else 0)

        def shown(i: int) -> str:
            value = float(after[i])
            return f"{SLOPE_UNIT * value:+.3f}" if first <= i < last else f"{math.exp(value):.3f}"

        return "; ".join(f"{self.names[i]}: {shown(i)}" for i in most if change[i] > 0)

    def trouble(self, theta: Tensor | None, piece: Piece, gradient: Tensor | None) -> str:
        return _fault(self, theta, piece, gradient)

    def _levels(self, theta: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """log T of each layer, and with a law the slopes of each; log T is then at its length."""
        numbers = len(self.basis.names)
        rows = self.basis.rows(theta[..., :numbers])
        if self.law is None or self.slopes is None:
            return [self._bounded(row) for row in rows], []
        levels, slopes = [], []
        for row, slope in zip(
            rows, self.slopes.rows(theta[..., numbers : 2 * numbers]), strict=True
        ):
            at_one, at_longest = (self._bounded(end) for end in ends(row, slope, self.law))
            level, slope = line_between(at_one, at_longest, self.law)
            levels.append(level)
            slopes.append(slope)
        return levels, slopes

    def _bounded(self, row: Tensor) -> Tensor:
        low, high = (row.new_tensor(math.log(bound)) for bound in self.bounds)
        bound = torch.where(row > 0, high, low)
        return bound * torch.tanh(row / bound)


def check_bounds(bounds: Bounds) -> None:
    """TemperatureError unless 0 < lowest < 1 < highest < inf."""
    low, high = bounds
    if not 0 < low < 1 < high < math.inf:
        raise TemperatureError(
            f"bounds on T are 0 < lowest < 1 < highest < inf (1 is the start), got {low:g}, "
            f"{high:g}"
        )


@contextlib.contextmanager
def live_temperatures(
    model: nn.Module,
    basis: Basis,
    bounds: Bounds,
    *,
    checkpoint: bool,
    scales: Basis | None = None,
    law: LawRange | None = None,
) -> Iterator[LiveTemperatures]:
    """Freeze the weights and temper the model at T = 1; give everything back at the end.

    scales: the basis of log s, if output scales of heads are live too.
    law: the lengths of a law of length, if slopes are live too.
    checkpoint: keep only the input of each layer in a forward pass and run the layer again in the
    backward pass: less memory, one more forward.

    Raises TemperatureError for bounds, RefusedError for a model that is tempered already.
    """
    check_bounds(bounds)
    model = without_peft(model)
    plan = layout(model)
    for layer in plan.layers:
        if state_of(model.get_submodule(layer.name)) is not None:
            raise RefusedError(
                f"{layer.name} is tempered by a handle already, and temperatures found now would "
                "hold only on top of it; call its .remove() first"
            )
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(model))
        handle = stack.enter_context(tempered(model, Profile.neutral(plan)))
        if checkpoint:
            stack.enter_context(_checkpointed(model, plan))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield LiveTemperatures(model, plan, handle, basis, bounds, scales, law)


@contextlib.contextmanager
def _checkpointed(model: nn.Module, plan: Layout) -> Iterator[None]:
    """Run the modules of the layer lists under activation checkpointing, in eval mode too."""
    found: dict[str, nn.Module] = {}
    for layer in plan.layers:
        name = _in_list(model, layer.name)
        if name is None:
            raise RefusedError(
                f"{layer.name} is in no list of layers, so there is nothing to checkpoint; "
                "tune this model without checkpoint=True"
            )
        found[name] = model.get_submodule(name)
    before = [(module, module.__dict__.get("forward")) for module in found.values()]
    try:
        for module in found.values():
            module.forward = _replayed(module.forward)
        yield
    finally:
        for module, own in before:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own


def _replayed(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpointed(forward, *args, use_reentrant=False, **kwargs)

    return run


def _in_list(model: nn.Module, name: str) -> str | None:
    """The outermost entry of a ModuleList around a module: its decoder layer."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        around = model.get_submodule(".".join(parts[: depth - 1]))
        if isinstance(around, nn.ModuleList):
            return ".".join(parts[:depth])
    return None


def _fault(
    live: LiveTemperatures, theta: Tensor | None, piece: Piece, gradient: Tensor | None
) -> str:
    """Which head makes a loss or a gradient that is no number, and what to try, in words."""
    if theta is None:
        return f"the model is untempered there: {_first_bad(live, piece)}; look at the data"
    named = _boldest(live, theta)
    with torch.no_grad():
        live.untempered()
        before = _first_bad(live, piece)
        plainly = torch.isfinite(piece.losses(live.model)).all()
        live.set(theta)
        after = _first_bad(live, piece)
    if not bool(plainly):
        return f"the untempered model fails there too ({before}); look at the data or the dtype"
    if gradient is not None:
        wrong = (~gradient.isfinite()).any(0).nonzero()[:, 0].tolist()
        names = ", ".join(live.names[i] for i in wrong[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return f"it fails for {names}{more} ({after}; {named}). {_MEND}"
    return f"{after}; {named}. {_MEND}"


_MEND = "Try narrower bounds, a smaller prior_sd or radius, or float32 weights"


def _boldest(live: LiveTemperatures, theta: Tensor) -> str:
    """The head whose temperature is farthest from 1."""
    rows = live.temperatures(theta.detach())
    place = int(torch.cat([row.log().abs() for row in rows]).argmax())
    for layer, row in zip(live.plan.layers, rows, strict=True):
        if place < len(row):
            return f"farthest from 1 is T {float(row[place]):.4g} of {layer.name}, head {place}"
        place -= len(row)
    return "there is no head"


def _first_bad(live: LiveTemperatures, piece: Piece) -> str:
    """The first head that gives a NaN or an infinity when the piece is run again, in words."""
    found: list[str] = []
    names = {id(live.model.get_submodule(layer.name)): layer for layer in live.plan.layers}

    def wrap(function: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
            output = function(module, *args, **kwargs)
            layer = names.get(id(module))
            values = output[0] if isinstance(output, tuple) else output
            # The attention interface of transformers gives [batch, queries, heads, values].
            if layer is not None and not found and values.ndim == 4:
                bad = (~values.isfinite()).flatten(0, 1).any(-1).any(0).nonzero()[:, 0]
                if len(bad):
                    found.append(f"the first bad values come from {layer.name}, head {int(bad[0])}")
            return output

        return attention

    def see(module: Any, args: Any, output: Any) -> None:
        values = output[0] if isinstance(output, tuple) else output
        if not found and isinstance(values, Tensor) and not bool(values.isfinite().all()):
            found.append(f"the first bad values come from {names[id(module)].name}")

    with contextlib.ExitStack() as stack:
        stack.enter_context(interface_patch.watched(wrap))
        for layer in live.plan.layers:
            module = live.model.get_submodule(layer.name)
            stack.callback(module.register_forward_hook(see).remove)
        with torch.no_grad():
            piece.losses(live.model)
    return found[0] if found else "no attention head gives a bad value"
