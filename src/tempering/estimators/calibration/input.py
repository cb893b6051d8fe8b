"""A temperature for each row: log T linear in what the row's own logits say."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.estimators.calibration.designs import features
from tempering.estimators.calibration.moments import CalibrationProblem
from tempering.estimators.calibration.newton import pooled
from tempering.estimators.calibration.settings import FitSettings
from tempering.ranks import here

# The last step, in coefficients of log T: Newton's error after it is about its square, 1e-8.
_STEP_TOLERANCE = 1e-4
# The longest step: a factor of 7 in T, beyond which the quadratic model says little.
_MAX_STEP = 2.0
# A row this near a bound of log T, or beyond it, counts as at the bound: 0.1 % of T.
_AT_BOUND = 1e-3


@dataclass(frozen=True)
class InputModel:
    """log T_i = clip(coefficients[0] + sum_j coefficients[j] (feature_ij - mean_j)/sd_j, bounds).

    A feature of zero sd takes no part: its coefficient is 0.
    """

    coefficients: Float[Tensor, "3"]
    mean: Float[Tensor, "2"]
    sd: Float[Tensor, "2"]
    bounds: tuple[float, float]

    def inputs(self, z: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows 3"]:
        """1 and the standardised features of each row."""
        spread = torch.where(self.sd > 0, self.sd, math.inf)
        standard = (features(z) - self.mean) / spread
        return torch.cat([torch.ones_like(standard[:, :1]), standard], 1)

    def log_temperature(self, inputs: Float[Tensor, "rows 3"]) -> Float[Tensor, "rows"]:
        """log T of rows from their `inputs`, within the bounds."""
        low, high = map(math.log, self.bounds)
        return self.raw(inputs).clamp(low, high)

    def raw(self, inputs: Float[Tensor, "rows 3"]) -> Float[Tensor, "rows"]:
        """log T before the bounds."""
        return (inputs * self.coefficients).sum(1)


@dataclass(frozen=True)
class InputFit:
    """Where a per-input fit ended; `bounded` counts rows at a bound, `excess` as in Totals."""

    model: InputModel
    hessian: Float[Tensor, "3 3"]
    excess: float
    bounded: int
    n_iter: int
    converged: bool
    interrupted: bool = False

    def standard_error(self) -> float:
        """Of log T at the mean features; NaN at a bound."""
        if not bool(torch.isfinite(self.hessian).all()):
            return math.nan
        inverse = torch.linalg.pinv(self.hessian, hermitian=True)
        variance = float(inverse[0, 0])
        return math.sqrt(variance) if variance > 0 and not self.at_bound else math.nan

    @property
    def at_bound(self) -> bool:
        """Whether log T at the mean features sits at or beyond a bound."""
        low, high = map(math.log, self.model.bounds)
        return not low < float(self.model.coefficients[0]) < high


@dataclass(frozen=True)
class _Point:
    """Loss and derivatives at one set of coefficients."""

    loss: float
    gradient: Float[Tensor, "3"]
    fisher: Float[Tensor, "3 3"]
    full: Float[Tensor, "3 3"]
    excess: float
    bounded: int


def fit_inputs(problem: CalibrationProblem, settings: FitSettings) -> InputFit:
    """The coefficients that minimise nll plus the prior's loss, by damped Newton.

    The fit starts at the best single temperature and never ends with a greater loss. The loss is
    not convex in the coefficients: the fit finds a local minimum, downhill from its start.
    The prior N(mean, sd) is on log T at the mean features; slopes have the prior N(0, sd).
    """
    one = pooled(problem, settings)
    zeros = torch.zeros(2, dtype=torch.float64, device=problem.logits.device)
    model = InputModel(torch.cat([-one.log_beta, zeros]), zeros, zeros, settings.bounds)
    try:
        if one.interrupted:
            raise KeyboardInterrupt
        mean, sd = _statistics(problem)
        model = replace(model, mean=mean, sd=sd)
        best, n_iter = _evaluate(problem, model, settings), 1
    except KeyboardInterrupt:  # one temperature for all is the best so far
        unknown = zeros.new_full((3, 3), math.nan)
        return InputFit(model, unknown, math.nan, 0, one.n_iter, False, interrupted=True)
    active = torch.cat([sd.new_ones(1), sd]) > 0
    step, shrunk = here().same(_newton_step(best, active)), False
    interrupted, converged = False, best.excess == 0 and settings.prior is None
    while not (converged or interrupted) and n_iter < settings.max_iter:
        trial = replace(model, coefficients=model.coefficients + step)
        if float(step.abs().max()) <= _STEP_TOLERANCE:
            # The loss has a kink where a row meets a bound, and steps shrink in front of it.
            converged = not shrunk or best.bounded > 0
            model = model if shrunk else trial
            break
        try:
            point = _evaluate(problem, trial, settings)
        except KeyboardInterrupt:
            interrupted = True
            break
        n_iter += 1
        if point.loss <= best.loss:
            model, best = trial, point
            step, shrunk = here().same(_newton_step(best, active)), False
        else:
            step, shrunk = step / 4, True
    return InputFit(
        model, best.full, best.excess, best.bounded, n_iter + one.n_iter, converged, interrupted
    )


def _statistics(problem: CalibrationProblem) -> tuple[Float[Tensor, "2"], Float[Tensor, "2"]]:
    """Weighted mean and sd of the features; an sd within rounding of 0 is 0."""
    device = problem.logits.device
    totals = torch.zeros(5, dtype=torch.float64, device=device)  # w, w x, w x^2 of two features
    shift = torch.zeros(2, dtype=torch.float64, device=device)
    shifted = False
    with here().together():
        for span, z in problem.chunks():
            values = features(z)
            if not shifted:
                # Sums are about a value near the mean, so that they don't cancel.
                shift, shifted = values[0], True
            weight = problem.weight(span)
            w = torch.ones_like(values[:, 0]) if weight is None else weight
            centred = values - shift
            moments = (w[:, None] * torch.cat([centred, centred * centred], 1)).sum(0)
            totals += torch.cat([w.sum()[None], moments])
    common = here().same(shift)
    weight, first, second = totals[0], totals[1:3], totals[3:]
    gap = shift - common
    second = second + gap * (2 * first + weight * gap)
    first = first + weight * gap
    totals = here().sum(torch.cat([weight[None], first, second]))[0].to(device)
    shift = common.to(device)
    offset, square = totals[1:].view(2, 2) / totals[0]
    sd = (square - offset * offset).clamp(min=0).sqrt()
    return shift + offset, torch.where(sd > 1e-6, sd, 0.0)


def _evaluate(problem: CalibrationProblem, model: InputModel, settings: FitSettings) -> _Point:
    """One pass over all rows."""
    low, high = map(math.log, settings.bounds)
    device = model.coefficients.device
    loss, excess, bounded = 0.0, 0.0, 0
    gradient = torch.zeros(3, dtype=torch.float64, device=device)
    fisher, full = gradient.new_zeros(3, 3), gradient.new_zeros(3, 3)
    with here().together():
        for span, z in problem.chunks():
            inputs = model.inputs(z)
            raw = model.raw(inputs)
            log_temperature = raw.clamp(low, high)
            moments = problem.moments(z, span, -log_temperature).double()
            weight = problem.weight(span)
            if weight is not None:
                # A row of weight 0 must not count, even if its loss is infinite: 0 * inf is NaN.
                moments = torch.where(weight > 0, moments * weight, 0.0)
            nll, slope, curvature, beaten = moments
            loss += float(nll.sum())
            excess += float(beaten.sum())
            free = inputs * (raw == log_temperature)[:, None]
            bounded += int(((raw <= low + _AT_BOUND) | (raw >= high - _AT_BOUND)).sum())
            # Products of three columns, summed. A matrix product would start threads, which costs
            # far more than so small a product on a busy machine.
            square = free[:, :, None] * free[:, None, :]
            gradient -= (free * slope[:, None]).sum(0)
            fisher += (square * curvature[:, None, None]).sum(0)
            full += (square * (curvature + slope)[:, None, None]).sum(0)
    numbers = gradient.new_tensor([loss, excess, bounded])
    totals = here().sum(numbers, gradient, fisher, full)
    numbers, gradient, fisher, full = (total.to(device) for total in totals)
    loss, excess, bounded = float(numbers[0]), float(numbers[1]), int(numbers[2])
    if settings.prior is not None:
        centre, sd = settings.prior
        gap = (model.coefficients - gradient.new_tensor([centre, 0.0, 0.0])) / sd
        loss += float(gap @ gap) / 2
        gradient += gap / sd
        stiffness = torch.eye(3, dtype=torch.float64, device=device) / sd**2
        fisher, full = fisher + stiffness, full + stiffness
    return here().same(_Point(loss, gradient, fisher, full, excess, bounded))


def _newton_step(point: _Point, active: Tensor) -> Float[Tensor, "3"]:
    """Newton's step where the second derivative is positive definite, Fisher's elsewhere."""
    gradient = point.gradient[active]
    for matrix in (point.full, point.fisher):
        values, vectors = torch.linalg.eigh(matrix[active][:, active])
        if float(values[0]) > 1e-9 * float(values[-1]):
            break
    inverse = torch.where(values > 1e-9 * values[-1].clamp(min=1e-300), 1 / values, 0.0)
    step = torch.zeros_like(point.gradient)
    step[active] = -(vectors @ (inverse * (vectors.T @ gradient)))
    longest = float(step.abs().max())
    return step * (_MAX_STEP / longest) if longest > _MAX_STEP else step
