"""Labels, weights and groups: one value a row, none missing; messages name the row."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from sklearn.exceptions import DataConversionWarning
from torch import Tensor

from tempering.errors import DataError, TemperingWarning
from tempering.estimators.calibration.advice import advised
from tempering.tensors import from_numpy, refuse_masked

# The greatest ratio of two weights whose squares still fit into one float64 sum. Beyond it the
# small weights would count as 0.
_WIDEST = 1e150
# Outside these, sums of weights or of weighted losses could leave float64.
_SMALLEST, _LARGEST = 1e-100, 1e100
_SHOWN = 5


def encode_labels(
    y: Any,
    n_rows: int,
    n_columns: int,
    classes: Any,
    column_names: Any = None,
    *,
    in_order: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Column indices of the labels, and the label of each column.

    classes: labels of the columns in order; None reads labels as column indices 0..K-1. Labels
    that are not column indices are looked up in `column_names` if that has all of them. Otherwise,
    if there are K different ones, they are assigned to the columns in sorted order, as scikit-learn
    does, under a warning; with `in_order` False this holds for 1..K only.

    Raises DataError when a label is missing, out of range or of the wrong dtype.
    """
    labels = vector(y, "y", n_rows)
    if getattr(y, "ndim", 1) == 2:
        text = "A column-vector y was passed when a 1d array was expected; it was read as one"
        warnings.warn(text, DataConversionWarning, stacklevel=4)
    if classes is not None:
        return _encode_classes(labels, n_columns, classes)
    if labels.dtype.kind == "b" and n_columns == 2:
        labels = labels.astype(np.int64)
    if labels.dtype.kind == "f":
        labels = _whole_numbers(labels)
    if labels.dtype.kind in "iu" and int(labels.min()) >= 0 and int(labels.max()) < n_columns:
        return _compact(labels), np.arange(n_columns)
    if labels.dtype.kind not in "iuUS":
        raise DataError(
            f"Unknown label type: y has dtype {labels.dtype}; expected column indices 0.."
            f"{n_columns - 1}, or {advised().classes}"
        )
    found = np.unique(labels)
    names = None if column_names is None else np.asarray(column_names)
    if names is not None and labels.dtype.kind == "U" and np.isin(found, names).all():
        return _encode_classes(labels, n_columns, names)
    from_one = labels.dtype.kind in "iu" and found[0] == 1 and found[-1] == n_columns
    if len(found) != n_columns or not (in_order or from_one):
        raise _no_column(labels, found, n_columns)
    if from_one:
        text = (
            f"labels run 1..{n_columns} while columns run 0..{n_columns - 1}: label k was read as "
            f"column k-1; {advised().classes} if that is not meant"
        )
    else:
        text = (
            f"the labels {listing(found)} are not column indices: they were read in this order, as "
            f"scikit-learn orders the columns of a classifier; {advised().classes} if theirs is "
            "another"
        )
    warnings.warn(text, TemperingWarning, stacklevel=4)
    return np.searchsorted(found, labels), found


def _no_column(labels: np.ndarray, found: np.ndarray, n_columns: int) -> DataError:
    if labels.dtype.kind in "US":
        return DataError(
            f"Unknown label type: y has dtype {labels.dtype} and {len(found)} labels for "
            f"{n_columns} columns; expected column indices 0..{n_columns - 1}, or "
            f"{advised().classes}"
        )
    row = int(np.flatnonzero((labels < 0) | (labels >= n_columns))[0])
    return DataError(
        f"y[{row}] = {labels[row]} is out of range: X has {n_columns} columns, so labels are "
        f"0..{n_columns - 1}; mend it, or {advised().classes}"
    )


def _compact(labels: np.ndarray) -> np.ndarray:
    """Integers of a dtype that torch computes with, copied only where they must be."""
    fine = labels.dtype.isnative and labels.dtype.name in ("int8", "int16", "int32", "int64")
    return labels if fine else labels.astype(np.int64)


def _encode_classes(
    labels: np.ndarray, n_columns: int, classes: Any
) -> tuple[np.ndarray, np.ndarray]:
    names = as_array(classes)
    different = len(set(names.ravel().tolist()))
    if names.shape != (n_columns,) or different != n_columns:
        raise DataError(
            f"classes: expected {n_columns} different labels, one a column of X; got {names.size} "
            f"of which {different} differ"
        )
    codes = positions(labels, names, "y", "classes")
    if np.any(codes < 0):
        row = int(np.flatnonzero(codes < 0)[0])
        raise DataError(f"y[{row}] = {labels[row]} is not among classes; mend it or name it there")
    return codes, names


def positions(
    values: np.ndarray, names: np.ndarray, value_name: str, names_name: str
) -> Integer[np.ndarray, "rows"]:
    """The index of each value among names that differ; -1 where it is none of them."""
    if (values.dtype.kind in "US") != (names.dtype.kind in "US") and "O" not in (
        values.dtype.kind,
        names.dtype.kind,
    ):
        raise DataError(
            f"{value_name} has dtype {values.dtype}, {names_name} have {names.dtype}; give both "
            "in one type"
        )
    try:
        order = np.argsort(names)
        place = np.searchsorted(names[order], values).clip(max=len(names) - 1)
        codes = order[place]
        return np.where(names[codes] == values, codes, -1)
    except TypeError as error:
        raise DataError(
            f"{value_name} has dtype {values.dtype}, {names_name} have {names.dtype}; give both "
            "in one type"
        ) from error


