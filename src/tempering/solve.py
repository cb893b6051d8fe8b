"""Solving a row of energies for the temperature that gives a stated support."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tempering.errors import SupportError


def temperatures(energies: Tensor, target: Tensor) -> Tensor:
    """Temperatures at which rows of energies [rows, hypotheses] have support `target` [rows]."""
    excess = energies - energies.amin(-1, keepdim=True)
    ties = (excess == 0).sum(-1).to(target)
    finite = torch.isfinite(excess)
    reach = finite.sum(-1).to(target)
    _check(target, ties, reach)
    result = torch.where(target == ties, 0.0, torch.full_like(target, math.inf))
    inner = ((target > ties) & (target < reach)).nonzero().squeeze(-1)
    if len(inner):
        result[inner] = _bracketed(excess[inner], target[inner], ties[inner], reach[inner])
    return result


def _bracketed(excess: Tensor, target: Tensor, ties: Tensor, reach: Tensor) -> Tensor:
    span = torch.log(reach / ties)
    sigma = torch.log1p((target - ties) / ties)
    delta = -torch.log1p((target - reach) / reach)
    least = torch.where(excess > 0, excess, math.inf).amin(-1)
    most = torch.where(torch.isfinite(excess), excess, 0.0).amax(-1)
    low = least / (2 * torch.log(1.22 * (reach - ties) / (ties * sigma)).clamp(min=0.5))
    high = most / (8 * delta).sqrt()
    high = torch.maximum(high, low)
    result = low.sqrt() * high.sqrt()
    tolerance = 64 * torch.finfo(target.dtype).eps
    index = torch.arange(len(target), device=target.device)
    temperature = result
    for _ in range(200):
        reduced = torch.where(torch.isfinite(excess), excess / temperature.unsqueeze(-1), 0.0)
        weights = torch.where(torch.isfinite(excess), torch.exp(-reduced), 0.0)
        total = weights.sum(-1)
        mean = (weights * reduced).sum(-1) / total
        rise = torch.log1p((total - ties) / ties) + mean
        capacity = (weights * (reduced - mean.unsqueeze(-1)).square()).sum(-1) / total
        error = rise - sigma
        hot = error > 0
        high = torch.where(hot, temperature, high)
        low = torch.where(hot, low, temperature)
        fall = span - rise
        step = (torch.log(rise / fall) - torch.log(sigma / delta)) * rise * fall / (capacity * span)
        proposal = temperature * torch.exp(-step)
        inside = (proposal > low) & (proposal < high)
        middle = low.sqrt() * high.sqrt()
        done = (error.abs() <= tolerance) | (high / low <= 1 + 4 * torch.finfo(target.dtype).eps)
        temperature = torch.where(done, temperature, torch.where(inside, proposal, middle))
        result[index] = temperature
        keep = ~done
        if not bool(keep.any()):
            break
        excess, sigma, delta, ties, span = (v[keep] for v in (excess, sigma, delta, ties, span))
        low, high, temperature, index = (v[keep] for v in (low, high, temperature, index))
    return result


def _check(target: Tensor, ties: Tensor, reach: Tensor) -> None:
    bad = ~((target >= ties) & (target <= reach)) | (ties == reach)
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0])
    low, high, given = ties[row].item(), reach[row].item(), target[row].item()
    if low == high == given:
        raise SupportError(
            f"row {row}: all {low:g} finite energies tie, so every temperature gives support "
            f"{given:g} and none is identified"
        )
    raise SupportError(
        f"row {row}: support {given:g} is out of reach; its energies allow {low:g} "
        f"(tied minimisers, T = 0) to {high:g} (finite energies, T = inf)"
    )
