"""Means and ratios over pieces that come in clusters, with a bootstrap over whole clusters."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.counts import whole_number
from tempering.evaluation.paired import IntervalEstimate


def cluster_bootstrap(
    values: Float[Tensor, "pieces"],
    weights: Float[Tensor, "pieces"],
    clusters: Int[Tensor, "pieces"],
    *,
    seed: int,
    draws: int = 2000,
) -> IntervalEstimate:
    """A weighted mean, sum w x / sum w, as `cluster_ratio`."""
    return cluster_ratio(values * weights, weights, clusters, seed=seed, draws=draws)


def cluster_ratio(
    tops: Float[Tensor, "pieces"],
    bottoms: Float[Tensor, "pieces"],
    clusters: Int[Tensor, "pieces"],
    *,
    seed: int,
    draws: int = 2000,
) -> IntervalEstimate:
    """sum tops / sum bottoms with a percentile bootstrap over clusters (Efron 1979; Cameron 2008).

    A draw takes as many clusters as there are, with replacement, each with all its pieces. NaN
    where the bottoms sum to 0 or less: of nothing, no share can come back. NaN interval with a
    single cluster.
    """
    _, places = clusters.unique(return_inverse=True)
    count = int(places.max()) + 1
    top = torch.zeros(count, dtype=torch.float64).index_add_(0, places, tops)
    bottom = torch.zeros(count, dtype=torch.float64).index_add_(0, places, bottoms)
    if not float(bottom.sum()) > 0:
        return IntervalEstimate(math.nan, math.nan, math.nan, math.nan, count)
    value = float(top.sum() / bottom.sum())
    if count == 1:
        return IntervalEstimate(value, math.nan, math.nan, math.nan, 1)
    generator = torch.Generator().manual_seed(whole_number(seed, "seed"))
    picks = torch.randint(count, (draws, count), generator=generator)
    below = bottom[picks].sum(1)
    # A draw without bottoms has no ratio: such draws make the interval endless, not shorter.
    drawn = torch.where(below > 0, top[picks].sum(1) / below, torch.inf)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    spread = float(drawn.std()) if bool(drawn.isfinite().all()) else math.inf
    return IntervalEstimate(value, spread, low, high, count)
