"""Loss, Brier score, confidence and hit of each row, and sums of them that a bootstrap can draw."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

METRICS = ("nll", "brier", "ece_equal_mass", "ece_equal_width")


@dataclass(frozen=True)
class Scores:
    """Per row, in the columns (before, after).

    nll: -log p_y, nats. brier: sum_k (p_k - 1[k = y])^2, 0..2. confidence: max_k p_k.
    hit: whether the top class is the label; no temperature changes it.
    """

    nll: Float[np.ndarray, "rows 2"]
    brier: Float[np.ndarray, "rows 2"]
    confidence: Float[np.ndarray, "rows 2"]
    hit: Bool[np.ndarray, "rows"]

    @classmethod
    def empty(cls, rows: int) -> Scores:
        """Scores to be filled in."""
        nll, brier, confidence = (np.empty((rows, 2)) for _ in range(3))
        return cls(nll, brier, confidence, np.empty(rows, np.bool_))

    def of(self, rows: Integer[np.ndarray, "some"]) -> Scores:
        """The scores of some rows."""
        return Scores(self.nll[rows], self.brier[rows], self.confidence[rows], self.hit[rows])

    def put(
        self,
        span: slice,
        z: Float[Tensor, "rows columns"],
        labels: Integer[Tensor, "rows"],
        log_temperature: Float[Tensor, "rows 1"],
    ) -> None:
        """Fill in a span of rows from their logits."""
        label = labels[:, None]
        u = z - z.amax(1, keepdim=True)
        self.hit[span] = (z.argmax(1) == labels).cpu().numpy()
        for column in range(2):
            v = u * torch.exp(-log_temperature).to(z.dtype) if column else u
            e = v.exp()
            partition = e.sum(1).double()
            p_label = e.gather(1, label).squeeze(1).double() / partition
            square = (e * e).sum(1).double() / partition**2
            nll = partition.log() - v.gather(1, label).squeeze(1).double()
            self.nll[span, column] = nll.cpu().numpy()
            self.brier[span, column] = (square - 2 * p_label + 1).cpu().numpy()
            self.confidence[span, column] = (1 / partition).cpu().numpy()


def equal_width(
    confidence: Float[np.ndarray, "rows"], weights: Float[np.ndarray, "rows"], bins: int
) -> Int[np.ndarray, "rows"]:
    """Bin of each row among `bins` intervals ((b-1)/bins, b/bins] of confidence."""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def equal_mass(
    confidence: Float[np.ndarray, "rows"], weights: Float[np.ndarray, "rows"], bins: int
) -> Int[np.ndarray, "rows"]:
    """Bin of each row among `bins` of equal weight by confidence; equal confidences share a bin."""
    _, place = np.unique(confidence, return_inverse=True)
    mass = np.bincount(place, weights)
    middle = (np.cumsum(mass) - mass / 2) / mass.sum()
    return np.minimum((middle * bins).astype(np.int64), bins - 1)[place]


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
        binned[:, i, 0] = binning(confidence, weights, bins)
        binned[:, i, 1] = weights * (scores.hit - confidence)
    return fixed, binned
