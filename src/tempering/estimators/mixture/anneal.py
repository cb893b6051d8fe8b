"""Deterministic annealing with one variance for all: components split where it turns unstable.

The kernel's variance v falls from the first critical value, lambda_max(cov), and every component
whose scatter has an eigenvalue above v is replaced by two, displaced along the eigenvector. The
temperature is v in units of its final value, so it ends at 1 and the units need not be known
beforehand: only the ratio of energies to temperature shows in responsibilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tempering.estimators.mixture.covariance import Spherical
from tempering.estimators.mixture.em import Components, Family, expect, maximise
from tempering.estimators.mixture.radial import RadialGaussian
from tempering.estimators.mixture.rows import Rows
from tempering.estimators.mixture.snapshot import Snapshot, snapshot

# Chosen once, on 2-D sets of 15 to 100 components, and the same for all data: cooling by 10% a
# step finds all of them; passes stop when no mean moves by 1% of the kernel's deviation. Copies
# closer than 5% of it have not parted and are one component again: without that they split
# over and over, and the components run out (so an earlier version failed on every set).
COOLING = 0.9
_PASSES = 100
_STILL = 1e-2
_TOGETHER = 0.05
# Two copies that split are 2 sqrt(lambda - v) apart: 0.67 deviations, one step of cooling later. A
# few rows far away keep them within a quarter of a deviation until v is small enough to tell those
# rows from the rest. Until then the variance within components is that of all rows, at which
# annealing must not end. Half a deviation lies between the two.
_PARTED = 0.5
# A deviation below this part of the largest distance is a few float64 spacings of that distance.
_NO_SPREAD = 4 * torch.finfo(torch.float64).eps
# Below this heat capacity (nats; dS/dT = C/T) cooling by 10% moves responsibilities by less than EM
# can resolve, so the next critical temperature is gone to at once.
_FROZEN = 1e-9
# An eigenvalue within this part of the variance counts as critical: annealing begins at the first
# critical variance, which rounding may put on either side.
_ROUNDING = 1e-9

ANNEALED = Family(Spherical(), RadialGaussian(), 0.0)


class Break(NamedTuple):
    """Component `parent` split: `critical` was its critical variance, along `eigenvector`.

    Components have numbers for life: the first is 0, and a split gives birth to one more.
    """

    parent: int
    child: int
    critical: float
    eigenvector: Tensor
    mean: Tensor  # of the parent, from the pivot


class AnnealingStep(NamedTuple):
    """A variance at which EM has settled: the mixture there, a snapshot, the passes it took."""

    variance: float
    components: Components
    snapshot: Snapshot
    passes: int
    breaks: tuple[Break, ...]  # all so far, but for those whose two components became one again


def anneal(
    rows: Rows, count: int, temperatures: Sequence[float] | None = None
) -> Iterator[AnnealingStep]:
    """Cool from the first critical variance on, splitting up to `count` components.

    temperatures: to go through, the first of them at the first critical variance; None follows
    the critical ones, until there are `count` components and v is the variance within them.
    """
    state = _single(rows)
    start = snapshot(rows, state, ANNEALED)
    first = float(torch.linalg.eigvalsh(start.scatter)[0, -1])
    if first <= 0:
        yield AnnealingStep(0.0, state, start, 1, ())
        return
    planned = iter([first * t / temperatures[0] for t in temperatures] if temperatures else [])
    variance = next(planned, first)
    state = _at(state, variance)
    born = [0]  # the numbers of the components, in order of the rows of `state`
    breaks: list[Break] = []
    before: tuple[float, dict[int, float]] = (variance, {})
    while True:
        state, passes = settle(rows, state)
        while (pair := _together(state)) is not None:
            state, gone = _joined(state, *pair), born.pop(pair[1])
            breaks = [parting for parting in breaks if parting.child != gone]
        seen = snapshot(rows, state, ANNEALED)
        values, vectors = _largest(seen.scatter)
        yield AnnealingStep(variance, state, seen, passes, tuple(breaks))
        order = torch.argsort(values, descending=True).tolist()
        critical = variance * (1 - _ROUNDING)
        hot = [k for k in order if float(values[k]) >= critical][: count - len(born)]
        complete = len(born) == count
        following = (
            next(planned, None)
            if temperatures
            else _cooler(seen, variance, float(values.amax()), complete and _parted(state))
        )
        if following is None or following <= (_NO_SPREAD * rows.reach) ** 2:
            return
        largest = dict(zip(born, values.tolist()))
        for k in hot:
            child, eigenvalue = max(born) + 1, largest[born[k]]
            met = _crossing(before, (variance, eigenvalue), born[k])
            parting = Break(born[k], child, met, vectors[k], state.means[k])
            state = _split(state, k, eigenvalue, vectors[k], following)
            born.append(child)
            breaks.append(parting)
        before = (variance, largest)
        variance = following
        state = _at(state, variance)


def settle(rows: Rows, state: Components) -> tuple[Components, int]:
    """Passes at one variance until the means stand still."""
    still = _STILL * math.sqrt(float(state.covariances[0]))
    for turn in range(1, _PASSES + 1):
        made = maximise(expect(rows, state, ANNEALED), state, ANNEALED)
        moved = float((made.means - state.means).abs().max())
        state = made._replace(covariances=state.covariances)
        if moved < still:
            return state, turn
    return state, _PASSES


def pooled_variance(seen: Snapshot) -> float:
    """The mean variance within the components, over all columns."""
    each = torch.diagonal(seen.scatter, dim1=1, dim2=2).mean(1)
    return float((seen.mass * each).sum() / seen.mass.sum())


def _single(rows: Rows) -> Components:
    zero = torch.zeros(1, dtype=torch.float64, device=rows.device)
    return Components(zero, zero.new_zeros(1, rows.features), zero + 1)


def _at(state: Components, variance: float) -> Components:
    return state._replace(covariances=torch.full_like(state.log_mass, variance))


def _largest(scatter: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of each matrix, and its eigenvector; the largest entry is positive.

    The sign decides which of two components keeps the number, so rounding must not choose it.
    """
    values, vectors = torch.linalg.eigh(scatter)
    top = vectors[:, :, -1]
    entry = top.gather(1, top.abs().argmax(1, keepdim=True))
    return values[:, -1], top * torch.sign(entry)


