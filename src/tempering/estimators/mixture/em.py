"""One pass of tempered EM: additive sums over the rows, and the components they make.

At temperature T the energies of component k are d_k(x) = -T log(mass_k) - log p_k(x), so

    r_k(x) = mass_k p_k(x)^(1/T) / sum_j mass_j p_j(x)^(1/T)

is the posterior r^(1/T), renormalised, of a mixture whose weights are mass^T. At T = 1 that is
ordinary EM. The masses enter as T log mass so that a component and its copy, with half the mass
each, are together what the one was (mass-constrained annealing; Rose 1998).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tempering.errors import DataError
from tempering.estimators.mixture.covariance import Factor, Moments, Shape
from tempering.estimators.mixture.expanded import suited
from tempering.estimators.mixture.radial import Radial, RadialGaussian
from tempering.estimators.mixture.rows import Rows

# A chunk's largest intermediate: 2^18 numbers are 2 MB in float64, about a core's cache.
_CHUNK = 2**18
_LOG2_E = 1 / math.log(2)
# A deviation below this part of its mean is rounding: all rows of the component agree.
_COARSE = 16 * torch.finfo(torch.float64).eps
# How far responsibilities stay above the least normal number, in powers of the base.
_CLEAR = 6.0
# Keeps a component that lost all its rows finite; scikit-learn adds the same to its masses.
_EMPTY = 10 * torch.finfo(torch.float64).eps


class CollapsedError(DataError):
    """A covariance that is not positive definite; a start or move that comes to one is dropped."""


class Components(NamedTuple):
    """A mixture: log masses [K], means [K, D] and covariances by kind, measured by `Rows`."""

    log_mass: Float64[Tensor, " components"]
    means: Float64[Tensor, "components features"]
    covariances: Float64[Tensor, "..."]


def in_data_units(components: Components, rows: Rows) -> Components:
    """Components measured as the rows are, from the origin and in the data's units instead."""
    log_mass, means, covariances = components
    return Components(log_mass, means * rows.unit + rows.pivot, covariances * rows.unit * rows.unit)


def as_measured(components: Components, rows: Rows) -> Components:
    """The reverse: components of the data, measured as the rows are."""
    log_mass, means, covariances = components
    means = means / rows.unit - rows.pivot / rows.unit
    return Components(log_mass, means, covariances / rows.unit / rows.unit)


@dataclass(frozen=True)
class Family:
    """What stays fixed in a fit: kind of covariance, kernel, variance added to diagonals."""

    shape: Shape
    kernel: Radial
    ridge: float

    def measured(self, factor: Factor, reach: float) -> Family:
        """The same, with the quickest class of covariances that is exact enough up to `reach`."""
        return replace(self, shape=suited(self.shape, factor, reach, self.kernel.strongest))

    def within(self, unit: float) -> Family:
        """The same for rows that are measured in `unit`."""
        return replace(self, ridge=self.ridge / unit / unit)

    @property
    def bounded(self) -> bool:
        """Whether the ridge bounds the likelihood of rows that agree: not if lost in rounding."""
        return self.ridge > _COARSE**2

    def parameters(self, components: int, features: int) -> int:
        """Free numbers of a mixture."""
        own = components * (features + 1) - 1
        return own + self.shape.parameters(components, features)


class PassSums(NamedTuple):
    """What one pass over the rows adds up; tensors are float64."""

    objective: float  # sum w T log sum_k mass_k p_k^(1/T); the log-likelihood at T = 1
    mass: Float64[Tensor, " components"]  # sum w r
    pulled: Float64[Tensor, " components"]  # sum w r u
    moments: Moments
    shape: Shape  # what the moments are those of


def factor_of(components: Components, family: Family) -> Factor:
    """The covariances made ready; CollapsedError where one is not positive definite."""
    broken = family.shape.broken(components.covariances)
    if not family.bounded:
        variances = family.shape.variances(components.covariances, components.means.shape[1])
        coarse = (_COARSE * components.means).square() + 2 * family.ridge
        if len(variances) == 1:
            coarse = coarse.amin(0, keepdim=True)
        broken = broken | (variances <= coarse).any(1)
    if bool(broken.any()):
        raise CollapsedError(
            f"the covariance of component {int(broken.nonzero()[0])} of {len(components.means)} "
            "has collapsed (it is not positive definite): it has come to hold too few distinct "
            "rows, or columns that depend on each other. Fit fewer components, raise reg_covar, "
            "or scale the columns"
        )
    return family.shape.factor(components.covariances, components.means)


