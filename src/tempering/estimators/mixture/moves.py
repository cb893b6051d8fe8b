"""Moves at T = 1 that EM can't make: merge two components and split a third (SMEM).

EM ends where no small change raises the likelihood; what annealing with one variance for all got
wrong is then wrong by whole components. Both halves of a move are judged by what they do to the
log-likelihood, in nats, before any of it is carried out:

- Splitting k into a mixture f of two gains at least sum_n w r_k log(f / p_k), by Jensen.
- Merging i and j into the one component with their moments loses exactly
  -sum_n w log(1 - r_i - r_j + mass_ij p_ij / p).

Source: Ueda, Nakano, Ghahramani, Hinton, SMEM algorithm for mixture models, 2000, which ranks
moves by overlap and by local Kullback-Leibler divergence instead.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tempering.estimators.mixture.em import (
    Components,
    Family,
    chunk_size,
    factor_of,
    log_density,
    prepared,
    shares_of,
)
from tempering.estimators.mixture.rows import Rows

# A component is split on the rows for which it is responsible by this much at least.
_OWN = 1e-2
# Of six cuts in random directions the best two after five turns of local EM get ten turns more.
_CUTS = 6
_SCREENING = 5
_KEPT = 2
_TURNS = 10
_LEANING = 0.9  # the responsibility for its own side of the cut that a child starts with


class View(NamedTuple):
    """Rows in memory with what the mixture makes of them; rivals first."""

    x: Float[Tensor, "rows features"]
    weights: Float64[Tensor, " rows"]
    responsibilities: Float64[Tensor, "components rows"]
    log_likelihood: Float64[Tensor, " rows"]


class Split(NamedTuple):
    """Component k as two, and at least how many nats that gains."""

    component: int
    gain: float
    children: Components


class Merge(NamedTuple):
    """Components i and j as one, and how many nats that loses."""

    first: int
    second: int
    loss: float
    merged: Components


def look(rows: Rows, components: Components, family: Family) -> View:
    """Responsibilities and log-likelihoods of rows that fit in memory."""
    x, weights = next(iter(rows.chunks(len(rows.values), torch.float64)))
    joint = _joint(x, components, family)
    log_sum = torch.logsumexp(joint, 0)
    return View(x, weights, shares_of(joint.sub_(log_sum)), log_sum)


def best_split(
    view: View, k: int, components: Components, family: Family, generator: torch.Generator
) -> Split | None:
    """Local EM for component k as two, from several cuts; None when its rows are too few."""
    features = view.x.shape[1]
    own = view.responsibilities[k] > _OWN
    x, w = view.x[own], (view.weights * view.responsibilities[k])[own]
    # A child needs rows for its own scatter; with fewer, the likelihood grows without bound.
    least = {"full": features + 1.0, "tied": 1.0}.get(family.shape.name, 2.0)
    if float(w.sum()) < 2 * least:
        return None
    parent = pick(components, [k], family)
    base = _joint(x, parent, family)[0] - components.log_mass[k]
    total = float(w.sum())
    pair = _cut(x, w, parent, family, generator, least)
    for turn in range(_SCREENING + _TURNS + 1):
        density = _joint(x, pair, family).view(-1, 2, len(x))
        log_sum = torch.logsumexp(density, 1)
        r = shares_of(density - log_sum.unsqueeze(1)).mul_(w)
        if turn == _SCREENING:
            chosen = (log_sum @ w).topk(_KEPT).indices
            pair = pick(pair, torch.stack([2 * chosen, 2 * chosen + 1], 1).view(-1), family)
            r = r[chosen]
        if turn < _SCREENING + _TURNS:
            pair = _refit(x, r.view(-1, len(x)), pair, parent, family, least, total)
    gains = (log_sum - base) @ w
    smaller = pair.log_mass.exp().view(-1, 2).amin(1) * total
    gains = torch.where(smaller < least, -math.inf, gains)
    best = int(gains.argmax())
    if not math.isfinite(float(gains[best])):
        return None
    # Cuts that mirror each other gain the same up to rounding, which must not order the children.
    order = torch.argsort(pair.means[2 * best : 2 * best + 2, 0])
    children = pick(pair, 2 * best + order, family)
    children = children._replace(log_mass=children.log_mass + components.log_mass[k])
    return Split(k, float(gains[best]), children)


def cheapest_merges(view: View, components: Components, family: Family, most: int) -> list[Merge]:
    """The merges that lose least, by their moments first, then exactly."""
    pairs, merged = _pairs(components, family)
    scores = _moment_loss(components, pairs, merged, family)
    order = torch.argsort(scores)[:most]
    pairs, merged = pairs[order], pick(merged, order, family)
    rest = 1 - view.responsibilities[pairs[:, 0]] - view.responsibilities[pairs[:, 1]]
    joint = _joint(view.x, merged, family) - view.log_likelihood
    losses = -(rest.clamp_(min=0) + joint.exp_()).log_() @ view.weights
    return [
        Merge(int(i), int(j), float(loss), pick(merged, [n], family))
        for n, ((i, j), loss) in enumerate(zip(pairs.tolist(), losses))
    ]


def pick(components: Components, index: list[int] | Tensor, family: Family) -> Components:
    """Some of the components."""
    log_mass, means, covariances = components
    return Components(log_mass[index], means[index], family.shape.pick(covariances, index))


def join(parts: list[Components], family: Family) -> Components:
    """Components side by side; a tied covariance is that of the first part."""
    log_mass = torch.cat([part.log_mass for part in parts])
    means = torch.cat([part.means for part in parts])
    if family.shape.name == "tied":
        return Components(log_mass, means, parts[0].covariances)
    return Components(log_mass, means, torch.cat([part.covariances for part in parts]))


def refit(
    x: Float64[Tensor, "rows features"],
    r: Float64[Tensor, "components rows"],
    components: Components,
    family: Family,
) -> Components:
    """The M-step on rows in memory, r holding w r; masses are those of r, not normalised.

    A tied covariance stays: a few components of many do not determine it.
    """
    factor, near = prepared(x, components, family)
    _, squared, middle = log_density(x, components, factor, near)
    pull = family.kernel.pull(squared, x.shape[1])
    pulls = r if pull is None else r * pull
    tiny = torch.finfo(torch.float64).tiny
    mass, pulled = r.sum(1) + tiny, pulls.sum(1) + tiny
    means, covariances = near.shape.update(
        near.shape.moments(middle, pulls), pulled, mass, components.means, factor
    )
    if family.shape.name == "tied":
        covariances = components.covariances
    else:
        covariances = family.shape.widen(covariances, family.ridge)
    return Components(mass.log(), means, covariances)


def _joint(x: Tensor, components: Components, family: Family) -> Tensor:
    """log mass_k p_k(x), [K, N] float64, in chunks that keep intermediates small."""
    factor, near = prepared(x, components, family)
    size = chunk_size(components, near)
    parts = [log_density(part, components, factor, near)[0] for part in x.split(size)]
    return torch.cat(parts, 1).add_(components.log_mass.unsqueeze(1))


def _cut(
    x: Tensor,
    w: Tensor,
    parent: Components,
    family: Family,
    generator: torch.Generator,
    least: float,
) -> Components:
    """Pairs of components from cuts across the parent, in the metric where it is round."""
    factor = factor_of(parent, family)
    if family.shape.name in ("full", "tied"):
        y = (x - parent.means) @ factor.whitener.view(x.shape[1], -1)
    else:
        y = (x - parent.means) * factor.whitener.view(1, -1)
    start = torch.randn(x.shape[1], _CUTS, dtype=torch.float64, generator=generator)
    side = torch.sign(y @ start.to(x.device))
    for _ in range(5):  # towards 2-means
        side = torch.sign(y @ (y.mT @ (side * w.unsqueeze(1))))
    leaning = (1 + _LEANING * side.mT) / 2
    r = torch.stack([leaning, 1 - leaning], 1).view(-1, len(x)) * w
    pair = join([parent] * (2 * _CUTS), family)
    return _refit(x, r, pair, parent, family, least, float(w.sum()))


def _refit(
    x: Tensor,
    r: Tensor,
    pair: Components,
    parent: Components,
    family: Family,
    prior_rows: float,
    total: float,
) -> Components:
    """The M-step, each covariance drawn towards the parent's as if `prior_rows` rows had it."""
    fitted = refit(x, r, pair, family)
    log_mass = fitted.log_mass - math.log(total)
    if family.shape.name == "tied":
        return fitted._replace(log_mass=log_mass)
    mass = family.shape.wide(fitted.log_mass.exp(), fitted.covariances)
    covariances = mass * fitted.covariances + prior_rows * parent.covariances
    return Components(log_mass, fitted.means, covariances / (mass + prior_rows))


