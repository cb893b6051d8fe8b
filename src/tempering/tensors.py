"""Tensors from what users hold: arrays of any strides and byte order, lists, numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from tempering.errors import InputError


@runtime_checkable
class HasArray(Protocol):
    """What numpy can read as an array: arrays, their scalars, columns of data frames."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any: ...


# A nested list of numbers counts as the array that numpy makes of it, in float64.
TensorLike = Tensor | HasArray | Sequence[Any] | float | int


class _Writable:
    """A read-only array described as writable, which torch shares without a warning."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        interface: dict[str, Any] = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def shareable(array: np.ndarray) -> bool:
    """Whether torch can read the memory of an array as it lies."""
    size = array.dtype.itemsize
    return (
        array.dtype.isnative
        and array.dtype.kind in "biuf"
        and size <= 8
        and array.flags.aligned
        and all(step >= 0 and step % size == 0 for step in array.strides)
    )


def from_numpy(array: np.ndarray) -> Tensor:
    """An array of real numbers as a tensor: the same memory where torch can read it, else a copy.

    Reversed views, fields of records, other byte orders and long doubles are copied. Read-only
    arrays are shared, for they are only read here; torch would warn.
    """
    if not shareable(array):
        wide = array.dtype.itemsize > 8 and array.dtype.kind == "f"
        native = np.dtype(np.float64) if wide else array.dtype.newbyteorder("=")
        array = np.array(array, dtype=native, order="C")
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))
    return torch.from_numpy(array)


def refuse_masked(values: Any, name: str, error: type[InputError]) -> None:
    """Raise `error` for a numpy array with masked entries, which all libraries would use."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        place = ", ".join(str(index) for index in np.argwhere(np.ma.getmaskarray(values))[0])
        raise error(
            f"{name}[{place}] is masked, so it is no number; give it a value, or leave rows with "
            "masked values out"
        )


def as_tensor(values: TensorLike, name: str, error: type[InputError]) -> Tensor:
    """A tensor as it is; an array, list or number as a tensor of its numbers.

    Arrays keep their dtype (long doubles become float64); lists of numbers become float64, or
    int64 where all are whole. `error` says what was given where that holds no numbers.
    """
    if isinstance(values, Tensor):
        return values
    refuse_masked(values, name, error)
    try:
        array = np.asarray(values)
    except ValueError:  # numpy raises it for rows of different lengths
        raise error(
            f"{name} must be a tensor, an array or a list of numbers; got a "
            f"{type(values).__name__} whose rows differ in length"
        ) from None
    if array.dtype.kind not in "fiu":
        what = type(values).__name__
        held = "" if array.dtype.kind in "OV" and array.ndim == 0 else f" of {array.dtype}"
        raise error(
            f"{name} must be a tensor, an array or a list of real numbers; got {what}{held}"
        )
    return from_numpy(array)
