"""Policies from the names that users of vLLM, llama.cpp and s1 know."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from tempering.calls import number
from tempering.errors import InputError
from tempering.tokens.grammar import parse_policy
from tempering.tokens.phases import Phases, Span
from tempering.tokens.policy import Constant, Policy
from tempering.tokens.targeted import DynaTemp

_KEYS = (
    "tempering",
    "temperature",
    "temperature_thinking",
    "post_thinking",
    "dynatemp_range",
    "dynatemp_exponent",
)


def policy_from_request(request: object, tokenizer: Any = None) -> Policy:
    """The policy that a request asks for, checked strictly.

    | keys | policy |
    |---|---|
    | `tempering: text` | `parse_policy(text)`; alone |
    | `temperature: T` | `constant(T)` |
    | `temperature: T, temperature_thinking: H` (s1) | `phases(thinking=H, answer=T)` |
    | `temperature: T, post_thinking: {"temperature": A}` (vLLM; or as JSON text) | \
`phases(thinking=T, answer=A)` |
    | `temperature: T, dynatemp_range: R, dynatemp_exponent: E` (llama.cpp) | `dynatemp(R, E, T)` |

    Parameters
    ----------
    request: a mapping with only the keys above; a temperature that is left out is 1, an exponent 1.
    tokenizer: of transformers' interface; phases need it.

    Raises
    ------
    InputError: an unknown key, a value of another type or range, or keys that don't go together;
    names the key.

    Departure: text before and without thinking is the answer; the proposal for vLLM keeps the
    first temperature until the first thinking has ended.
    """
    if not isinstance(request, Mapping):
        raise InputError(f"a request is a mapping of {', '.join(_KEYS)}; got {_shown(request)}")
    for key in request:
        if key not in _KEYS:
            raise InputError(f"unknown key {key!r}; a request has {', '.join(_KEYS)}")
    if not request:
        raise InputError(f"the request is empty; give one or more of {', '.join(_KEYS)}")
    for form in ("tempering", "temperature_thinking", "post_thinking"):
        if form in request:
            allowed = {form} if form == "tempering" else {form, "temperature"}
            if others := sorted(request.keys() - allowed):
                raise InputError(f"{form} and {', '.join(others)} don't go together; give one")
    if "tempering" in request:
        text = request["tempering"]
        if not isinstance(text, str):
            raise InputError(f"tempering is the text of a policy, got {_shown(text)}")
        return parse_policy(text, tokenizer)
    temperature = _number(request, "temperature", 1.0, most=math.inf)
    if "temperature_thinking" in request:
        thinking = _number(request, "temperature_thinking", 1.0, most=math.inf)
        return _thinking(thinking, temperature, tokenizer)
    if "post_thinking" in request:
        inner = request["post_thinking"]
        if isinstance(inner, str):
            inner = _read(inner)
        if not isinstance(inner, Mapping):
            raise InputError(
                f"post_thinking is a mapping such as {{'temperature': 0.2}}, got {_shown(inner)}"
            )
        if others := sorted(str(key) for key in inner if key != "temperature"):
            raise InputError(
                f"post_thinking.{others[0]} can't be changed by phase: a policy sets the "
                "temperature alone; give it for the whole request"
            )
        after = _number(inner, "temperature", temperature, most=math.inf, where="post_thinking.")
        return _thinking(temperature, after, tokenizer)
    if "dynatemp_exponent" in request and "dynatemp_range" not in request:
        raise InputError("dynatemp_exponent does nothing without dynatemp_range; give both")
    if "dynatemp_range" in request:
        width = _number(request, "dynatemp_range", 0.0)
        exponent = _number(request, "dynatemp_exponent", 1.0)
        if temperature == math.inf:
            raise InputError("temperature inf has no range around it; give a finite temperature")
        return DynaTemp(width, exponent, temperature)
    return Constant(temperature)


def _thinking(thinking: float, answer: float, tokenizer: Any) -> Policy:
    spans = (("thinking", Span(Constant(thinking))), ("answer", Span(Constant(answer))))
    return Phases(spans, tokenizer)


def _number(
    request: Mapping[Any, Any], key: str, default: float, most: float = 1e6, where: str = ""
) -> float:
    """A number >= 0 of a request; JSON's true is none, and a text that reads as one is none."""
    value = request.get(key, default)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{where}{key} is a number, got {_shown(value)}")
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        raise InputError(
            f"{where}{key} is beyond the numbers that float64 holds (the limit is written inf)"
        ) from None
    if not 0 <= found <= most:
        raise InputError(f"{where}{key} is a number from 0 to {number(most)}, got {_shown(value)}")
    return found


def _read(text: str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"post_thinking is JSON such as '{{\"temperature\": 0.2}}', got {_shown(text)}"
        ) from error


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # whole numbers of thousands of digits; deep nesting
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:60] + "..."
