"""Arrays that torch can read in place."""

from __future__ import annotations

from typing import Any

import numpy as np


class _Writable:
    """The memory of a read-only array under an interface that says writable."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        interface: dict[str, Any] = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


def writable(array: np.ndarray) -> np.ndarray:
    """The array as torch takes it: the same memory unless its strides or byte order forbid that.

    Torch warns about read-only arrays, which we only read, so the memory is called writable.
    """
    if any(step < 0 for step in array.strides):
        array = array.copy()  # np.ascontiguousarray leaves the stride of a single row as it is
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array if array.flags.writeable else np.asarray(_Writable(array))