def _whole_numbers(labels: np.ndarray) -> np.ndarray:
    wrong = ~(np.isfinite(labels) & (labels == np.rint(labels)))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"Unknown label type: y[{row}] = {labels[row]} is not a whole number; labels are "
            "column indices, not probabilities or scores"
        )
    return labels.astype(np.int64)


def check_weights(
    sample_weight: Any, n_rows: int
) -> tuple[Float[np.ndarray, "rows"] | None, float]:
    """Weights and their unit: the given weights are these times the unit, a power of 4.

    The unit is 1 unless sums of the weights could leave float64. DataError names the row of a
    weight that is negative or not finite, and says so where all are 0, or where the smallest
    would vanish beside the greatest.
    """
    if sample_weight is None:
        return None, 1.0
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
    positive = weights > 0
    if not positive.any():
        raise DataError("sample weights sum to zero; at least one must be above 0")
    most = float(weights.max())
    least = float(weights.min(where=positive, initial=most))
    if least < most / _WIDEST:
        row = int(np.flatnonzero(weights == least)[0])
        raise DataError(
            f"sample_weight[{row}] = {least:g} would vanish beside the greatest, {most:g}: their "
            f"ratio exceeds {_WIDEST:g}; give 0 for rows that are not to count"
        )
    if least >= _SMALLEST and most <= _LARGEST:
        return weights, 1.0
    unit = math.ldexp(1.0, 2 * math.floor(math.log2(most) / 2))
    return weights.astype(np.float64) / unit, unit


def groups_of(
    values: Any, name: str, n_rows: int
) -> tuple[np.ndarray, Integer[np.ndarray, "rows"]]:
    """The different values, sorted, and the index of each row's; DataError names a missing one."""
    array = named_rows(values, name, n_rows)
    try:
        return np.unique(array, return_inverse=True)
    except TypeError:
        kinds = sorted({type(value).__name__ for value in array})
        raise DataError(
            f"{name} mixes values that can't be compared ({', '.join(kinds)}); give all in one type"
        ) from None


def named_rows(values: Any, name: str, n_rows: int) -> np.ndarray:
    """`vector`, none of whose values is missing."""
    array = vector(values, name, n_rows)
    if array.dtype.kind in "fmM":
        missing = np.isnan(array) if array.dtype.kind == "f" else np.isnat(array)
        if missing.any():
            raise _missing(name, int(np.flatnonzero(missing)[0]), array)
    return array


def vector(values: Any, name: str, n_rows: int) -> np.ndarray:
    """Values as a one-dimensional array of n_rows, on the CPU; DataError names a missing one.

    NaN among floating numbers is left to the caller, whose message says what is expected.
    """
    if values is None:
        raise DataError(f"requires {name} to be passed, but the target {name} is None")
    array = as_array(values, name)
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
    if array.dtype.kind == "O":
        for row, value in enumerate(array):
            if _is_missing(value):
                raise _missing(name, row, array)
    return array


def as_array(values: Any, name: str = "classes") -> np.ndarray:
    """Values as an array: numbers or texts where all are, objects where they differ in kind."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    refuse_masked(values, name, DataError)
    try:
        array = np.asarray(values)
    except ValueError:
        raise DataError(f"{name} has rows of different lengths; expected one value a row") from None
    if array.dtype.kind in "US" and isinstance(values, list | tuple):
        # Where texts and numbers are mixed, numpy would turn the numbers and NaN into texts.
        kinds = np.empty(array.shape, dtype=object)
        kinds[...] = values
        array = kinds
    elif array.dtype.kind == "T":
        array = array.astype(object)
    if array.dtype.kind != "O" or array.ndim == 0:
        return array
    flat = array.ravel()
    for kind in (str, Number):
        if len(flat) and all(isinstance(value, kind) for value in flat):
            found = np.array(flat.tolist())
            return found.reshape(array.shape) if found.dtype.kind != "O" else array
    return array


def _is_missing(value: Any) -> bool:
    """None, NaN, NaT and pandas' NA, none of which equals itself."""
    try:
        return value is None or value is not value or bool(value != value)
    except (TypeError, ValueError):  # the truth of pandas' NA, or of an array, is ambiguous
        return not isinstance(value, Sequence | np.ndarray)


def _missing(name: str, row: int, array: np.ndarray) -> DataError:
    return DataError(
        f"{name}[{row}] is missing ({array[row]}); give each row its value, such as a name for "
        "the rows without one, or leave those rows out"
    )


def row_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """One value a row as a tensor on a device, sharing memory where it can."""
    return from_numpy(array).to(device)


def listing(names: Sequence[object] | np.ndarray) -> str:
    """The first few names and how many more there are."""
    text = ", ".join(str(name) for name in names[:_SHOWN])
    return text + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
