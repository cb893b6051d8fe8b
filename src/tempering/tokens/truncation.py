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
from jaxtyping import Float
from torch import Tensor

# vLLM's order, and so the default of all engines where a policy truncates.
ORDER = ("temperature", "min_p", "top_k", "top_p")
_HEAD = 256  # likeliest tokens that are sorted first; the nucleus of most tokens is smaller


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
    wanted = share * _weights(energies, temperature).sum(-1, dtype=torch.float64)
    result = torch.full_like(temperature, math.inf)
    open_rows = torch.arange(len(energies), device=energies.device)
    size = _HEAD
    while len(open_rows):
        size = min(size, energies.shape[-1])
        head = smallest(energies[open_rows], size)
        sums = _weights(head, temperature[open_rows]).double().cumsum(-1)
        reached = sums >= wanted[open_rows].unsqueeze(-1)
        found = reached.any(-1)
        last = head.gather(-1, reached.double().argmax(-1, keepdim=True)).squeeze(-1)
        # All tokens together may round to just less than p: then all stay.
        result[open_rows] = torch.where(found, last, math.inf)
        if size == energies.shape[-1]:
            break
        open_rows, size = open_rows[~found], size * 16
    return result


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
