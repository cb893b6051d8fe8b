"""Truncation of a posterior over tokens: top-k, top-p and min-p, exact at both limits of T.

Tokens are ranked by energy d, and tokens of one energy are kept or cut together, so that what is
kept depends on the logits alone, not on the order in which an engine sorts them. With the weights
w_v = exp(-d_v/T) of the live tokens:

    top_k   keeps d_v <= the k-th smallest energy
    top_p   keeps v where the weight of all strictly likelier tokens is below p times the whole
    min_p   keeps w_v >= p w_max, that is d_v <= -T log p

A token that is cut gets the energy +inf, as a masked one. At T = 0 and T = inf these are the limits
of what finite temperatures keep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

# vLLM's order, and so the default of all engines where a policy truncates.
ORDER = ("temperature", "min_p", "top_k", "top_p")
_HEAD = 256  # likeliest tokens that are sorted first; the nucleus of most tokens is smaller
_BISECTIONS = 12  # leave a 4096th of the range of energies


class Cut(NamedTuple):
    """How one token's posterior is truncated: what is kept, and when temperature acts."""

    top_p: float | int = 1.0
    top_k: int = 0
    min_p: float | int = 0.0
    order: tuple[str, ...] = ORDER

    def steps(self, tempered: bool) -> tuple[str, ...]:
        """The truncations that act, in order, before the temperature does or after."""
        place = self.order.index("temperature")
        part = self.order[place + 1 :] if tempered else self.order[:place]
        return tuple(name for name in part if getattr(self, name) != _OFF[name])


_OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}


def truncated(
    energies: Float[Tensor, "batch vocab"],
    temperature: Float[Tensor, " batch"] | None,
    cuts: Sequence[Cut],
) -> Float[Tensor, "batch vocab"]:
    """Energies with +inf for the tokens that are cut.

    Parameters
    ----------
    energies: 0 at each row's maximiser, +inf where masked.
    temperature: T of each row, for the truncations after it; None for those before it.
    cuts: one for each row.
    """
    groups: dict[Cut, list[int]] = {}
    for row, cut in enumerate(cuts):
        groups.setdefault(cut, []).append(row)
    result = energies
    for cut, rows in groups.items():
        steps = cut.steps(temperature is not None)
        if not steps:
            continue
        whole = len(rows) == len(energies)
        part = energies if whole else energies[rows]
        own = part.new_ones(len(rows)) if temperature is None else temperature[rows]
        for name in steps:
            part = _cut(name, part, own, cut)
        if whole:
            return part
        if result is energies:
            result = energies.clone()
        result[rows] = part
    return result


def _cut(name: str, energies: Tensor, temperature: Tensor, cut: Cut) -> Tensor:
    if name == "top_k":
        highest = _kth(energies, cut.top_k)
    elif name == "min_p":
        highest = _least_share(temperature, cut.min_p)
    else:
        highest = _nucleus(energies, temperature, cut.top_p)
    return torch.where(energies <= highest.unsqueeze(-1), energies, math.inf)


def _kth(energies: Float[Tensor, "batch vocab"], k: int) -> Float[Tensor, " batch"]:
    """The k-th smallest energy of each row; inf where fewer are live."""
    return smallest(energies, min(k, energies.shape[-1]))[:, -1]


def smallest(energies: Float[Tensor, "batch vocab"], k: int) -> Float[Tensor, "batch k"]:
    """The k smallest energies of each row, in order.

    Each row is cut into slices, of which the k with the least minima hold the k smallest energies:
    no energy of another slice lies below those k minima. So few numbers are sorted.
    """
    rows, size = energies.shape
    width = math.isqrt(size // k)
    if width < 4:
        return energies.topk(k, largest=False).values
    count = size // width
    sliced = energies[:, : count * width].reshape(rows, width, count)
    chosen = sliced.amin(1).topk(k, largest=False, sorted=False).indices
    held = sliced.gather(2, chosen.unsqueeze(1).expand(-1, width, -1)).flatten(1)
    return torch.cat([held, energies[:, count * width :]], -1).topk(k, largest=False).values


def _least_share(
    temperature: Float[Tensor, " batch"], share: float | int
) -> Float[Tensor, " batch"]:
    """-T log p; at p = 1 only the maximisers have so much weight, at every T."""
    if share == 1:
        return torch.zeros_like(temperature)
    return (temperature.double() * -math.log(share)).to(temperature.dtype)


def _nucleus(
    energies: Float[Tensor, "batch vocab"],
    temperature: Float[Tensor, " batch"],
    share: float | int,
) -> Float[Tensor, " batch"]:
    """The greatest energy in the nucleus: the first at which the weight so far reaches p."""
    weights = _weights(energies, temperature)
    wanted = share * weights.sum(-1, dtype=torch.float64)
    head = smallest(energies, min(_HEAD, energies.shape[-1]))
    result, found = _reached(head, temperature, torch.zeros_like(wanted), wanted)
    if not bool(found.all()):
        rest = ~found
        result[rest] = _wide_nucleus(energies[rest], weights[rest], temperature[rest], wanted[rest])
    return result


def _reached(
    ordered: Float[Tensor, "batch some"],
    temperature: Float[Tensor, " batch"],
    before: Float64[Tensor, " batch"],
    wanted: Float64[Tensor, " batch"],
) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """The first of some energies at which the weight reaches what is wanted, and whether it does.

    before: the weight of all smaller energies.
    """
    sums = before.unsqueeze(-1) + _weights(ordered, temperature).double().cumsum(-1)
    reached = sums >= wanted.unsqueeze(-1)
    first = reached.double().argmax(-1, keepdim=True)
    return ordered.gather(-1, first).squeeze(-1), reached.any(-1)


def _wide_nucleus(
    energies: Float[Tensor, "batch vocab"],
    weights: Float[Tensor, "batch vocab"],
    temperature: Float[Tensor, " batch"],
    wanted: Float64[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """The same for nuclei beyond the head: bisected, until few energies are left to be sorted."""

    space = torch.empty_like(energies)

    def weight_to(bound: Tensor) -> Tensor:
        torch.le(energies, bound.unsqueeze(-1), out=space)
        return space.mul_(weights).sum(-1, dtype=torch.float64)

    high = torch.where(energies < math.inf, energies, 0.0).amax(-1)
    low = torch.full_like(high, -1.0)
    for _ in range(_BISECTIONS):
        middle = low + (high - low) / 2
        short = weight_to(middle) < wanted
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    inside = (energies > low.unsqueeze(-1)) & (energies <= high.unsqueeze(-1))
    most = max(1, int(inside.sum(-1).max()))
    left = smallest(torch.where(inside, energies, math.inf), most)
    result, found = _reached(left, temperature, weight_to(low), wanted)
    # All of them reach it, but for the order in which weights are summed.
    return torch.where(found, result, high)


def _weights(
    energies: Float[Tensor, "batch some"], temperature: Float[Tensor, " batch"]
) -> Float[Tensor, "batch some"]:
    """exp(-d/T), with both limits of T."""
    column = temperature.unsqueeze(-1)
    weights = (energies / -column).exp()
    if not bool(((temperature > 0) & (temperature < math.inf)).all()):
        weights = torch.where(column == 0, (energies == 0).to(weights), weights)
        weights = torch.where(column == math.inf, (energies < math.inf).to(weights), weights)
    return weights
