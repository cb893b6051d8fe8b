"""Loss of each row and its derivatives in log beta, in one pass over the rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from tempering.estimators.calibration.check import (
    Rows,
    check_label_logits,
    check_logit_rows,
    check_reach,
    log_probabilities,
)
from tempering.estimators.calibration.source import Logits

# exp underflows to 0 far above this in float64 too (at -745).
_UNDERFLOW = -1e4
_SHORT = 32  # columns
# float32 holds 1/T for |log T| up to 88; this leaves a factor of 1000 for products with it.
_REACH = 80.0


@dataclass
class CalibrationProblem:
    """Rows to calibrate on: logits, the column of each label, optional weights.

    inputs: "logits" or "probabilities", which become their logs a chunk at a time.
    """

    logits: Logits
    labels: Integer[Tensor, "rows"]
    weights: Float[Tensor, "rows"] | None
    inputs: str
    buffer: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    def chunks(self) -> Iterator[tuple[slice, Float[Tensor, "rows columns"]]]:
        """(span of rows, their logits) of this rank; probabilities are checked and become logs.

        Read them within `tempering.ranks.here().together()`, and sum over the ranks.
        """
        for first, z in self.logits.own_chunks():
            span = slice(first, first + len(z))
            yield span, as_logits(z, self.inputs, self._places(span), self.logits.name)

    def _places(self, span: slice) -> Rows:
        return self.logits.places(range(span.start, span.stop))

    def weight(self, span: slice) -> Float[Tensor, "rows"] | None:
        """Weights of a span of rows in float64, None where all are 1."""
        return None if self.weights is None else self.weights[span].double()

    def sample(self, size: int, seed: int) -> Sample:
        """About `size` rows spread over the table, in memory, as logits."""
        rows, z = self.logits.sample(size, seed)
        if self.inputs == "logits" and self.logits.are_probabilities(z):
            self._refuse_if_probabilities()
        index = torch.as_tensor(rows, device=self.labels.device)
        weights = None if self.weights is None else self.weights[index].double()
        places = self.logits.places(rows)
        z = as_logits(z, self.inputs, places, self.logits.name)
        return Sample(z, self.labels[index].long(), weights, places)

    def _refuse_if_probabilities(self) -> None:
        """DataError if not only the sample but every row looks like a row of probabilities."""
        if all(self.logits.are_probabilities(z) for _, z in self.logits.chunks()):
            raise self.logits.refuse_probabilities()

    def moments(
        self, z: Float[Tensor, "rows columns"], span: slice, log_beta: Float[Tensor, "*rows"]
    ) -> Float[Tensor, "4 rows"]:
        """`row_moments` of a chunk, in work buffers that stay in the cache."""
        labels = self.labels[span].long()
        if self.buffer.numel() < 2 * z.numel() or self.buffer.dtype != z.dtype:
            self.buffer = z.new_empty(2 * z.numel())
        places = self._places(span)
        return row_moments(z, labels, log_beta, self.buffer, places, self.logits.name)


@dataclass
class Sample:
    """A few rows in memory."""

    logits: Float[Tensor, "rows columns"]
    labels: Integer[Tensor, "rows"]
    weights: Float[Tensor, "rows"] | None
    rows: Rows


def as_logits(
    z: Float[Tensor, "rows columns"], inputs: str, rows: Rows, name: str = "X"
) -> Float[Tensor, "rows columns"]:
    """Logits of a chunk of inputs: themselves, or the logs of checked probabilities."""
    return z if inputs == "logits" else log_probabilities(z, rows, name)


def row_moments(
    z: Float[Tensor, "rows columns"],
    labels: Integer[Tensor, "rows"],
    log_beta: Float[Tensor, "*rows"],
    buffer: Tensor,
    indices: Rows,
    name: str = "X",
) -> Float[Tensor, "4 rows"]:
    """Loss of each row, its derivatives in log beta, and how far its label is below the top.

        nll       f = log sum_k exp(beta z_k) - beta z_y
        slope     df/dlog beta = beta (E_r[z] - z_y)
        curvature beta^2 Var_r(z), which is d2f/dlog beta^2 less the slope; a heat capacity
        excess    max_k z_k - z_y, 0 where the label is on top

    log_beta: one number, or one a row. buffer: scratch of at least twice the size of z.
    indices: of the rows in what the user gave, for messages.

    Raises DataError that names the row of a NaN, +inf, a row of -inf alone, or a label whose
    logit is -inf.
    """
    rows, size = len(z), z.numel()
    if z.dtype == torch.float32 and bool((log_beta.abs() > _REACH).any()):
        return _in_float64(z, labels, log_beta, indices, name)
    top = z.amax(1, keepdim=True)
    beta = log_beta.exp().to(z.dtype)
    u, e = buffer[:size].view_as(z), buffer[size : 2 * size].view_as(z)
    torch.sub(z, top, out=u)
    excess = -u.gather(1, labels[:, None]).squeeze(1)
    u.mul_(beta[:, None] if beta.ndim else beta)
    torch.exp(u, out=e)
    partition = _row_sums(e)
    energy = _row_sums(e.mul_(u))
    if not _all_finite(energy):  # whatever isn't finite is NaN here, by inf - inf or 0 * -inf
        if not _all_finite(top):
            check_logit_rows(z, indices, name)
        if not _all_finite(excess):
            check_label_logits(z.gather(1, labels[:, None]).squeeze(1), labels, indices)
        # A class that is ruled out is no fault, and a difference may be too large.
        if bool((torch.isinf(z - top) & torch.isfinite(z)).any()):
            if z.dtype == torch.float64:
                check_reach(z, indices, name)
            return _in_float64(z, labels, log_beta, indices, name)
        u.clamp_(min=_UNDERFLOW)
        energy = _row_sums(torch.exp(u, out=e).mul_(u))
    square = _row_sums(e.mul_(u))
    mean = energy / partition
    label = excess * beta
    curvature = (square / partition - mean * mean).clamp_(min=0)
    return torch.stack([partition.log() + label, mean + label, curvature, excess]).view(4, rows)


def _in_float64(
    z: Float[Tensor, "rows columns"],
    labels: Integer[Tensor, "rows"],
    log_beta: Float[Tensor, "*rows"],
    indices: Rows,
    name: str,
) -> Float[Tensor, "4 rows"]:
    """`row_moments` of rows whose differences, or whose 1/T, float32 can't hold."""
    wide = z.double()
    return row_moments(wide, labels, log_beta, wide.new_empty(2 * wide.numel()), indices, name)


