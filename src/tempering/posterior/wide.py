"""Solving for temperature in wide rows, such as the logits of a whole vocabulary.

A row of 50,000 energies is read whole only two or three times. A sample of it gives the start:

    head     the minima of 768 slices of the row, of which the 64 least are taken for its 64 least
    tail     one energy in each slice, where it lies above those, for all energies of the slice

S of that sample is evaluated on a grid of temperatures at once, and on a finer one between the two
that enclose the target. Newton's method on the log odds of the entropy, as in `solve`, does the
rest on the whole row. The sample changes what that costs, never what it converges to; rows that
don't converge so are left to `temperature_for`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tempering.posterior.solve import block_rows, entropy_and_slope, entropy_slack, temperature_for

WIDE = 4096  # hypotheses; below, a row's passes cost less than its sample
_SLICES, _HEAD = 768, 64
# Temperatures of a grid, and the ends of the first, over the energy at the head's edge. Beyond them
# Newton's method has further to go.
_GRID, _LOWEST, _HIGHEST = 8, 1 / 200, 20.0
_TURNS = 6
# A step this short in log T is one where Newton's method squares its error. The next error is then
# about k s^2, with the k = s/r^2 that this step s had after the one before, r.
_SHORT = 1e-3


class _Wanted(NamedTuple):
    """What is solved for, all [row], S in bits; see `solve`."""

    cold: Tensor
    hot: Tensor
    entropy: Tensor
    odds: Tensor
    slack: Tensor


def wide_temperature(
    excess: Float[Tensor, "rows hypotheses"],
    target: Float[Tensor, " rows"],
    ties: Float[Tensor, " rows"],
    reach: Float[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    """`temperature_for(excess, target)` where what it would find out about the rows is known.

    Each row's answer depends on that row alone.

    Parameters
    ----------
    excess: energies less their row's minimum, +inf where ruled out; float32 or float64.
    target: N, with ties < N < reach. ties: zeros of each row. reach: finite energies.
    """
    result, solved = torch.empty_like(target), torch.zeros_like(target, dtype=torch.bool)
    size = block_rows(excess)
    for start in range(0, len(excess), size):
        part = slice(start, start + size)
        result[part], solved[part] = _solve(excess[part], target[part], ties[part], reach[part])
    if not bool(solved.all()):
        rest = ~solved
        result[rest] = temperature_for(excess[rest], target[rest])
    return result


def _solve(
    excess: Tensor, target: Tensor, ties: Tensor, reach: Tensor
) -> tuple[Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """T of each row, and whether it has converged."""
    rise = torch.log1p((target - ties) / ties)
    fall = torch.log1p((reach - target) / target)
    wanted = _Wanted(
        torch.log2(ties),
        torch.log2(reach),
        torch.log2(target),
        torch.log2(rise / fall),
        entropy_slack(rise, fall, excess.shape[1]),
    )
    temperature = _start(excess, wanted.entropy)
    space = excess.new_empty(2, *excess.shape)
    solved = torch.zeros_like(target, dtype=torch.bool)
    before = torch.zeros_like(target)
    # What is left of S's error after the last step, in bits.
    enough = 1e-6 if excess.dtype == torch.float32 else 1e-8
    for _ in range(_TURNS):
        entropy, slope = entropy_and_slope(excess, temperature, space)
        rise, fall = entropy - wanted.cold, wanted.hot - entropy
        change = (wanted.odds - torch.log2(rise / fall)) / (slope / rise + slope / fall)
        size = change.abs()
        short = size < _SHORT
        squared = short & (size**3 * slope <= enough * before**2)
        met = ((entropy - wanted.entropy).abs() <= wanted.slack) | squared
        # Where S is met on a plateau the step may be long, and is not taken.
        moves = ~solved & (short | ~met) & change.isfinite()
        step = torch.exp2(change.nan_to_num(0.0).clamp(-2, 2))
        temperature = torch.where(moves, temperature * step, temperature)
        solved |= met & temperature.isfinite()
        before = size
        if bool(solved.all()):
            break
    return temperature, solved


def _start(excess: Tensor, wanted: Tensor) -> Float[Tensor, " rows"]:
    """Where the entropy of a sample of each row meets the target; NaN where it can't be told."""
    width = max(4, excess.shape[1] // _SLICES)
    count = excess.shape[1] // width
    sliced = excess[:, : count * width].reshape(len(excess), width, count)
    least = torch.cat([sliced.amin(1), excess[:, count * width :]], -1)
    head = least.topk(_HEAD, largest=False, sorted=False).values
    edge = head.amax(-1, keepdim=True)
    tail = excess[:, ::width]
    tail = torch.where(tail > edge, tail, math.inf)
    sample = torch.cat([head, tail], -1)
    times = torch.cat([head.new_zeros(_HEAD), tail.new_full(tail.shape[1:], math.log2(width))])
    steps = torch.linspace(0, 1, _GRID, device=excess.device, dtype=excess.dtype)
    cold, hot = edge.log2() + math.log2(_LOWEST), edge.log2() + math.log2(_HIGHEST)
    for finer in (True, False):
        grid = torch.lerp(cold, hot, steps)  # log T of each row
        entropy = _sample_entropy(sample, times, torch.exp2(grid))
        above = (entropy < wanted.unsqueeze(-1)).sum(-1, keepdim=True).clamp(1, _GRID - 1)
        ends = torch.cat([above - 1, above], -1)
        cold, hot = grid.gather(-1, ends).split(1, -1)
        if not finer:
            low, high = entropy.gather(-1, ends).split(1, -1)
    share = ((wanted.unsqueeze(-1) - low) / (high - low)).nan_to_num(0.5).clamp(0, 1)
    return torch.exp2(torch.lerp(cold, hot, share)).squeeze(-1)


def _sample_entropy(
    sample: Float[Tensor, "rows some"],
    times: Float[Tensor, " some"],
    temperature: Float[Tensor, "rows grid"],
) -> Float[Tensor, "rows grid"]:
    """S in bits of energies that count 2^times times, at each temperature."""
    reduced = sample.unsqueeze(1) / (temperature * -math.log(2)).unsqueeze(-1)
    reduced.clamp_(min=-200)  # 2^-200 adds nothing to S, and +inf never meets a 0 in a product
    weights = torch.exp2(reduced + times)
    total = weights.sum(-1)
    return total.log2() - weights.mul_(reduced).sum(-1).div_(total)
