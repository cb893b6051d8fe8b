"""A request's own settings of sampling, checked: temperature, top_p, top_k, min_p.

The names and ranges are those of vLLM and transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from tempering.calls import number_text
from tempering.errors import InputError

SETTINGS = ("temperature", "top_p", "top_k", "min_p")
TRUNCATIONS = ("top_p", "top_k", "min_p")


@dataclass(frozen=True)
class RequestSettings:
    """What a request says beside its policy; each default asks for nothing.

    Parameters
    ----------
    temperature: 0..inf. top_p: above 0, up to 1. top_k: 1 or more; 0 and -1 are off.
    min_p: 0..1.
    """

    temperature: float | int = 1.0
    top_p: float | int = 1.0
    top_k: int = 0
    min_p: float | int = 0.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = checked_setting(each.name, getattr(self, each.name))
            object.__setattr__(self, each.name, value)

    def active(self) -> dict[str, float | int]:
        """The settings that ask for something, by name."""
        neutral = RequestSettings.__dataclass_fields__
        values = {name: getattr(self, name) for name in SETTINGS}
        return {name: value for name, value in values.items() if value != neutral[name].default}


def checked_setting(name: str, value: object, where: str = "") -> Any:
    """A setting as a number in its range.

    where: what stands before the name in a message, such as "post_thinking.".

    Raises InputError: another type, or out of range; names the setting.
    """
    if name.startswith("temperature"):
        return 0.0 + checked_number(name, value, math.inf, where)
    number = checked_number(name, value, math.inf, where, least=-1.0)
    if name.startswith("top_k"):
        if not number.is_integer():
            raise InputError(
                f"{where}{name} is a whole number, 1 or more (0 or -1: off), got {shown(value)}"
            )
        return max(0, int(number))
    if name.startswith("top_p"):
        if not 0 < number <= 1:
            raise InputError(f"{where}{name} lies in (0, 1], got {shown(value)}")
        return number
    if not 0 <= number <= 1:
        raise InputError(f"{where}{name} lies in [0, 1], got {shown(value)}")
    return 0.0 + number


def checked_number(
    name: str, value: object, most: float, where: str = "", least: float = 0.0
) -> float:
    """A number of a request. JSON's true is no number, and neither is a text of digits."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{where}{name} is a number, got {shown(value)}")
    try:
        result = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        raise InputError(
            f"{where}{name} is beyond the numbers that float64 holds (the limit is written inf)"
        ) from None
    if not least <= result <= most:
        raise InputError(
            f"{where}{name} is a number from {number_text(least)} to {number_text(most)}, "
            f"got {shown(value)}"
        )
    return result


def settings_of(values: Mapping[str, Any]) -> RequestSettings:
    """The settings among a request's values, checked; what is absent or None asks for nothing."""
    given = {name: values[name] for name in SETTINGS if values.get(name) is not None}
    return RequestSettings(**{name: checked_setting(name, value) for name, value in given.items()})


def shown(value: object) -> str:
    """A value of a request for a message, of bounded length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # whole numbers of thousands of digits; deep nesting
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:60] + "..."
