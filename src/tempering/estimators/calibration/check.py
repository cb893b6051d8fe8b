"""Checks of rows of logits and of probabilities; messages name the row."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tempering.errors import DataError
from tempering.estimators.calibration.advice import advised
from tempering.estimators.calibration.source import SUM_TOLERANCE

Rows = range | np.ndarray


def check_logit_rows(z: Float[Tensor, "rows columns"], rows: Rows, name: str) -> None:
    """DataError that names the row and column of a NaN or +inf, or a row of -inf alone.

    -inf is legal: the class is ruled out. rows: the index of each row in the whole table.
    """
    bad = torch.isnan(z) | torch.isposinf(z)
    if bad.any():
        row, column = (int(i) for i in bad.nonzero()[0])
        value = "NaN" if torch.isnan(z[row, column]) else "inf"
        raise DataError(
            f"{name} contains {value} at row {rows[row]}, column {column}; logits are finite, "
            "or -inf where a class is ruled out: mend or drop that row"
        )
    empty = torch.isneginf(z).all(1)
    if empty.any():
        row = int(empty.nonzero()[0])
        raise DataError(
            f"{name} contains -inf in every column of row {rows[row]} (inf with a minus); at "
            "least one class must have a finite logit: mend or drop that row"
        )


def check_reach(z: Float[Tensor, "rows columns"], rows: Rows, name: str) -> None:
    """DataError that names a row of float64 whose finite logits lie further apart than 1.8e308."""
    low = z.masked_fill(torch.isneginf(z), math.inf).amin(1)
    beyond = torch.isinf(z.amax(1) - low) & torch.isfinite(low)
    if beyond.any():
        row = int(beyond.nonzero()[0])
        raise DataError(
            f"row {rows[row]} of {name} runs from {float(low[row]):.3g} to "
            f"{float(z[row].max()):.3g}, further apart than float64 can hold; divide all logits by "
            "a large number, by which T shrinks too"
        )


def check_label_logits(label_logits: Float[Tensor, "rows"], labels: Tensor, rows: Rows) -> None:
    """DataError where a label's own logit is -inf: its loss is infinite at every temperature."""
    ruled_out = torch.isneginf(label_logits)
    if ruled_out.any():
        row = int(ruled_out.nonzero()[0])
        raise DataError(
            f"row {rows[row]} rules out its own label: the logit of column {int(labels[row])} is "
            "-inf (probability 0), so its loss is infinite at every temperature; mend the label, "
            "or give that class a probability above 0"
        )


def log_probabilities(
    p: Float[Tensor, "rows columns"], rows: Rows, name: str
) -> Float[Tensor, "rows columns"]:
    """log p of rows that are distributions; DataError names the first row that is not one."""
    sums = p.sum(1)
    wrong = ~((sums - 1).abs() <= SUM_TOLERANCE) | (p.amin(1) < 0)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        if not torch.isfinite(p[row]).all():
            raise DataError(
                f"{name} contains NaN or inf at row {rows[row]}; probabilities are numbers from "
                "0 to 1: mend or drop that row"
            )
        raise DataError(
            f"row {rows[row]} of {name} is not a distribution (its entries run from "
            f"{float(p[row].min()):.6g} to {float(p[row].max()):.6g} and sum to "
            f"{float(sums[row]):.6g}), but {advised().given_probabilities}; for logits "
            f"{advised().for_logits}"
        )
    return p.log()
