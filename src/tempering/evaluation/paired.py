"""Paired statistics over chunks of text: every difference carries n and an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.counts import whole_number
from tempering.errors import InputError
from tempering.intervals import t_quantile


class IntervalEstimate(NamedTuple):
    """A mean over units (chunks, prompts) with its standard error and 95% interval.

    se = sd / sqrt(n); low, high = mean -+ t_{0.975, n-1} se. NaN with a single unit.
    """

    value: float
    se: float
    low: float
    high: float
    n: int


def mean_estimate(values: Sequence[float] | Tensor) -> IntervalEstimate:
    """The mean of independent values with standard error and 95% interval (Student t)."""
    data = torch.as_tensor(values, dtype=torch.float64)
    n = len(data)
    if n == 0:
        raise InputError("an estimate needs at least one value")
    mean = float(data.mean())
    if n == 1:
        return IntervalEstimate(mean, math.nan, math.nan, math.nan, 1)
    se = float(data.std() / math.sqrt(n))
    half = t_quantile(n - 1) * se
    return IntervalEstimate(mean, se, mean - half, mean + half, n)


def paired_difference(
    after: Sequence[float] | Tensor, before: Sequence[float] | Tensor
) -> IntervalEstimate:
    """Mean of after - before over the same units, with standard error and 95% interval."""
    first = torch.as_tensor(after, dtype=torch.float64)
    second = torch.as_tensor(before, dtype=torch.float64)
    if first.shape != second.shape:
        raise InputError(
            f"paired values belong to the same units; got {len(first)} and {len(second)}"
        )
    return mean_estimate(first - second)


def bootstrap_mean(
    values: Float[Tensor, "units"], *, seed: SupportsIndex, draws: SupportsIndex = 2000
) -> IntervalEstimate:
    """The mean with a percentile bootstrap interval over units (Efron 1979); NaN with one."""
    data = values.to(torch.float64)
    if len(data) == 0:
        raise InputError("an estimate needs at least one value")
    if len(data) == 1:
        return IntervalEstimate(float(data), math.nan, math.nan, math.nan, 1)
    generator = torch.Generator().manual_seed(whole_number(seed, "seed"))
    picks = torch.randint(
        len(data), (whole_number(draws, "draws", 2), len(data)), generator=generator
    )
    means = data[picks].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return IntervalEstimate(float(data.mean()), float(means.std()), low, high, len(data))
