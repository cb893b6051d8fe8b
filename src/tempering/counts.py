"""Counts and seeds, which are whole numbers of any library."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from tempering.errors import InputError


def whole_number(
    value: Any, name: str, least: int | None = None, error: type[InputError] = InputError
) -> int:
    """A count or a seed as an int; `error` for what is less than `least`, a fraction or a flag.

    numpy's integers are whole numbers. True and 5.0 are not: a flag or a float where a count is
    expected means that two arguments were swapped.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or (least is not None and int(value) < least):
        more = "" if least is None else f", {least} or more"
        raise error(f"{name} = {value!r}; expected a whole number{more}")
    return int(value)
