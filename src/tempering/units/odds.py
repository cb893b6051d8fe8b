"""Two signed hypotheses: every statistic as a function of their log odds."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

# Beyond this |log odds| every statistic equals its limit in float64 too: exp(-1e4) is 0.
SATURATED = 1e4


def tempered_odds(
    log_odds: Float[Tensor, "*rows"],
    temperature: Float[Tensor, "*rows"],
    log_prior_odds: Tensor | None = None,
) -> Float[Tensor, "*rows"]:
    """Log odds at a temperature, l/T + log(pi_+/pi_-), within [-1e4, 1e4].

    Parameters
    ----------
    log_odds: l = d_- - d_+, energy.
    temperature: T, 0..inf. T = 0 sends l to its sign times infinity and leaves ties to the
        prior; T = inf leaves the prior alone.
    log_prior_odds: log(pi_+/pi_-) in nats; None for 0.

    Past 1e4 nats no statistic changes any more in any dtype. The value stays finite there, so that
    gradients are exactly 0, and never 0 * inf.
    """
    cold = temperature == 0
    heat = torch.where(cold, 1.0, temperature)
    saturated = (log_odds.abs() > SATURATED * temperature) & (log_odds != 0)
    limit = torch.sign(log_odds.detach()) * SATURATED
    level = saturated | cold | (temperature == torch.inf)
    inside = torch.where(level, 0.0, log_odds) / heat
    odds = torch.where(saturated, limit, inside)
    if log_prior_odds is None:
        return odds
    return torch.where(saturated, limit, odds + log_prior_odds)


def sign_mean(odds: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """E[s] = tanh(l/2)."""
    return torch.tanh(odds / 2)


def sign_mode(odds: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """The sign of the log odds; 0 on a tie, the mean of the tied modes."""
    return torch.sign(odds)


def sign_full(odds: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows 2"]:
    """(r_-, r_+) = (sigmoid(-l), sigmoid(l))."""
    return torch.sigmoid(torch.stack([-odds, odds], dim=-1))


def sign_variance(odds: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Var[s] = 1 - E[s]^2 = 4 r_- r_+, in the form that keeps its digits where it is small."""
    return 4 * torch.sigmoid(odds) * torch.sigmoid(-odds)


def sign_entropy(odds: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """S(r) = r_+ log(1 + e^-l) + r_- log(1 + e^l), in nats."""
    return torch.sigmoid(odds) * functional.softplus(-odds) + torch.sigmoid(
        -odds
    ) * functional.softplus(odds)