def prepared(
    x: Float[Tensor, "rows features"], components: Components, family: Family
) -> tuple[Factor, Family]:
    """The covariances made ready, and the family as it is exact enough on these rows."""
    factor = factor_of(components, family)
    reach = float(x.abs().amax()) * math.sqrt(x.shape[1]) if len(x) else 0.0
    return factor, family.measured(factor, reach)


def log_density(
    x: Float[Tensor, "rows features"],
    components: Components,
    factor: Factor,
    family: Family,
) -> tuple[Float[Tensor, "components rows"], Float[Tensor, "components rows"], Tensor]:
    """log p_k(x) of every component, squared distances, and what `Shape.moments` takes."""
    features = x.shape[1]
    squared, middle = family.shape.distances(x, components.means, factor)
    constant = (factor.log_det - family.kernel.log_normaliser(features)).to(x.dtype)
    return constant.unsqueeze(1) - family.kernel.energy(squared, features), squared, middle


def cleared(logs: Tensor, base: float) -> Tensor:
    """Logs of shares to a base, in place: -inf where the share is next to no normal number.

    A product of matrices with numbers below takes some processors ten times as long.
    """
    least = math.log(torch.finfo(logs.dtype).tiny) / math.log(base) + _CLEAR
    return torch.threshold_(logs, least, -math.inf)


def shares_of(logs: Tensor) -> Tensor:
    """exp(logs), taking their memory, with 0 for what is next to no normal number."""
    return cleared(logs, math.e).exp_()


def responsibilities_of(
    logits: Float[Tensor, "components rows"],
) -> tuple[Float[Tensor, "components rows"], Float[Tensor, " rows"]]:
    """Responsibilities and log sum exp over the components; takes the logits' memory."""
    highest = logits.amax(0)
    weights = shares_of(logits.sub_(highest))
    total = weights.sum(0)
    return weights.div_(total), highest + total.log()


def tempered_logits(
    density: Float[Tensor, "components rows"], log_mass: Tensor, temperature: float
) -> Float[Tensor, "components rows"]:
    """log(mass_k) + log p_k / T."""
    logits = density if temperature == 1 else density / temperature
    return logits + log_mass.to(density.dtype).unsqueeze(1)


