"""Safeguarded Newton in log beta, for one temperature or several independent ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tempering.estimators.calibration.designs import (
    Blocks,
    OneBlock,
    Totals,
    add_rows,
    block_totals,
)
from tempering.estimators.calibration.moments import CalibrationProblem, row_moments
from tempering.estimators.calibration.settings import FitSettings
from tempering.ranks import here

# The size of the last step in log beta. Newton's error after a step of size s is about s^2, and the
# loss is quadratic at its minimum, so its error is about s^4: 1e-12 nats a row. In small tables,
# whose passes cost little, log T itself is fitted to 1e-12.
_STEP_TOLERANCE = 1e-3
_FINE_TOLERANCE = 1e-6
_SMALL_ELEMENTS = 1 << 20
# Rows of the warm start. It must land where Newton's method converges: at 2048 rows the sampling
# error of log beta is about 0.02, and one step takes it to 1e-4; a last step of that size is small
# enough here. With many columns the second number limits the rows, to save memory.
_WARM_TOLERANCE = 0.02
_WARM_ROWS = 2048
_WARM_ELEMENTS = 1 << 21
# The first stride in log beta, a factor of 20 in T; strides double while they are used in full.
_MAX_STEP = 3.0
_SEED = 0


@dataclass(frozen=True)
class TemperatureFit:
    """The result of a fit.

    log_beta: of each block. loss: nll plus the prior's, of each block, at the last point passed
    over. totals: of that pass; None if there was none. n_iter: full passes. converged: every step
    fell under the tolerance, or its block sits at a bound. interrupted: Ctrl-C ended it.
    """

    log_beta: Float[Tensor, "blocks"]
    loss: Float[Tensor, "blocks"]
    totals: Totals | None
    n_iter: int
    converged: bool
    interrupted: bool = False

    def standard_error(self, settings: FitSettings) -> Float[Tensor, "blocks"]:
        """Of log T: one over the root of the second derivative; NaN at a bound or without rows."""
        if self.totals is None:
            return torch.full_like(self.log_beta, math.nan)
        low, high = settings.log_beta_bounds
        stiffness = settings.stiffness
        inside = (self.log_beta > low) & (self.log_beta < high)
        second = self.totals.curvature + self.totals.slope + stiffness
        return torch.where(inside & (second > 0), second.rsqrt(), math.nan)


def fit_blocks(
    problem: CalibrationProblem, blocks: Blocks, settings: FitSettings
) -> TemperatureFit:
    """The temperature of each block that minimises nll plus the prior's loss.

    A warm start on a sample of the rows gives one temperature for all; Newton passes over all
    rows follow. With a prior the loss may have two minima (nll is flat where T is large), so a
    second start at the prior's mean is tried and the better end is kept, block by block.
    """
    warm = here().same(warm_start(problem, settings))
    fit = _passes(problem, blocks, settings, warm)
    if settings.prior is None or fit.interrupted:
        return fit
    low, high = settings.log_beta_bounds
    other = _passes(problem, blocks, settings, min(max(-settings.prior[0], low), high))
    if fit.totals is None or other.totals is None:
        return replace(fit, converged=False, interrupted=True)
    better = other.loss < fit.loss - 1e-9 * (1 + fit.loss.abs())
    return TemperatureFit(
        torch.where(better, other.log_beta, fit.log_beta),
        torch.where(better, other.loss, fit.loss),
        Totals(*(torch.where(better, b, a) for a, b in zip(fit.totals, other.totals, strict=True))),
        fit.n_iter + other.n_iter,
        fit.converged and other.converged,
        other.interrupted,
    )


def warm_start(problem: CalibrationProblem, settings: FitSettings) -> float:
    """log beta for all rows together, from a sample of them; the fit itself where rows are few."""
    size = min(_WARM_ROWS, max(256, _WARM_ELEMENTS // problem.logits.n_columns))
    sample = problem.sample(size, _SEED)
    buffer = sample.logits.new_empty(2 * sample.logits.numel())

    def evaluate(log_beta: Tensor) -> Totals:
        sums = torch.zeros(5, 1, dtype=torch.float64, device=log_beta.device)
        name = problem.logits.name
        moments = row_moments(sample.logits, sample.labels, log_beta[0], buffer, sample.rows, name)
        add_rows(sums, moments, sample.weights, None)
        return Totals(*sums)

    low, high = settings.log_beta_bounds
    start = _inverse_unit(sample.logits).clamp(low, high)
    free = FitSettings(None, settings.bounds, 50)
    fit = newton(evaluate, start, free, _WARM_TOLERANCE)
    if fit.interrupted:
        raise KeyboardInterrupt  # there is no result yet to keep
    return float(fit.log_beta)


def _inverse_unit(z: Float[Tensor, "rows columns"]) -> Float[Tensor, "1"]:
    """log beta at which half of the rows span less than one T, 0 where no row varies.

    So a fit starts, and ends, at the same T in units of the logits, whatever their unit.
    """
    lowest = z.amin(1)
    if bool(torch.isneginf(lowest).any()):  # classes that are ruled out don't count
        lowest = z.masked_fill(torch.isneginf(z), math.inf).amin(1)
    spread = z.amax(1).double() - lowest.double()
    varied = spread[(spread > 0) & torch.isfinite(spread)]
    return -varied.median().log()[None] if len(varied) else spread.new_zeros(1)


def _passes(
    problem: CalibrationProblem, blocks: Blocks, settings: FitSettings, start: float
) -> TemperatureFit:
    at = torch.full((blocks.size,), start, dtype=torch.float64, device=problem.logits.device)
    small = problem.logits.n_rows * problem.logits.n_columns <= _SMALL_ELEMENTS
    return newton(
        lambda log_beta: block_totals(problem, blocks, log_beta),
        at,
        settings,
        _FINE_TOLERANCE if small else _STEP_TOLERANCE,
    )


def newton(
    evaluate: Callable[[Float[Tensor, "blocks"]], Totals],
    log_beta: Float[Tensor, "blocks"],
    settings: FitSettings,
    tolerance: float,
) -> TemperatureFit:
    """Minimise each block's loss in its own log beta, all blocks in the same passes.

    nll is convex in beta, so the sign of the slope brackets the minimum. The step
    -sign(g) log(1 + |g|/c) is Newton's near the minimum (c is the curvature there) and grows
    only as a logarithm far from it, where Newton's own would fly off; a step that leaves the
    bracket halves it instead.
    """
    low, high = settings.log_beta_bounds
    device = log_beta.device
    # A handful of numbers: numpy takes a third of torch's time for each operation. Infinite ends of
    # a bracket, and numbers near float64's ends, are no surprise here.
    at = log_beta.cpu().numpy()
    left, right = np.full_like(at, -math.inf), np.full_like(at, math.inf)
    totals, loss = None, np.full_like(at, math.inf)
    stride = np.full_like(at, _MAX_STEP)
    n_iter, converged, interrupted = 0, False, False
    with np.errstate(all="ignore"):
        while n_iter < settings.max_iter and not converged:
            try:
                totals = evaluate(torch.from_numpy(at).to(device))
            except KeyboardInterrupt:
                interrupted = True
                break
            n_iter += 1
            nll, slope, curvature, excess, weight = (total.cpu().numpy() for total in totals)
            pulled, pull, stiffness = settings.pull(at)
            loss, g = nll + pulled, slope + pull
            left, right = np.where(g < 0, at, left), np.where(g > 0, at, right)
            step = _step(g, slope, curvature, stiffness, stride)
            # Strides that were used in full double, so that hundreds of decades take few passes.
            stride = np.where(abs(step) >= stride, 2 * stride, _MAX_STEP)
            new = at + step
            # Only the bracket's end that the step approaches counts: a step too small to move log
            # beta stays on the other.
            outside = ((g > 0) & (new <= left)) | ((g < 0) & (new >= right))
            new = np.where(outside, (left + right) / 2, new)
            if settings.prior is None:
                # Where every label has the top logit the loss falls down to T = 0: to the bound.
                new = np.where((excess == 0) & (weight > 0), math.inf, new)
            new = new.clip(low, high)
            at_bound = ((at == low) & (g >= 0)) | ((at == high) & (g <= 0))
            done = at_bound | (abs(new - at) <= tolerance) | (weight == 0)
            at, converged = here().same((np.where(at_bound, at, new), bool(done.all())))
    found, reached = torch.from_numpy(at).to(device), torch.from_numpy(loss).to(device)
    return TemperatureFit(found, reached, totals, n_iter, converged, interrupted)


def _step(
    g: Float[np.ndarray, "blocks"],
    slope: Float[np.ndarray, "blocks"],
    fisher: Float[np.ndarray, "blocks"],
    stiffness: float,
    stride: Float[np.ndarray, "blocks"],
) -> Float[np.ndarray, "blocks"]:
    """The safeguarded step, `stride` at most; 0 where the slope is 0."""
    # With a prior the slope of nll does not vanish at the minimum, so the full second derivative
    # is needed for quadratic convergence; far from the minimum it may be negative.
    fisher = fisher + stiffness
    curvature = np.maximum(fisher + slope, 0.1 * fisher) if stiffness else fisher
    size = np.minimum(np.log1p(abs(g) / curvature), stride)
    return np.where(g == 0, 0.0, -np.sign(g) * size)


def pooled(problem: CalibrationProblem, settings: FitSettings) -> TemperatureFit:
    """One temperature for all rows."""
    return fit_blocks(problem, OneBlock(), settings)
