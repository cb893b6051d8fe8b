"""Policies from the names that users of vLLM, llama.cpp and s1 know."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from tempering.errors import InputError
from tempering.tokens.grammar import parse_policy
from tempering.tokens.phases import Phases, Span
from tempering.tokens.policy import ConstantPolicy, Policy
from tempering.tokens.sampler import OrderPolicy, SamplerPolicy, check_given
from tempering.tokens.settings import (
    SETTINGS,
    TRUNCATIONS,
    RequestSettings,
    checked_number,
    checked_setting,
    shown,
)
from tempering.tokens.targeted import DynaTempPolicy
from tempering.tokens.token_state import NOTHING_GIVEN
from tempering.tokens.truncation import ORDER

THINKING = tuple(f"{name}_thinking" for name in SETTINGS)
# The arguments that ask for a policy, beside the settings that every request has.
POLICY_KEYS = ("tempering", *THINKING, "post_thinking", "dynatemp_range", "dynatemp_exponent")
_KEYS = ("tempering", *SETTINGS, *POLICY_KEYS[1:])


class Asked(NamedTuple):
    """The policy of a request, and the settings that it takes over from the request.

    A policy that doesn't truncate takes over the temperature alone; the engine truncates as ever.
    """

    policy: Policy
    given: RequestSettings

    def truncating(self, own: RequestSettings) -> Asked:
        """The same law, with the request's own truncation carried out by the policy."""
        if self.policy.truncates or own.active().keys() <= {"temperature"}:
            return self
        return Asked(OrderPolicy(self.policy, ORDER), own)


def asked_of(
    request: Mapping[str, Any],
    own: RequestSettings,
    tokenizer: Any = None,
    where: str = "the request",
) -> Asked:
    """What a request to an engine asks for.

    Parameters
    ----------
    request: its `POLICY_KEYS`; without any, its own T is the policy. own: its own settings.
    where: whose own settings these are, for messages.

    Returns
    -------
    Where `policy.truncates`, the engine neither divides by the temperature nor truncates itself:
    it gives `given` to the policy's states. Otherwise it truncates by the request's settings.

    Raises InputError: what `policy_from_request` refuses; settings given by policy and request.
    """
    if not request:
        return Asked(ConstantPolicy(own.temperature), own)
    if "tempering" in request:
        policy = policy_from_request(request, tokenizer)
        check_given(policy, own, where)
        return Asked(policy, own)
    by_phase = any(name in request for name in THINKING[1:]) or _truncates(request)
    values = own.active() if by_phase else {}
    policy = policy_from_request({**request, **values, "temperature": own.temperature}, tokenizer)
    return Asked(policy, NOTHING_GIVEN)