def chunk_size(components: Components, family: Family) -> int:
    """Rows at a time, so that the largest intermediate stays in the cache."""
    count, features = components.means.shape
    return max(64, _CHUNK // (count * family.shape.width(features) + 2 * features))


def densities(
    rows: Rows, components: Components, family: Family, size: int | None = None
) -> Iterator[tuple[Tensor, Float64[Tensor, " rows"], Tensor, Tensor, Tensor]]:
    """(x, weights, log p, squared distances, middle) of each chunk of `size` rows."""
    factor = factor_of(components, family)
    family = family.measured(factor, rows.reach)
    dtype = rows.working_dtype(factor.whitener, family.kernel.strongest)
    for x, weights in rows.chunks(size or chunk_size(components, family), dtype):
        yield (x, weights, *log_density(x, components, factor, family))


def log_likelihoods(rows: Rows, components: Components, family: Family) -> Float64[Tensor, " rows"]:
    """log p of each of this rank's rows at T = 1."""
    parts = [
        responsibilities_of(tempered_logits(density, components.log_mass, 1.0))[1].double()
        for _, _, density, _, _ in densities(rows, components, family)
    ]
    return torch.cat(parts)


def expect(
    rows: Rows, components: Components, family: Family, temperature: float = 1.0
) -> PassSums:
    """The E-step over all rows, of all ranks: sums that the M-step needs."""
    total: list[Tensor] | None = None
    factor = factor_of(components, family)
    family = family.measured(factor, rows.reach)
    dtype = rows.working_dtype(factor.whitener, family.kernel.strongest)
    for x, weights in rows.chunks(chunk_size(components, family), dtype):
        logits, pull, middle = _logits(x, components, factor, family, temperature)
        highest = logits.amax(0)
        r = cleared(logits.sub_(highest), 2.0).exp2_()
        sums = r.sum(0)
        weight = weights.to(x.dtype)
        r *= weight / sums
        pulls = r if pull is None else r * pull
        moments = family.shape.moments(middle, pulls)
        objective = ((highest / _LOG2_E + sums.log()) * weight).sum()
        pulled = family.shape.pulled(moments, pulls)
        part = (objective, pulled if pull is None else r.sum(1), pulled, *moments)
        double = [piece.double() for piece in part]
        total = double if total is None else [a + b for a, b in zip(total, double)]
    if total is None:
        raise DataError("there are no rows; give at least one on every rank")
    objective, mass, pulled, *rest = rows.reduce(total)
    return PassSums(temperature * float(objective), mass, pulled, tuple(rest), family.shape)


def _logits(
    x: Tensor, components: Components, factor: Factor, family: Family, temperature: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """log2(mass_k) + log2(p_k) / T, the pulls of the kernel, and what `Shape.moments` takes.

    To base 2, because exp2 takes a quarter of the time of exp on CPUs.
    """
    if isinstance(family.kernel, RadialGaussian):  # linear in the squared distances: fewer passes
        constant = factor.log_det - family.kernel.log_normaliser(x.shape[1])
        offset = _LOG2_E * (constant / temperature + components.log_mass)
        slope = -0.5 * _LOG2_E / temperature
        logits, middle = family.shape.logits(x, components.means, factor, offset, slope)
        return logits, None, middle
    density, squared, middle = log_density(x, components, factor, family)
    logits = tempered_logits(density, components.log_mass, temperature).mul_(_LOG2_E)
    return logits, family.kernel.pull(squared, x.shape[1]), middle


def maximise(
    sums: PassSums, components: Components, family: Family, prior_rows: float = 0.0
) -> Components:
    """The M-step.

    prior_rows: draw every covariance towards the pooled one as if that many rows had it.
    """
    factor = family.shape.factor(components.covariances, components.means)
    mass = sums.mass + _EMPTY
    means, covariances = sums.shape.update(
        sums.moments, sums.pulled + _EMPTY, mass, components.means, factor
    )
    if prior_rows and family.shape.name != "tied":
        by = family.shape.wide(mass, covariances)
        pooled = (by * covariances).sum(0) / mass.sum()
        covariances = (by * covariances + prior_rows * pooled) / (by + prior_rows)
    covariances = family.shape.widen(covariances, family.ridge)
    return Components(mass.log() - mass.sum().log(), means, covariances)


class Climb(NamedTuple):
    """EM run to its limit: components, mean objective, passes, and whether it got there."""

    components: Components
    value: float
    passes: int
    converged: bool


def climb(
    rows: Rows,
    components: Components,
    family: Family,
    *,
    tol: float,
    passes: int,
    target: float = -math.inf,
) -> Climb:
    """EM at T = 1 until its limit is within `tol` nats per row, by Aitken's estimate.

    target: give up early once the limit is estimated to lie below this value.
    """
    values: list[float] = []
    for turn in range(passes):
        sums = expect(rows, components, family)
        values.append(sums.objective / rows.total)
        left = remaining(values)
        if not math.isfinite(values[-1]):
            raise CollapsedError(
                "the likelihood is no longer finite: a component has shrunk onto rows that agree. "
                "Fit fewer components, or raise reg_covar"
            )
        if left < tol:
            return Climb(components, values[-1], turn + 1, True)
        if len(values) > 4 and values[-1] + 2 * left < target:
            break
        components = maximise(sums, components, family)
    return Climb(components, values[-1], len(values), False)


def remaining(values: list[float]) -> float:
    """How far a sequence that converges geometrically still has to rise; inf when unknown."""
    if len(values) < 3:
        return math.inf
    before, last = values[-2] - values[-3], values[-1] - values[-2]
    if last <= 0:
        # The ridge makes EM a little less than monotone; at the top it falls by rounding.
        return 0.0
    ratio = last / before if before > 0 else math.inf
    return last * ratio / (1 - ratio) if ratio < 1 else math.inf