def _cooler(seen: Snapshot, variance: float, critical: float, complete: bool) -> float | None:
    """The next variance; None at the end. `critical` is where the next component would split.

    complete: there are `count` components, all apart, so v ends at the variance within them.
    """
    end = pooled_variance(seen) if complete else 0.0
    if complete and variance <= 1.01 * end:
        return None
    following = COOLING * variance
    if seen.heat_capacity < _FROZEN:  # clusters far apart: straight to where something happens
        following = min(following, max(critical, end))
    return max(following, end)


def _crossing(
    before: tuple[float, dict[int, float]], now: tuple[float, float], number: int
) -> float:
    """The critical variance: where the eigenvalue met v since the last step, in logarithms."""
    (warm, largest), (cold, eigenvalue) = before, now
    if eigenvalue <= cold or number not in largest or largest[number] >= warm:
        return min(eigenvalue, warm)  # met at this step, or when the component was born
    above, below = math.log(eigenvalue / cold), math.log(warm / largest[number])
    return cold * (warm / cold) ** (above / (above + below))


def _split(
    state: Components, k: int, eigenvalue: float, eigenvector: Tensor, variance: float
) -> Components:
    """Two copies of component k about where they will settle: eigenvalue = v + amplitude^2."""
    shift = math.sqrt(max(eigenvalue - variance, 0.0)) * eigenvector
    log_mass = torch.cat([state.log_mass, state.log_mass[k].view(1)])
    log_mass[[k, -1]] -= math.log(2)
    means = torch.cat([state.means, (state.means[k] + shift).unsqueeze(0)])
    means[k] -= shift
    return Components(log_mass, means, torch.full_like(log_mass, variance))


def _together(state: Components) -> tuple[int, int] | None:
    """The closest two components, i < j, if they are still one."""
    nearest, i, j = _closest(state)
    return None if nearest >= _TOGETHER else (i, j)


def _parted(state: Components) -> bool:
    """Whether every two components are far enough apart for v to be the variance within them."""
    return _closest(state)[0] >= _PARTED


def _closest(state: Components) -> tuple[float, int, int]:
    """The least distance of two means in deviations of the kernel, and the two, i < j."""
    if len(state.means) < 2:
        return math.inf, 0, 0
    distances = torch.cdist(state.means, state.means)
    distances.fill_diagonal_(math.inf)
    nearest = distances.min()
    i, j = (distances == nearest).nonzero()[0].tolist()
    return float(nearest) / math.sqrt(float(state.covariances[0])), min(i, j), max(i, j)


def _joined(state: Components, i: int, j: int) -> Components:
    """Component j, a copy of i, given back to it."""
    log_mass = state.log_mass.clone()
    log_mass[i] = torch.logaddexp(log_mass[i], log_mass[j])
    keep = [k for k in range(len(log_mass)) if k != j]
    return Components(log_mass[keep], state.means[keep], state.covariances[keep])
