"""Rivals of temperatures inside attention that benchmarks alone need, as tunables.

sink bias of heads        softmax(l + b e_0): b added to the logit of the first key, whose weight
                          is so multiplied by exp(b) before weights are made to sum to 1
                          (ZeroTuning, arXiv 2505.11739)
output scale of channels  o_hc exp(theta_hc): one number for each channel of each head's output
                          (SEAL-C, Lee 2025)

A temperature of the same head divides b too: softmax((l + b e_0) / T).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention.examining.layout_of import layout
from tempering.attention.hooks import interface_patch
from tempering.attention.layout import Layout
from tempering.attention.tuning import make_basis
from tempering.attention.tuning.adapted_scales import head_scales, together
from tempering.attention.tuning.alternatives import T_RATE, Opened
from tempering.attention.tuning.live_law import LawRange
from tempering.attention.tuning.live_temperatures import live_temperatures
from tempering.attention.tuning.objectives import Piece
from tempering.attention.tuning.tunable import Tunable, frozen

RATES = {
    "temperatures": T_RATE,
    "output scale of heads": 0.05,  # as in repair_rivals
    "output scale of channels": 0.02,
    "sink bias of heads": T_RATE,  # both are in units of log weight
    "law of length": T_RATE,
}
WITH = " and temperatures"
WAYS = (
    "temperatures",
    "output scale of heads",
    "sink bias of heads",
    f"output scale of heads{WITH}",
    f"sink bias of heads{WITH}",
    "law of length",
    "output scale of channels",
)


class InAttention(Tunable):
    """Numbers of the heads that act at the call of an attention function.

    each: how many numbers a head has.
    """

    what: str

    def __init__(self, model: nn.Module, plan: Layout, each: int = 1) -> None:
        self.model: Any = model
        self.heads, self.each = plan.heads, each
        self.size = each * sum(plan.heads)
        self._places = {id(model.get_submodule(x.name)): i for i, x in enumerate(plan.layers)}
        self._rows: list[Tensor] | None = None

    def set(self, theta: Tensor) -> None:
        rows = torch.atleast_2d(theta).split([self.each * heads for heads in self.heads], dim=1)
        self._rows = [
            row.view(len(row), heads, self.each)
            for row, heads in zip(rows, self.heads, strict=True)
        ]

    def untempered(self) -> None:
        self._rows = None

    def extent(self, theta: Tensor) -> tuple[float, float]:
        return 1.0, 1.0

    def moved(self, before: Tensor, after: Tensor) -> str:
        return f"{self.what}: largest change {float((after - before).abs().max()):.3g}"

    def trouble(self, theta: Tensor | None, piece: Piece, gradient: Tensor | None) -> str:
        return f"{self.what} went too far; try a smaller rate"

    def wrap(self, function: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        """For `interface_patch.watched`."""

        def attention(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            place = self._places.get(id(module))
            if place is None or self._rows is None:
                return function(module, query, key, *args, **kwargs)
            return self.call(function, self._rows[place], module, query, key, *args, **kwargs)

        return attention

    def call(self, function: Callable[..., Any], numbers: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The attention function under Float[Tensor, "rows heads each"]."""
        raise NotImplementedError


class SinkBias(InAttention):
    """b as one more channel: of the queries b / scaling, of the keys 1 at the first, 0 elsewhere.

    So no matrix over queries and keys is formed. The kernels want values as wide as the keys.
    """

    what = "sink bias"

    def call(self, function: Callable[..., Any], numbers: Tensor, *args: Any, **kwargs: Any) -> Any:
        module, query, key, value, *rest = args
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        own = (numbers / scaling).to(query)[:, :, None].expand(len(query), -1, query.shape[2], 1)
        first = torch.zeros_like(key[..., :1])
        first[:, :, 0] = 1
        found = function(
            module,
            torch.cat([query, own], -1),
            torch.cat([key, first], -1),
            nn.functional.pad(value, (0, 1)),
            *rest,
            **{**kwargs, "scaling": scaling},
        )
        return (found[0][..., :-1], *found[1:])


class ChannelScales(InAttention):
    """Multiplies every channel of every head's output by exp(theta)."""

    what = "output scales of channels"

    def call(self, function: Callable[..., Any], numbers: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return ((found[0] * numbers.exp()[:, None]).to(found[0]), *found[1:])


@contextlib.contextmanager
def sink_bias(model: nn.Module) -> Iterator[SinkBias]:
    """The model with a bias on the first key's logit in every head, until the end."""
    tunable = SinkBias(model, layout(model))
    with frozen(model), interface_patch.watched(tunable.wrap):
        yield tunable


@contextlib.contextmanager
def channel_scales(model: nn.Module) -> Iterator[ChannelScales]:
    """The model with a factor on every channel of every head's output, until the end."""
    plan = layout(model)
    wide = {getattr(model.get_submodule(layer.name), "head_dim", None) for layer in plan.layers}
    (each,) = wide
    if each is None:
        raise SystemExit("this model's attention names no head_dim")
    with frozen(model):
        tunable = ChannelScales(model, plan, each)
        with interface_patch.watched(tunable.wrap):
            yield tunable


def ways(model: Any, longest: int) -> dict[str, Opened]:
    """What opens the model with each way's numbers, all 0 at first.

    longest: keys that a law of length reaches.
    """
    plan = layout(model)

    def temperatures(law: LawRange | None = None) -> Any:
        basis = make_basis(model, plan, "head")
        return live_temperatures(model, basis, (0.2, 5.0), checkpoint=False, law=law)

    def beside(way: Callable[[Any], Any], rate: float) -> Any:
        return together(temperatures(), way(model), units=(T_RATE / rate, 1.0))

    scales, sinks = "output scale of heads", "sink bias of heads"
    return {
        "temperatures": temperatures,
        scales: partial(head_scales, model),
        "output scale of channels": partial(channel_scales, model),
        sinks: partial(sink_bias, model),
        scales + WITH: partial(beside, head_scales, RATES[scales]),
        sinks + WITH: partial(beside, sink_bias, RATES[sinks]),
        "law of length": partial(temperatures, LawRange(longest, longest)),
    }
