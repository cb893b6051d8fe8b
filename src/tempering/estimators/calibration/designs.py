"""What the temperature may depend on: nothing, the predicted class, a group, or the row itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from tempering.estimators.calibration.moments import CalibrationProblem
from tempering.ranks import here


class Blocks(ABC):
    """A temperature for each of `size` blocks of rows; every row lies in one block."""

    size: int

    @abstractmethod
    def index(
        self, z: Float[Tensor, "rows columns"], span: slice
    ) -> Integer[Tensor, "rows"] | None:
        """The block of each row of a chunk; None where there is one block only."""


class OneBlock(Blocks):
    """All rows share one temperature."""

    size = 1

    def index(self, z: Float[Tensor, "rows columns"], span: slice) -> None:
        return None


class ByPrediction(Blocks):
    """A temperature for each predicted class, argmax_k z_k, the first of tied ones.

    The whole row is divided by one temperature, so the order within a row is kept.
    """

    def __init__(self, n_columns: int) -> None:
        self.size = n_columns

    def index(self, z: Float[Tensor, "rows columns"], span: slice) -> Integer[Tensor, "rows"]:
        return z.argmax(1)


class ByGroup(Blocks):
    """A temperature for each group; `codes` holds the group of each row, 0..size-1."""

    def __init__(self, codes: Integer[Tensor, "rows"], size: int) -> None:
        self.codes, self.size = codes, size

    def index(self, z: Float[Tensor, "rows columns"], span: slice) -> Integer[Tensor, "rows"]:
        return self.codes[span].long()


class Totals(NamedTuple):
    """Weighted sums of `row_moments` over the rows of each block, float64, and the weights' sum."""

    nll: Float[Tensor, "blocks"]
    slope: Float[Tensor, "blocks"]
    curvature: Float[Tensor, "blocks"]
    excess: Float[Tensor, "blocks"]
    weight: Float[Tensor, "blocks"]


def block_totals(
    problem: CalibrationProblem, blocks: Blocks, log_beta: Float[Tensor, "blocks"]
) -> Totals:
    """One pass over all rows at the inverse temperatures of the blocks."""
    sums = torch.zeros(5, blocks.size, dtype=torch.float64, device=log_beta.device)
    with here().together():
        for span, z in problem.chunks():
            index = blocks.index(z, span)
            at = log_beta[0] if index is None else log_beta[index]
            add_rows(sums, problem.moments(z, span, at), problem.weight(span), index)
    (total,) = here().sum(sums)
    return Totals(*total.to(sums.device))


def add_rows(
    sums: Float[Tensor, "5 blocks"],
    moments: Float[Tensor, "4 rows"],
    weights: Float[Tensor, "rows"] | None,
    index: Integer[Tensor, "rows"] | None,
) -> None:
    """Add rows to the sums of their blocks, in float64."""
    if index is None and weights is None:
        sums[:4, 0] += moments.double().sum(1)
        sums[4, 0] += moments.shape[1]
        return
    wide = moments.double()
    w = wide.new_ones(moments.shape[1]) if weights is None else weights
    # A row of weight 0 must not count, even if its loss is infinite: 0 * inf is NaN.
    wide = torch.cat([torch.where(w > 0, wide * w, 0.0), w[None]])
    if index is None:
        sums[:, 0] += wide.sum(1)
    else:
        sums.index_add_(1, index, wide)


def features(z: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows 2"]:
    """The features of a row of logits that a per-input temperature depends on, nats, float64.

        entropy  S = -sum_k p_k log p_k, the log of the support, with p = softmax(z)
        log peak log max_k p_k

    Both stay the same when a constant is added to the row.
    """
    u = z - z.amax(1, keepdim=True)
    e = u.exp()
    partition = e.sum(1)
    energy = torch.where(e > 0, e * u, 0.0).sum(1)
    log_partition = partition.log()
    return torch.stack([log_partition - energy / partition, -log_partition], 1).double()
