"""What a mixture says of rows, each row on its own: the bits don't depend on the others.

A product of matrices adds up in an order that depends on its shape, and squares multiplied out
cancel by the reach of the whole batch. So everything here is elementwise, in a fixed order, from
each component's own centre, in float64. Deviations are scaled by powers of two first, which costs
no digit and lets units of 1e-150 or 1e150 pass; rows whose squared distance is beyond float64 are
worked out from exponents (`_far`), so that a row at the end of float64 has responsibilities too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tempering.estimators.mixture.covariance import Diagonal, Full, Shape
from tempering.estimators.mixture.em import Components, Family, factor_of

_CHUNK = 2**17  # numbers of the largest intermediate: 1 MB
_LN2 = math.log(2)


class _Mixture(NamedTuple):
    """A mixture made ready; deviations of component k in column d are about 2^exponents[k, d].

    A block is a component, or the one that all share where covariances are tied.
    """

    means: Float64[Tensor, "components features"]
    exponents: Int[Tensor, "blocks features"]
    whitener: Float64[Tensor, "blocks features *features"]  # of the scaled gaps
    constant: Float64[Tensor, " components"]  # log mass + log |Sigma|^-1/2 - log Z_D
    family: Family


def evaluate(
    values: Float[Tensor, "rows features"], components: Components, family: Family
) -> tuple[Float[Tensor, "rows components"], Float[Tensor, " rows"]]:
    """Responsibilities and log-likelihoods at T = 1, in the rows' dtype.

    components: from the origin, in the data's units. A log-likelihood below the range of the
    dtype is -inf.
    """
    ready = _ready(components, family)
    count, features = components.means.shape
    r = torch.empty(len(values), count, dtype=values.dtype, device=values.device)
    scores = torch.empty(len(values), dtype=values.dtype, device=values.device)
    start = 0
    for x in values.split(max(16, _CHUNK // (count * features))):
        end = start + len(x)
        share, score = _evaluate(x.double().T.contiguous(), ready)
        r[start:end], scores[start:end] = share.T, score
        start = end
    return r, scores


def _ready(components: Components, family: Family) -> _Mixture:
    shape, (log_mass, means, covariances) = family.shape, components
    features = means.shape[1]
    variances = shape.variances(covariances, features)
    _, exponents = torch.frexp(variances.sqrt())
    half = torch.exp2(-exponents.double())
    kind: Shape = Diagonal()
    scaled = variances * half * half
    if shape.name in ("full", "tied"):
        matrices = covariances.view(-1, features, features)
        kind, scaled = Full(), matrices * half.unsqueeze(2) * half.unsqueeze(1)
    factor = factor_of(
        Components(log_mass, torch.zeros_like(variances), scaled), Family(kind, family.kernel, 0.0)
    )
    log_det = factor.log_det - _LN2 * exponents.double().sum(1)
    constant = log_mass + log_det - family.kernel.log_normaliser(features)
    return _Mixture(means, exponents, factor.whitener, constant, family)


def _evaluate(x: Float64[Tensor, "features rows"], ready: _Mixture) -> tuple[Tensor, Tensor]:
    """Responsibilities [K, N] and log-likelihoods [N]."""
    features = ready.means.shape[1]
    scale = torch.exp2(-ready.exponents.double())
    gaps = x * scale.unsqueeze(2) - (ready.means * scale).unsqueeze(2)  # [K, D, N]
    squared = _squared(gaps, ready.whitener)
    energy = ready.family.kernel.energy(squared, features)
    r, log_sum = _posterior(ready.constant.unsqueeze(1) - energy)
    far = ~torch.isfinite(squared).all(0)
    if bool(far.any()):
        r[:, far], log_sum[far] = _far(x[:, far], ready)
    return r, log_sum


def _squared(gaps: Float64[Tensor, "components features rows"], whitener: Tensor) -> Tensor:
    """Squared Mahalanobis distances [K, N], added up column by column."""
    if whitener.ndim == 2:
        y = gaps * whitener.unsqueeze(2)
    else:  # y_j = sum_i gap_i whitener_ij, and whitener_ij = 0 where i > j
        y = gaps[:, :1] * whitener[:, 0].unsqueeze(2)
        for i in range(1, gaps.shape[1]):
            y[:, i:] += gaps[:, i : i + 1] * whitener[:, i, i:].unsqueeze(2)
    y *= y
    total = y[:, 0].clone()
    for column in y.unbind(1)[1:]:
        total += column
    return total


def _posterior(logits: Float64[Tensor, "components rows"]) -> tuple[Tensor, Tensor]:
    """Responsibilities and log sum exp, added up component by component."""
    highest = logits.amax(0)
    weights = torch.exp(logits - highest)
    total = weights[0].clone()
    for part in weights[1:]:
        total += part
    return weights / total, highest + total.log()


def _far(x: Float64[Tensor, "features rows"], ready: _Mixture) -> tuple[Tensor, Tensor]:
    """`_evaluate` for rows whose distances have squares beyond float64: by their exponents."""
    quarter = x / 4 - (ready.means / 4).unsqueeze(2)  # may be twice the largest number
    mantissa, exponent = torch.frexp(quarter)
    exponent = exponent.long() + 2 - ready.exponents.long().unsqueeze(2)
    exponent = torch.where(mantissa == 0, -(2**20), exponent)
    top = exponent.amax(1, keepdim=True)
    near = mantissa * torch.exp2((exponent - top).double())
    norm, more = torch.frexp(_squared(near, ready.whitener).sqrt())
    features = len(ready.means[0])
    relative, least = ready.family.kernel.far(norm, top.squeeze(1) + more, features)
    r, log_sum = _posterior(ready.constant.unsqueeze(1) - relative)
    return r, log_sum - least
