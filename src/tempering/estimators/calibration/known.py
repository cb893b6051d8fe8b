"""Warnings and errors about what the data don't determine of a temperature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from tempering.errors import (
    CollapseWarning,
    ConvergenceWarning,
    TemperatureError,
    TemperingWarning,
)
from tempering.estimators.calibration.advice import advised
from tempering.estimators.calibration.designs import Blocks, OneBlock
from tempering.estimators.calibration.input import InputFit
from tempering.estimators.calibration.labels import listing
from tempering.estimators.calibration.moments import CalibrationProblem
from tempering.estimators.calibration.newton import TemperatureFit
from tempering.estimators.calibration.settings import FitSettings
from tempering.ranks import here

_LEVEL = 5  # the caller of fit(), past `one_threaded`


def explain(
    problem: CalibrationProblem,
    blocks: Blocks,
    fit: TemperatureFit,
    settings: FitSettings,
    names: Sequence[object] | np.ndarray,
    kind: str,
) -> TemperatureFit:
    """Warn of what a fit could not determine; a temperature that nothing fixes becomes NaN.

    names: of the blocks. kind: what a block is ("class", "group"), "" where there is one only.

    Warns CollapseWarning where T ran into a bound, ConvergenceWarning where the fit stopped
    early, TemperingWarning where a block has no evidence. Raises TemperatureError when no
    temperature at all is fixed by the data or a prior.
    """
    warn_unfinished(fit.converged, fit.interrupted, fit.n_iter, settings.max_iter)
    if fit.totals is None:
        return fit
    empty = fit.totals.weight == 0
    on_top = (fit.totals.excess == 0) & ~empty
    flat = on_top & constant_blocks(problem, blocks) if bool(on_top.any()) else on_top
    free = settings.prior is None
    if free and bool((flat | empty).all()):
        raise _unidentified()
    outcome = "it is NaN and such rows are refused" if free else "it is the prior's"
    mend = f"; give more data, or a prior on log T such as {advised().prior}" if free else ""
    _warn(empty, names, kind, f"no row says anything about T: {outcome}{mend}")
    _warn(flat, names, kind, f"every row of logits is constant, so T is unknown: {outcome}{mend}")
    low, high = settings.log_beta_bounds
    cold, hot = fit.log_beta == high, fit.log_beta == low
    separable = on_top & ~flat
    if free:
        _warn(separable, names, kind, _separable(settings) + mend, CollapseWarning)
    _warn(
        cold & ~on_top,
        names,
        kind,
        f"the best T lies below the bound {settings.bounds[0]:g}: the unit of the logits is tiny; "
        f"{advised().lower_bound}multiply the logits",
        CollapseWarning,
    )
    _warn(
        hot & ~on_top & ~empty,
        names,
        kind,
        f"the best T lies above the bound {settings.bounds[1]:g}: the logits rank the labels no "
        "better than chance (check that labels and columns match), or their unit is huge",
        CollapseWarning,
    )
    if free:
        fit = replace(fit, log_beta=torch.where(flat | empty, math.nan, fit.log_beta))
    return fit


def explain_inputs(problem: CalibrationProblem, fit: InputFit, settings: FitSettings) -> None:
    """`explain` for a per-input temperature."""
    warn_unfinished(fit.converged, fit.interrupted, fit.n_iter, settings.max_iter)
    if fit.interrupted:
        return
    if settings.prior is None and fit.excess == 0:
        if bool(constant_blocks(problem, OneBlock()).all()):
            raise _unidentified()
        text = f"{_separable(settings)}; give more data, or a prior such as {advised().prior}"
        warnings.warn(text, CollapseWarning, stacklevel=_LEVEL)
    elif fit.bounded:
        warnings.warn(
            f"{fit.bounded} of {problem.logits.n_rows} rows have their temperature at a bound "
            f"{settings.bounds}: the data drive log T there; give a prior such as "
            f"{advised().prior}{advised().wider_bounds}",
            CollapseWarning,
            stacklevel=_LEVEL,
        )
    idle = [name for name, sd in zip(("entropy", "log peak"), fit.model.sd) if float(sd) == 0]
    if idle:
        warnings.warn(
            f"the {' and the '.join(idle)} of softmax(z) is the same in every row, so what T owes "
            "to it is unknown: its coefficient is 0",
            TemperingWarning,
            stacklevel=_LEVEL,
        )


def _unidentified() -> TemperatureError:
    return TemperatureError(
        "the temperature is not identified: every row of logits is constant, so all temperatures "
        "give the same probabilities; check that these are the logits, or give a prior on log T, "
        f"e.g. {advised().prior}"
    )


def _separable(settings: FitSettings) -> str:
    return (
        "the data are separable (every label has the top logit), so the loss falls all the way "
        f"to T -> 0: T stopped at its bound {settings.bounds[0]:g}, which is no estimate"
    )


def constant_blocks(problem: CalibrationProblem, blocks: Blocks) -> Bool[Tensor, "blocks"]:
    """Blocks in which every row of positive weight has one finite value only."""
    varied = torch.zeros(blocks.size, dtype=torch.bool, device=problem.logits.device)
    with here().together():
        for span, z in problem.chunks():
            spread = z.amax(1) - z.masked_fill(torch.isneginf(z), math.inf).amin(1)
            weight = problem.weight(span)
            counts = spread > 0 if weight is None else (spread > 0) & (weight > 0)
            index = blocks.index(z, span)
            if index is None:
                varied |= counts.any()
            else:
                varied[index[counts]] = True
    (found,) = here().sum(varied)
    return (found == 0).to(varied.device)


def warn_unfinished(converged: bool, interrupted: bool, n_iter: int, max_iter: int) -> None:
    """ConvergenceWarning for a fit that stopped early."""
    if interrupted:
        text = f"the fit was interrupted after {n_iter} passes: T is the best so far, not converged"
    elif not converged:
        text = (
            f"the fit did not converge in {n_iter} passes; "
            f"{advised().more_passes.format(max_iter=max_iter)}give a prior on log T such as "
            f"{advised().prior} if the data fix it poorly"
        )
    else:
        return
    warnings.warn(text, ConvergenceWarning, stacklevel=_LEVEL + 1)


def warn_missing(counts: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Names of the classes without a label, with a warning if there are any."""
    missing = names[counts == 0]
    if len(missing):
        warnings.warn(
            f"{len(missing)} of {len(names)} classes never occur among the labels "
            f"({listing(missing)}): how well they are calibrated can't be known from these data",
            TemperingWarning,
            stacklevel=_LEVEL - 1,
        )
    return missing


def _warn(
    where: Bool[Tensor, "blocks"],
    names: Sequence[object] | np.ndarray,
    kind: str,
    text: str,
    category: type[TemperingWarning] = TemperingWarning,
) -> None:
    if bool(where.any()):
        affected = np.asarray(names)[where.cpu().numpy()]
        place = f"{kind} {listing(affected)}: " if kind else ""
        warnings.warn(place + text, category, stacklevel=_LEVEL + 1)
