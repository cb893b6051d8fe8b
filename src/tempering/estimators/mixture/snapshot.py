"""A mixture at one temperature, once EM has settled: masses, scatters, thermodynamics.

While the components share one variance v (the kernel's), their energies are |x - mu_k|^2 / 2 and
the tempered posterior is a softmax of -energy / v. Two copies of component k stay together as long
as v is above the largest eigenvalue of its responsibility-weighted covariance S_k; below, they
part along the eigenvector. For one component: v_c = lambda_max(cov), that is 2 lambda_max(cov) for
energies |x - mu|^2 (Rose 1998).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from tempering.estimators.mixture.em import (
    Components,
    Family,
    densities,
    responsibilities_of,
    tempered_logits,
)
from tempering.estimators.mixture.rows import Rows

_CHUNK = 2**18


class Snapshot(NamedTuple):
    """The mixture at one temperature; K components, D features, all float64 and over all ranks."""

    mass: Float64[Tensor, " components"]  # sum w r
    means: Float64[Tensor, "components features"]  # responsibility-weighted, from the pivot
    scatter: Float64[Tensor, "components features features"]  # S_k about those means
    information: float  # nats
    distortion: float  # mean squared distance, weighted by r
    heat_capacity: float  # mean of Var_r(d) / T^2

    @property
    def effective(self) -> float:
        """exp of the entropy of the masses: the effective number of components."""
        share = self.mass / self.mass.sum()
        return float(torch.special.entr(share).sum().exp())


def snapshot(
    rows: Rows, components: Components, family: Family, temperature: float = 1.0
) -> Snapshot:
    """One pass that adds up scatters and thermodynamics at a temperature."""
    count, features = components.means.shape
    totals: list[Tensor] | None = None
    size = max(16, _CHUNK // (2 * features * count))
    for x, weights, density, _, _ in densities(rows, components, family, size):
        part = _add_up(x, weights, density, components, temperature)
        totals = part if totals is None else [a + b for a, b in zip(totals, part)]
    mass, first, second, numbers = rows.reduce(totals or [])
    total = mass.sum()
    # Sums are about the components' own centres: about the pivot they would lose the scatter of
    # clusters far from it.
    shift = first / mass.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(1)
    scatter = second / mass.clamp_min(torch.finfo(torch.float64).tiny)[:, None, None]
    scatter = scatter - shift.unsqueeze(2) * shift.unsqueeze(1)
    means = components.means + shift
    conditional, distortion, capacity = (numbers / total).tolist()
    entropy = float(torch.special.entr(mass / total).sum())
    return Snapshot(mass, means, scatter, max(entropy - conditional, 0.0), distortion, capacity)


def _add_up(
    x: Tensor,
    weights: Tensor,
    density: Tensor,
    components: Components,
    temperature: float,
) -> list[Tensor]:
    logits = tempered_logits(density, components.log_mass, temperature)
    reduced = -logits  # energies in units of the temperature
    r, log_sum = responsibilities_of(logits.clone())
    mean = (r * reduced).sum(0)
    variance = (r * (reduced - mean).square()).sum(0)
    gaps = x.double() - components.means.unsqueeze(1)
    distortion = (r.double() * gaps.square().sum(2)).sum(0)
    by_row = torch.stack([(mean + log_sum).double(), distortion, variance.double()])
    r = r.double() * weights
    pulled = gaps * r.unsqueeze(2)
    return [r.sum(1), pulled.sum(1), pulled.mT @ gaps, by_row @ weights]
