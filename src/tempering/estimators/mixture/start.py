"""Components to start from: means or responsibilities that are given, or clusters of k-means."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from tempering.errors import DataError, InputError
from tempering.estimators.mixture.anneal import ANNEALED
from tempering.estimators.mixture.em import Components, Family
from tempering.estimators.mixture.ranks import agreed
from tempering.estimators.mixture.reading import as_numbers
from tempering.estimators.mixture.rows import Rows
from tempering.estimators.mixture.snapshot import snapshot


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
    means = means / rows.unit - rows.pivot / rows.unit
    # A kernel much narrower than any distance between rows assigns each to its nearest mean.
    zero = torch.zeros(count, dtype=torch.float64, device=rows.device)
    largest = max(rows.reach, float(means.abs().amax()), 1e-150)
    narrow = Components(zero, means, zero + (1e-6 * largest) ** 2)
    seen = snapshot(rows, narrow, ANNEALED)
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
    made = _from_shares(rows, r, family)
    empty = made.log_mass == -torch.inf
    if bool(empty.any()):
        raise DataError(
            f"responsibilities leave component {int(empty.nonzero()[0])} without any row; give "
            "every component a share, or fit fewer"
        )
    return made


def from_clusters(
    rows: Rows, count: int, family: Family, random: np.random.RandomState, runs: int
) -> Components | None:
    """Components of clusters: the best of so many runs of k-means; 0: those around random centres.

    rows: few enough to be in memory. None when it finds fewer than `count` (rows that repeat).
    """
    x, weights = next(iter(rows.chunks(len(rows.values), torch.float64)))
    # Distinct rows with their weights: a draw is the same for a row of weight 2 and a row twice,
    # and in any order.
    distinct, inverse = torch.unique(x, dim=0, return_inverse=True)
    if len(distinct) < count:
        return None
    total = weights.new_zeros(len(distinct)).index_add_(0, inverse, weights)
    init, turns = ("k-means++", 300) if runs else ("random", 1)
    clusters = KMeans(count, init=init, n_init=runs or 1, max_iter=turns, random_state=random)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        clusters.fit(distinct.cpu().numpy(), sample_weight=total.cpu().numpy())
    labels = torch.as_tensor(clusters.labels_, dtype=torch.int64, device=rows.device)[inverse]
    r = torch.eye(count, dtype=torch.float64, device=rows.device)[labels]
    made = _from_shares(rows.alone(), r, family)
    return None if bool((made.log_mass == -torch.inf).any()) else made


def _from_shares(rows: Rows, r: Float64[Tensor, "rows components"], family: Family) -> Components:
    """The M-step of a Gaussian at responsibilities; log mass -inf where a component has none."""
    count, features = r.shape[1], rows.features
    size = max(16, 2**18 // (count * features))
    zero = torch.zeros(count, features, dtype=torch.float64, device=rows.device)
    mass, first = zero[:, 0], zero
    for start, x, weights in _numbered(rows, size):
        pulls = r[start : start + len(x)].T * weights
        mass, first = mass + pulls.sum(1), first + pulls @ x
    mass, first = rows.reduce([mass, first])
    floor = mass.clamp_min(torch.finfo(torch.float64).tiny)
    means = first / floor.unsqueeze(1)
    # Now about the means: about the pivot, the scatter of a cluster far from it would be lost.
    second = zero.new_zeros(count, features, features)
    for start, x, weights in _numbered(rows, size):
        gaps = x - means.unsqueeze(1)
        pulls = r[start : start + len(x)].T * weights
        second = second + (gaps * pulls.unsqueeze(2)).mT @ gaps
    (second,) = rows.reduce([second])
    full = second / floor[:, None, None]
    covariances = family.shape.widen(family.shape.from_full(full, mass), family.ridge)
    return Components(mass.log() - mass.sum().log(), means, covariances)


def _numbered(rows: Rows, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Chunks of rows with the number of their first."""
    start = 0
    for x, weights in rows.chunks(size, torch.float64):
        yield start, x, weights
        start += len(x)


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
