"""What logits, labels, weights and groups must be; messages name the row."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tempering.errors import DataError, TemperingWarning

# A row of probabilities sums to 1 within this: rounding in half precision, or in printing to
# three digits, stays inside it.
_SUM_TOLERANCE = 1e-2

Rows = range | np.ndarray


def check_rows(z: Float[Tensor, "rows columns"], rows: Rows, name: str) -> None:
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
    """log p of rows that are distributions; DataError names the first row that is none."""
    sums = p.sum(1)
    wrong = ~((sums - 1).abs() <= _SUM_TOLERANCE) | (p.amin(1) < 0)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        if not torch.isfinite(p[row]).all():
            raise DataError(
                f"{name} contains NaN or inf at row {rows[row]}; probabilities are numbers from "
                "0 to 1: mend or drop that row"
            )
        raise DataError(
            f"row {rows[row]} of {name} is no distribution (its entries run from "
            f"{float(p[row].min()):.6g} to {float(p[row].max()):.6g} and sum to "
            f"{float(sums[row]):.6g}), but inputs='probabilities'; for logits say inputs='logits'"
        )
    return p.log()


def are_probabilities(z: Float[Tensor, "rows columns"]) -> bool:
    """Whether every row is nonnegative and sums to 1, as logits all but never do."""
    return bool((z.amin(1) >= 0).all() and ((z.sum(1) - 1).abs() <= _SUM_TOLERANCE).all())


def refuse_probabilities(name: str) -> DataError:
    """The error for probabilities given as logits."""
    return DataError(
        f"every row of {name} is nonnegative and sums to 1: these are probabilities, not logits, "
        "and a softmax over them would be wrong; say inputs='probabilities'"
    )


def encode_labels(y: Any, n_rows: int, n_columns: int, classes: Any) -> tuple[np.ndarray, Any]:
    """Column indices of the labels, and the label of each column.

    classes: labels of the columns in order; None reads labels as column indices 0..K-1. Integers
    that run 1..K, all of them present, are read as k-1 under a warning.

    Raises DataError when a label is missing, out of range or of the wrong dtype.
    """
    labels = vector(y, "y", n_rows)
    if classes is not None:
        return _encode_classes(labels, n_columns, classes)
    if labels.dtype.kind == "O":
        labels = _plain(labels)
    if labels.dtype.kind == "b" and n_columns == 2:
        labels = labels.astype(np.int64)
    if labels.dtype.kind == "f":
        labels = _whole_numbers(labels)
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"Unknown label type: y has dtype {labels.dtype}; expected column indices 0.."
            f"{n_columns - 1}, or say classes=[...], the labels of the columns in order"
        )
    low, high = int(labels.min()), int(labels.max())
    if low == 1 and high == n_columns and len(np.unique(labels)) == n_columns:
        names = np.arange(1, n_columns + 1)
        warnings.warn(
            f"labels run 1..{n_columns} while columns run 0..{n_columns - 1}: label k was read as "
            f"column k-1; say classes=[1, ..., {n_columns}] if that is meant",
            TemperingWarning,
            stacklevel=4,
        )
        return _compact(labels.astype(np.int64) - 1), names
    if low < 0 or high >= n_columns:
        row = int(np.flatnonzero((labels < 0) | (labels >= n_columns))[0])
        raise DataError(
            f"y[{row}] = {labels[row]} is out of range: X has {n_columns} columns, so labels are "
            f"0..{n_columns - 1}; mend it, or say classes=[...], the labels of the columns in order"
        )
    return _compact(labels), np.arange(n_columns)


def _compact(labels: np.ndarray) -> np.ndarray:
    """Integers of a dtype that torch computes with, copied only where they must be."""
    fine = labels.dtype.isnative and labels.dtype.name in ("int8", "int16", "int32", "int64")
    return labels if fine else labels.astype(np.int64)


def _encode_classes(labels: np.ndarray, n_columns: int, classes: Any) -> tuple[np.ndarray, Any]:
    names = np.asarray(classes)
    if names.shape != (n_columns,) or len(np.unique(names)) != n_columns:
        raise DataError(
            f"classes: expected {n_columns} different labels, one a column of X; got {names.size} "
            f"of which {len(np.unique(names))} differ"
        )
    order = np.argsort(names)
    try:
        place = np.searchsorted(names[order], labels).clip(max=n_columns - 1)
    except TypeError as error:
        raise DataError(
            f"y has dtype {labels.dtype}, classes have {names.dtype}; give both in one type"
        ) from error
    codes = order[place]
    wrong = names[codes] != labels
    if np.any(wrong):
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"y[{row}] = {labels[row]} is not among classes; mend it or name it there")
    return codes, names


def _plain(labels: np.ndarray) -> np.ndarray:
    """Objects as numbers where they are numbers."""
    found = np.array(labels.tolist())
    return found if found.ndim == 1 else labels


def _whole_numbers(labels: np.ndarray) -> np.ndarray:
    wrong = ~(np.isfinite(labels) & (labels == np.rint(labels)))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"Unknown label type: y[{row}] = {labels[row]} is no whole number; labels are column "
            "indices, not probabilities or scores"
        )
    return labels.astype(np.int64)


def check_weights(sample_weight: Any, n_rows: int) -> Float[np.ndarray, "rows"] | None:
    """Nonnegative finite weights with a positive sum, or None; DataError names the row."""
    if sample_weight is None:
        return None
    weights = vector(sample_weight, "sample_weight", n_rows)
    if weights.dtype.kind not in "fiub":
        raise DataError(f"sample_weight has dtype {weights.dtype}; expected numbers, 0 or more")
    if weights.dtype not in (np.float32, np.float64):
        weights = weights.astype(np.float64)
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"sample_weight[{row}] = {weights[row]}; expected a finite number, 0 or more"
        )
    if not weights.any():
        raise DataError("sample weights sum to zero; at least one must be above 0")
    return weights


def vector(values: Any, name: str, n_rows: int) -> np.ndarray:
    """Values as a one-dimensional array of n_rows, on the CPU."""
    if values is None:
        raise DataError(f"requires {name} to be passed, but the target {name} is None")
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind == "c":
        raise DataError(f"Complex data not supported: {name} has dtype {array.dtype}")
    if array.ndim != 1:
        raise DataError(
            f"{name} has shape {array.shape}; expected one value a row, ({n_rows},)"
            + ("; turn one-hot rows into indices with argmax(1)" if array.ndim == 2 else "")
        )
    if len(array) != n_rows:
        raise DataError(f"{name} has {len(array)} values for {n_rows} rows of X")
    return array
