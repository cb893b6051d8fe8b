"""Posteriors with a prior: r_h is proportional to pi_h exp(-d_h/T), exact at both limits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tempering import posterior


def responsibilities_with_prior(
    energies: Float[Tensor, "*rows hypotheses"],
    temperature: Tensor | float,
    log_prior: Float[Tensor, " hypotheses"] | None,
) -> Float[Tensor, "*rows hypotheses"]:
    """r_h = pi_h exp(-d_h/T) / sum_k pi_k exp(-d_k/T).

    At T = 0 the minimisers share in proportion to pi; at T = inf r is pi over the hypotheses of
    finite energy. Parameters, raises: as tempering.responsibilities.
    """
    if log_prior is None:
        return posterior.responsibilities(energies, temperature)
    inside, limit = _without_limits(energies, temperature)
    tilted = posterior.responsibilities(_tilted(energies, inside, log_prior), inside)
    shares = posterior.responsibilities(energies, torch.where(limit, temperature, 0.0))
    shares = shares.detach() * torch.exp(log_prior)
    return torch.where(limit.unsqueeze(-1), shares / shares.sum(-1, keepdim=True), tilted)


def entropy_with_prior(
    energies: Float[Tensor, "*rows hypotheses"],
    temperature: Tensor | float,
    log_prior: Float[Tensor, " hypotheses"] | None,
) -> Float[Tensor, "*rows"]:
    """S(r) = -sum_h r_h log r_h of those responsibilities, in nats."""
    if log_prior is None:
        return posterior.entropy(energies, temperature)
    inside, limit = _without_limits(energies, temperature)
    tilted = posterior.entropy(_tilted(energies, inside, log_prior), inside)
    r = responsibilities_with_prior(energies, temperature, log_prior)
    # Used at the limits only. A dead hypothesis gets log(1), whose gradient is finite.
    shared = -(r * torch.log(torch.where(limit.unsqueeze(-1) & (r > 0), r, 1.0))).sum(-1)
    return torch.where(limit, shared, tilted)


def mode_weights(
    energies: Float[Tensor, "*rows hypotheses"],
    temperature: Tensor | float,
    log_prior: Float[Tensor, " hypotheses"] | None,
) -> Float[Tensor, "*rows hypotheses"]:
    """Weights of the mean of the modes: uniform over the hypotheses of greatest r_h.

    The modes are found on the energies, because different responsibilities may round to one number.
    """
    energies = energies.detach()
    if log_prior is None:
        level = _row_levels(temperature, energies)
        return posterior.responsibilities(energies, torch.where(level == torch.inf, level, 0.0))
    inside, limit = _without_limits(energies, temperature)
    level = _row_levels(temperature, energies)
    alive = posterior.responsibilities(energies, torch.where(limit, level, 0.0)) > 0
    by_prior = torch.where(alive, -log_prior.detach(), torch.inf)
    tilted = _tilted(energies, inside, log_prior.detach())
    return posterior.responsibilities(torch.where(limit.unsqueeze(-1), by_prior, tilted), 0.0)


def _tilted(energies: Tensor, temperature: Tensor, log_prior: Tensor) -> Tensor:
    """Energies whose posterior at T is the one with the prior: d - T log pi."""
    return energies - temperature.unsqueeze(-1) * log_prior


def _without_limits(energies: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
    """Temperatures with 1 in place of 0 and inf, and a mask of the rows that have those."""
    level = _row_levels(temperature, energies)
    limit = (level == 0) | (level == torch.inf)
    return torch.where(limit, 1.0, level), limit


def _row_levels(temperature: Tensor | float, energies: Tensor) -> Tensor:
    level = torch.as_tensor(temperature, dtype=energies.dtype, device=energies.device)
    return level.expand(energies.shape[:-1])
