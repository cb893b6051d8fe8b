"""Loss, Brier score, confidence and hit of each row, and their sums for a bootstrap."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from tempering.ranks import Ranks

# Sums over up to about a thousand classes agree to this in float64: 64 eps.
_FLOOR = 64 * 2.0**-52
# A run of ties wider than this many slacks is no tie. Confidences that are equal but for rounding
# differ by two slacks at most; twice that allows for slacks that differ from row to row.
_WIDEST_TIE = 4
METRICS = ("nll", "brier", "ece_equal_mass", "ece_equal_width")


@dataclass(frozen=True)
class Scores:
    """Per row, in the columns (before, after).

    nll: -log p_y, nats. brier: sum_k (p_k - 1[k = y])^2, 0..2. confidence: max_k p_k.
    slack: the greatest difference of confidences that are equal but for the rounding of the logits.
    hit: whether the top class is the label; no temperature changes it.
    """

    nll: Float[np.ndarray, "rows 2"]
    brier: Float[np.ndarray, "rows 2"]
    confidence: Float[np.ndarray, "rows 2"]
    slack: Float[np.ndarray, "rows 2"]
    hit: Bool[np.ndarray, "rows"]

    @classmethod
    def empty(cls, rows: int) -> Scores:
        """Scores to be filled in."""
        nll, brier, confidence, slack = (np.zeros((rows, 2)) for _ in range(4))
        return cls(nll, brier, confidence, slack, np.zeros(rows, np.bool_))

    def of_all(self, ranks: Ranks) -> Scores:
        """The scores that all ranks filled in, each those of its own rows."""
        own = (torch.from_numpy(getattr(self, field.name)) for field in fields(self))
        nll, brier, confidence, slack, hit = (total.numpy() for total in ranks.sum(*own))
        return Scores(nll, brier, confidence, slack, hit > 0)

    def of(self, rows: Integer[np.ndarray, "some"]) -> Scores:
        """The scores of some rows."""
        return Scores(
            self.nll[rows],
            self.brier[rows],
            self.confidence[rows],
            self.slack[rows],
            self.hit[rows],
        )

    def put(
        self,
        span: slice,
        z: Float[Tensor, "rows columns"],
        labels: Integer[Tensor, "rows"],
        log_temperature: Float[Tensor, "rows 1"],
        rounding: Rounding,
    ) -> None:
        """Fill in a span of rows from their logits, in float64.

        The logits z_k and z_top of a row are known to within eps/2 of their size, so the
        confidence p is known to within p sum_{k != top} r_k (|dz_k| + |dz_top|)/T.
        """
        label = labels[:, None]
        z = z.double()
        top = z.argmax(1, keepdim=True)
        highest = z.gather(1, top)
        u = z - highest
        size = z.abs() + highest.abs() + 2 * rounding.added
        self.hit[span] = (top == label).squeeze(1).cpu().numpy()
        for column in range(2):
            beta = torch.exp(-log_temperature) if column else 1.0
            v = u * beta
            e = v.exp()
            partition = e.sum(1)
            p_label = e.gather(1, label).squeeze(1) / partition
            square = (e * e).sum(1) / partition**2
            nll = partition.log() - v.gather(1, label).squeeze(1)
            self.nll[span, column] = nll.cpu().numpy()
            self.brier[span, column] = (square - 2 * p_label + 1).cpu().numpy()
            self.confidence[span, column] = (1 / partition).cpu().numpy()
            # Where e is 0 the size may be inf; the product is 0 there, not NaN.
            others = torch.where(e > 0, e * (size * beta), 0.0).scatter_(1, top, 0.0).sum(1)
            slack = rounding.eps * others / partition**2 + _FLOOR / partition
            self.slack[span, column] = slack.cpu().numpy()


@dataclass(frozen=True)
class Rounding:
    """How well logits are known: to within eps/2 (|z| + added).

    added: 1 for the logs of probabilities, which are known to within eps/2 of *their* size.
    """

    eps: float
    added: float


def equal_width(
    confidence: Float[np.ndarray, "rows"],
    weights: Float[np.ndarray, "rows"],
    bins: int,
    slack: Float[np.ndarray, "rows"] | float = 0.0,
) -> Int[np.ndarray, "rows"]:
    """Bin of each row among `bins` intervals ((b-1)/bins, b/bins] of confidence.

    Confidences above an edge by no more than their slack lie on the edge.
    """
    return np.clip(np.ceil((confidence - slack) * bins).astype(np.int64) - 1, 0, bins - 1)


def equal_mass(
    confidence: Float[np.ndarray, "rows"],
    weights: Float[np.ndarray, "rows"],
    bins: int,
    slack: Float[np.ndarray, "rows"] | float = 0.0,
) -> Int[np.ndarray, "rows"]:
    """Bin of each row among `bins` of equal weight by confidence; equal confidences share a bin."""
    place = ties(confidence, np.broadcast_to(slack, confidence.shape))
    mass = np.bincount(place, weights)
    middle = (np.cumsum(mass) - mass / 2) / mass.sum()
    return np.minimum((middle * bins).astype(np.int64), bins - 1)[place]


def ties(
    values: Float[np.ndarray, "rows"], slack: Float[np.ndarray, "rows"]
) -> Int[np.ndarray, "rows"]:
    """The rank of each value, the same for values that are equal to within their slack.

    Neighbours within their slack are tied. A run of neighbours that is wider than a few slacks is
    not a tie but a dense stretch of values: it is cut into pieces one slack wide.
    """
    order = np.argsort(values, kind="stable")
    sorted_values, sorted_slack = values[order], slack[order]
    between = np.maximum(sorted_slack[1:], sorted_slack[:-1])
    first = np.r_[True, np.diff(sorted_values) > between]
    run = np.cumsum(first) - 1
    start = sorted_values[first]
    width = np.maximum.reduceat(sorted_slack, np.flatnonzero(first))
    last = np.r_[np.flatnonzero(first)[1:], len(values)] - 1
    dense = sorted_values[last] - start > _WIDEST_TIE * width
    step = np.where(dense, width, np.inf)[run]
    piece = np.floor((sorted_values - start[run]) / np.where(step > 0, step, np.inf))
    new = first | np.r_[True, np.diff(piece) != 0]
    place = np.empty(len(values), np.int64)
    place[order] = np.cumsum(new) - 1
    return place


def row_sums(
    scores: Scores, weights: Float[np.ndarray, "rows"], bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the metrics are made of, as (fixed sums, bin sums) that add up over rows.

    Fixed [rows, 5]: w, w nll before and after, w brier before and after. For the two kinds of
    bins, before and after, [rows] bin and w (hit - confidence): packed as [rows, 4, 2].
    """
    w = weights[:, None]
    fixed = np.concatenate([w, w * scores.nll, w * scores.brier], 1)
    binned = np.empty((len(weights), 4, 2))
    for i, (binning, column) in enumerate(product((equal_mass, equal_width), (0, 1))):
        confidence = scores.confidence[:, column]
        binned[:, i, 0] = binning(confidence, weights, bins, scores.slack[:, column])
        binned[:, i, 1] = weights * (scores.hit - confidence)
    return fixed, binned
