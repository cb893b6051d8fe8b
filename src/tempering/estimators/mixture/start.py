"""Components given by the user: means, or responsibilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from tempering.errors import DataError, InputError
from tempering.estimators.mixture.anneal import ANNEALED
from tempering.estimators.mixture.checks import as_numbers
from tempering.estimators.mixture.covariance import Full
from tempering.estimators.mixture.em import Components, Family
from tempering.estimators.mixture.ranks import agreed
from tempering.estimators.mixture.rows import Rows
from tempering.estimators.mixture.survey import survey


def from_means(rows: Rows, means_init: Any, count: int, family: Family) -> Components:
    """Components at given means, sharing one covariance: that of the rows about their nearest."""
    means = as_numbers(means_init, rows.device, "means_init", "a row for each component")
    if means.shape != (count, rows.features):
        raise InputError(
            f"means_init has shape {tuple(means.shape)}; expected ({count}, {rows.features}), a "
            "row for each component"
        )
    bad = ~torch.isfinite(means)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise InputError(f"means_init[{row}, {column}] is not finite")
    means = means - rows.pivot
    # A kernel much narrower than any distance between rows assigns each to its nearest mean.
    zero = torch.zeros(count, dtype=torch.float64, device=rows.device)
    narrow = Components(zero, means, zero + (1e-6 * max(rows.reach, 1e-150)) ** 2)
    seen = survey(rows, narrow, ANNEALED)
    gap = seen.means - means
    scatter = seen.scatter + gap.unsqueeze(2) * gap.unsqueeze(1)
    pooled = (seen.mass[:, None, None] * scatter).sum(0) / seen.mass.sum()
    full = pooled.expand(count, rows.features, rows.features)
    covariances = family.shape.widen(family.shape.from_full(full, zero + 1), family.ridge)
    return Components(zero - float(np.log(count)), means, covariances)


def from_responsibilities(
    rows: Rows, given: Any, alive: Tensor, count: int, family: Family
) -> Components:
    """The M-step at given responsibilities [rows, components]."""
    r = agreed(rows.group, lambda: _distributions(given, len(alive), count, rows.device))
    r = r[alive.to(r.device)]
    # Sums about the pivot with the identity for covariance; the first M-step is Gaussian.
    features = rows.features
    eye = torch.eye(features, dtype=torch.float64, device=rows.device)
    shape, reference = Full(), eye.expand(count, features, features)
    origin = torch.zeros(count, features, dtype=torch.float64, device=rows.device)
    factor = shape.factor(reference, origin)
    mass, first = origin.new_zeros(count), torch.zeros_like(origin)
    second = origin.new_zeros(count, features, features)
    start = 0
    size = max(16, 2**18 // (count * features))
    for x, weights in rows.chunks(size, torch.float64):
        pulls = r[start : start + len(x)].T * weights
        start += len(x)
        moments = shape.moments(x.expand(count, *x.shape), pulls)
        mass, first, second = mass + pulls.sum(1), first + moments[0], second + moments[1]
    mass, first, second = rows.reduce([mass, first, second])
    empty = mass <= 0
    if bool(empty.any()):
        raise DataError(
            f"responsibilities leave component {int(empty.nonzero()[0])} without any row; give "
            "every component a share, or fit fewer"
        )
    means, full = shape.update((first, second), mass, mass, origin, factor)
    covariances = family.shape.widen(family.shape.from_full(full, mass), family.ridge)
    return Components(mass.log() - mass.sum().log(), means, covariances)


def _distributions(
    given: Any, size: int, count: int, device: torch.device
) -> Float64[Tensor, "rows components"]:
    """Responsibilities as a tensor; DataError names the row that can't be."""
    r = as_numbers(given, device, "responsibilities", "a row for each sample")
    if r.shape != (size, count):
        raise DataError(
            f"responsibilities have shape {tuple(r.shape)}; expected ({size}, {count}), a "
            "row for each sample and a column for each component"
        )
    bad = ~((r >= 0).all(1) & ((r.sum(1) - 1).abs() <= 1e-6))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DataError(
            f"responsibilities in row {row} are not a distribution: {r[row].tolist()[:8]}; "
            "expected numbers of 0 or more that sum to 1"
        )
    return r
