"""The largest amplitude of a pattern whose cost stays within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tempering.errors import InputError
from tempering.evaluation.paired import IntervalEstimate

LARGEST = 8.0  # the largest amplitude that is tried


@dataclass(frozen=True)
class Budget:
    """The result of the search, and every amplitude that was tried.

    amplitude: the largest tried whose mean cost is within the budget; 1 when none above 1 is.
    bounded: False when even the largest amplitude allowed stays within the budget.
    """

    amplitude: float
    cost: IntervalEstimate | None
    nats_per_token: float
    tried: tuple[tuple[float, IntervalEstimate], ...]
    bounded: bool


def largest_amplitude(
    cost_of: Callable[[float], IntervalEstimate],
    nats_per_token: float,
    *,
    evaluations: int = 8,
    tolerance: float = 0.005,
) -> Budget:
    """Find the largest amplitude a with mean cost(a) <= nats_per_token.

    Cost grows about as (log a)^2 (measured), so sqrt(cost) is nearly a straight line in log a. The
    search is the secant method on that line, kept within a bracket.

    Parameters
    ----------
    cost_of: the cost of the pattern at an amplitude (1 or more), paired on one set of chunks.
    nats_per_token: the budget, above 0.
    evaluations: the most calls of `cost_of`. tolerance: the search stops when the bracket in log a
        is narrower.

    Raises InputError for a budget that is not positive and finite.
    """
    if not 0 < nats_per_token < math.inf:
        raise InputError(f"a budget is a positive number of nats per token, not {nats_per_token}")
    tried: list[tuple[float, IntervalEstimate]] = []
    low, high = 0.0, math.log(LARGEST)
    low_root, high_root = 0.0, math.nan
    goal = math.sqrt(nats_per_token)
    log_a = math.log(1.15)  # a first guess
    reach = 0.02  # how far beyond the secant's guess to go, while no amplitude costs too much
    for _ in range(evaluations):
        # Rounded before it is measured, so that the amplitude in the record is the measured one.
        amplitude = round(math.exp(log_a), 4)
        log_a = math.log(amplitude)
        estimate = cost_of(amplitude)
        tried.append((amplitude, estimate))
        root = math.sqrt(max(estimate.value, 0.0))
        if estimate.value <= nats_per_token:
            low, low_root = log_a, root
        else:
            high, high_root = log_a, root
        if high - low < tolerance or low >= math.log(LARGEST):
            break
        if math.isnan(high_root):
            # No amplitude costs too much yet. Try one just beyond the point at which the line
            # through the origin reaches the goal, and go further beyond with each such try.
            slope = low_root / low if low_root > 0 else 0.0
            guess = goal / slope if slope > 0 else 2 * low
            log_a = min(max(guess, low) * (1 + reach), math.log(LARGEST))
            reach *= 4
        else:
            share = (goal - low_root) / max(high_root - low_root, 1e-12)
            # At least a twentieth of the bracket is cut off each time, so that it shrinks.
            log_a = low + (high - low) * min(max(share, 0.05), 0.95)
    within = [(a, cost) for a, cost in tried if cost.value <= nats_per_token]
    best = max(within, key=lambda item: item[0]) if within else None
    return Budget(
        amplitude=best[0] if best else 1.0,
        cost=best[1] if best else None,
        nats_per_token=nats_per_token,
        tried=tuple(sorted(tried, key=lambda item: item[0])),
        bounded=any(cost.value > nats_per_token for _, cost in tried),
    )