def tempered_softmax(
    z: Float[Tensor, "rows columns"],
    log_temperature: Float[Tensor, "rows 1"],
    indices: Rows,
    name: str = "X",
) -> Float[Tensor, "rows columns"]:
    """softmax(z_i / T_i), each row as if it were alone.

    Rows whose differences, or whose 1/T, float32 can't hold are worked in float64. Parameters and
    errors as for `row_moments`, the DataError of labels aside.
    """
    u = z - z.amax(1, keepdim=True)
    hard = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    if not _all_finite(u):
        hard = (torch.isinf(u) & torch.isfinite(z)).any(1)
    if z.dtype == torch.float32:
        hard |= (log_temperature.abs() > _REACH).squeeze(1)
    u *= torch.exp(-log_temperature).to(z.dtype)
    p = torch.softmax(u, 1)
    if bool(hard.any()):
        rows = torch.arange(len(z), device=z.device)[hard]
        wide = z[rows].double()
        check_reach(wide, np.asarray(indices)[rows.cpu().numpy()], name)
        v = (wide - wide.amax(1, keepdim=True)) * torch.exp(-log_temperature[rows])
        p[rows] = torch.softmax(v, 1).to(p.dtype)
    return p


def _row_sums(values: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows"]:
    """torch's own sum takes twice the time of a product where rows are short."""
    if values.shape[1] > _SHORT:
        return values.sum(1)
    return torch.mv(values, values.new_ones(values.shape[1]))


def _all_finite(values: Tensor) -> bool:
    """False where a value is NaN or infinite, and, rarely, where only their sum is.

    A sum takes a tenth of the time of isfinite. The callers check exactly where this is False.
    """
    return math.isfinite(float(values.sum()))