def _truncates(request: Mapping[str, Any]) -> bool:
    after = request.get("post_thinking")
    if isinstance(after, str):
        after = _read(after)
    return isinstance(after, Mapping) and any(name in after for name in TRUNCATIONS)


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

    `top_p`, `top_k` and `min_p` may stand beside `temperature` everywhere, `top_p_thinking` and
    its kin beside `temperature_thinking`, and all of them in `post_thinking`. Each temperature is
    then a `sampler`; in a phase that doesn't name a setting, the request's own holds.

    Parameters
    ----------
    request: a mapping with only the keys above; a temperature that is left out is 1, an exponent 1.
    tokenizer: of transformers' interface; phases need it.

    Raises
    ------
    InputError: an unknown key, a value of another type or range, or keys that can't be combined;
    names the key.

    Departure: text before the thinking, or in a reply without thinking, is the answer; in the
    proposal for vLLM the first temperature holds until the first thinking has ended.
    """
    if not isinstance(request, Mapping):
        raise InputError(f"a request is a mapping of {', '.join(_KEYS)}; got {shown(request)}")
    for key in request:
        if key not in _KEYS:
            raise InputError(f"unknown key {key!r}; a request has {', '.join(_KEYS)}")
    if not request:
        raise InputError(f"the request is empty; give one or more of {', '.join(_KEYS)}")
    _check_combined(request)
    if "tempering" in request:
        text = request["tempering"]
        if not isinstance(text, str):
            raise InputError(f"tempering is the text of a policy, got {shown(text)}")
        return parse_policy(text, tokenizer)
    own = {"temperature": 1.0} | _settings(request)
    if any(name in request for name in THINKING):
        thinking = {
            name: checked_setting(key, request[key])
            for name, key in zip(SETTINGS, THINKING, strict=True)
            if key in request
        }
        return _thinking(own | thinking, own | _off(thinking, own), tokenizer)
    if "post_thinking" in request:
        after = _post_thinking(request["post_thinking"])
        return _thinking(own | _off(after, own), own | after, tokenizer)
    if "dynatemp_exponent" in request and "dynatemp_range" not in request:
        raise InputError("dynatemp_exponent does nothing without dynatemp_range; give both")
    if "dynatemp_range" in request:
        return _sampler(_dynatemp(request, float(own["temperature"])), own)
    return _sampler(ConstantPolicy(own["temperature"]), own)


def _check_combined(request: Mapping[Any, Any]) -> None:
    """Refuse keys of two forms."""
    for form in ("tempering", *THINKING, "post_thinking"):
        if form in request:
            allowed = {form, *SETTINGS}
            if form == "tempering":
                allowed = {form}
            elif form in THINKING:
                allowed |= set(THINKING)
            if others := sorted(request.keys() - allowed):
                raise InputError(f"{form} can't be combined with {', '.join(others)}; give one")


def _settings(values: Mapping[Any, Any], where: str = "") -> dict[str, float | int]:
    """The settings among the values, checked."""
    return {name: checked_setting(name, values[name], where) for name in SETTINGS if name in values}


def _post_thinking(given: Any) -> dict[str, float | int]:
    values = _read(given) if isinstance(given, str) else given
    if not isinstance(values, Mapping):
        raise InputError(
            f"post_thinking is a mapping such as {{'temperature': 0.2}}, got {shown(values)}"
        )
    if others := sorted(str(key) for key in values if key not in SETTINGS):
        raise InputError(
            f"post_thinking.{others[0]:.40} can't be changed by phase; it has {', '.join(SETTINGS)}"
        )
    return _settings(values, "post_thinking.")


def _off(one: Mapping[str, float | int], own: Mapping[str, float | int]) -> dict[str, float | int]:
    """What the other phase has of the settings that one phase states and the request doesn't."""
    neutral = vars(NOTHING_GIVEN)
    return {name: neutral[name] for name in one if name not in own}


def _thinking(
    thinking: Mapping[str, float | int], answer: Mapping[str, float | int], tokenizer: Any
) -> Policy:
    spans = tuple(
        (name, Span(_sampler(ConstantPolicy(values["temperature"]), values)))
        for name, values in (("thinking", thinking), ("answer", answer))
    )
    return Phases(spans, tokenizer)


def _sampler(temperature: Policy, values: Mapping[str, float | int]) -> Policy:
    """A temperature with the truncation among these values, if there is any."""
    cuts = {name: values[name] for name in TRUNCATIONS if name in values}
    return SamplerPolicy(temperature, **cuts) if cuts else temperature  # type: ignore[arg-type]


def _dynatemp(request: Mapping[Any, Any], temperature: float) -> Policy:
    width = checked_number("dynatemp_range", request["dynatemp_range"], 1e6)
    exponent = checked_number("dynatemp_exponent", request.get("dynatemp_exponent", 1.0), 1e6)
    if temperature == math.inf:
        raise InputError("temperature inf has no range around it; give a finite temperature")
    return DynaTempPolicy(width, exponent, temperature)


def _read(text: str) -> Any:
    """The value of a JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"post_thinking is JSON such as '{{\"temperature\": 0.2}}', got {shown(text)}"
        ) from error
