"""The temperature that keeps N tokens alive, fast enough to be solved at every token."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.posterior import temperature_for

# The row is turned into three moments by one exp and one matrix product a step, which is what
# makes it several times faster than `temperature_for` on a vocabulary.
_STEPS = 12
_TOLERANCE = 5e-6  # of the entropy, in nats: a relative error of N
_HOTTEST = 1e6  # above it a masked token, held at `_FAR`, would come alive
_FAR = 1e15  # its square is still far from float32's end


def temperature_of_support(
    energies: Float[Tensor, "batch vocab"], target: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """T with exp(S(T)) = N in each row, or the limit that comes closest to N.

    Parameters
    ----------
    energies: >= 0 with 0 in each row, +inf where masked.
    target: N >= 1 of each row.

    Returns
    -------
    T of each row. 0 where N tokens or more tie for the minimum, inf where no more than N tokens
    are unmasked, 1 where all unmasked tokens tie and every T gives the same. N is met to 1e-5.

    Method: Newton in log T, dS/dlog T = C, inside a bracket; what hasn't converged in 12 steps
    goes to the ground floor's `temperature_for`.
    """
    ties = (energies == 0).sum(-1).to(energies.dtype)
    unmasked = (energies < math.inf).sum(-1).to(energies.dtype)
    inside = (target > ties) & (target < unmasked)
    limit = torch.where(target <= ties, 0.0, math.inf)
    result = torch.where(ties == unmasked, 1.0, limit).to(energies.dtype)
    rows = inside.nonzero().squeeze(-1)
    if len(rows) == 0:
        return result
    whole = len(rows) == len(energies)
    live, wanted = (energies, target) if whole else (energies[rows], target[rows])
    solved, converged = _newton(live, wanted.log())
    if not bool(converged.all()):
        rest = ~converged
        solved[rest] = temperature_for(live[rest], wanted[rest])
    result[rows] = solved
    return result


def _newton(energies: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """(T, converged) of each row with entropy S(T) = `entropy`."""
    near = energies.clamp(max=_FAR)
    powers = torch.stack((torch.ones_like(near), near, near * near), -1)  # [rows, vocab, 3]
    log_T = torch.zeros_like(entropy)
    low, high = torch.full_like(log_T, -math.inf), torch.full_like(log_T, math.log(_HOTTEST))
    for _ in range(_STEPS):
        beta = torch.exp(-log_T)
        weights = torch.exp(near * -beta.unsqueeze(-1))
        mass, first, second = torch.bmm(weights.unsqueeze(1), powers).squeeze(1).unbind(-1)
        mean = first / mass
        error = torch.log(mass) + beta * mean - entropy
        capacity = beta * beta * (second / mass - mean * mean)
        done = error.abs() <= _TOLERANCE
        if bool(done.all()):
            break
        high = torch.where(error > 0, log_T, high)
        low = torch.where(error > 0, low, log_T)
        # A row that is nearly cold or nearly uniform has C near 0 and would leap: at most e^2.
        step = (-error / capacity).nan_to_num(0.0).clamp(-2, 2)
        proposal = log_T + step
        middle = torch.where(low > -math.inf, (low + high) / 2, high - 2)
        moved = torch.where((proposal > low) & (proposal < high), proposal, middle)
        log_T = torch.where(done, log_T, moved)
    return torch.exp(log_T), done