def _pairs(components: Components, family: Family) -> tuple[Tensor, Components]:
    """All pairs i < j, and the component with the moments of both."""
    count = len(components.means)
    pairs = torch.combinations(torch.arange(count, device=components.means.device))
    i, j = pairs.unbind(1)
    log_mass = torch.logaddexp(components.log_mass[i], components.log_mass[j])
    share = (components.log_mass[i] - log_mass).exp().unsqueeze(1)
    gap = components.means[i] - components.means[j]
    means = components.means[j] + share * gap
    if family.shape.name == "tied":
        return pairs, Components(log_mass, means, components.covariances)
    mine = family.shape.wide(share.squeeze(1), components.covariances)
    within = mine * components.covariances[i] + (1 - mine) * components.covariances[j]
    between = family.shape.outer(gap, (share * (1 - share)).squeeze(1))
    return pairs, Components(log_mass, means, within + between)


def _moment_loss(
    components: Components, pairs: Tensor, merged: Components, family: Family
) -> Tensor:
    """What each merge would lose if its two components did not overlap: enough to rank merges."""
    if family.shape.name == "tied":
        factor = factor_of(components, family)
        centres = components.means @ factor.whitener
        gap = (centres[pairs[:, 0]] - centres[pairs[:, 1]]).square().sum(1)
        i, j = components.log_mass.exp()[pairs].unbind(1)
        return i * j / (i + j) * gap

    def bits(part: Components) -> Tensor:
        return part.log_mass.exp() * (factor_of(part, family).log_det + part.log_mass)

    own = bits(components)
    return own[pairs].sum(1) - bits(merged)
