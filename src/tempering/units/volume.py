"""Volume controls: penalties that keep competing prototypes from collapsing."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.errors import InputError

# Added to variances, in units of the greatest responsibility squared: a hypothesis that varies by
# less than 1/1000 of its greatest responsibility counts as constant.
_FLAT = 1e-6


class VolumeTerms(NamedTuple):
    """Penalties, each a scalar >= 0 in nats (decorrelation: 0..1), 0 where nothing is amiss.

    Their weighted sum goes to the loss; sum(terms) weighs them equally.
    """

    variance: Tensor
    decorrelation: Tensor
    entropy_floor: Tensor
    minimum_mean: Tensor


def volume_terms(
    log_r: Float[Tensor, "*rows hypotheses"],
    *,
    support_floor: float | int | None = None,
    minimum: float | int | None = None,
) -> VolumeTerms:
    """Penalties for the volume that the responsibilities of a batch lack.

        variance       mean_h max(0, log(v/Var[r_h])), v = (1/K)(1 - 1/K), the variance
                       of a hypothesis that takes 1/K of the inputs with certainty
        decorrelation  mean over pairs of max(0, corr(r_h, r_k))^2: two hypotheses
                       that answer to the same inputs; negative correlation costs nothing
        entropy_floor  max(0, log floor - S(mean r))
        minimum_mean   mean_h max(0, log minimum - log mean r_h)

    All work on logarithms, so a hypothesis of responsibility 1e-300 is still pulled back.

    Parameters
    ----------
    log_r: log responsibilities; every dimension but the last counts as inputs, at least 2.
    support_floor: the least support of the mean responsibilities, 1..K; K/2 if None.
    minimum: the least mean responsibility, 0..1/K; 0.1/K if None.

    Raises InputError for a batch of one, and for floors that no posterior reaches.

    Source: variance and decorrelation after VICReg (Bardes, Ponce, LeCun 2022), with the variance
    under a logarithm as in implicit EM; here on responsibilities, not on features.
    """
    rows = log_r.reshape(-1, log_r.shape[-1])
    n, count = rows.shape
    support_floor = count / 2 if support_floor is None else support_floor
    minimum = 0.1 / count if minimum is None else minimum
    if n < 2:
        raise InputError(f"volume is that of a batch; got {n} input(s), expected at least 2")
    if not 1 <= support_floor <= count:
        raise InputError(f"support_floor is {support_floor:g}; expected 1..{count}")
    if not 0 < minimum <= 1 / count:
        raise InputError(
            f"minimum is {minimum:g}; expected over 0 and at most 1/K = {1 / count:g}: the means "
            "sum to 1"
        )
    # Each hypothesis in units of its greatest responsibility, whose log is `top`. Correlations stay
    # as they are, and nothing underflows.
    top = rows.detach().amax(0)
    relative = torch.exp(rows - top)
    deviation = relative - relative.mean(0)
    spread = deviation.square().mean(0) + _FLAT
    balanced = (1 - 1 / count) / count
    variance = (math.log(balanced) - torch.log(spread) - 2 * top).clamp(min=0).mean()

    unit = deviation / spread.sqrt()
    correlation = (unit.mT @ unit / n).clamp(min=0).square()
    decorrelation = (correlation.sum() - correlation.diagonal().sum()) / (count * (count - 1))

    log_mean = torch.logsumexp(rows, 0) - math.log(n)
    marginal = -(log_mean.exp() * log_mean).sum()
    return VolumeTerms(
        variance,
        decorrelation,
        (math.log(support_floor) - marginal).clamp(min=0),
        (math.log(minimum) - log_mean).clamp(min=0).mean(),
    )
