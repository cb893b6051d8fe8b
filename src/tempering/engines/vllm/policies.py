"""The policy that a request to vLLM asks for through `extra_args` (`vllm_xargs` over HTTP)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tempering.engines.vllm import templates
from tempering.errors import InputError
from tempering.tokens.policy import Policy
from tempering.tokens.request import policy_from_request

SAMPLE, PROFILE = "tempering_sample", "tempering_profile"
_POLICY = (
    "tempering",
    "temperature_thinking",
    "post_thinking",
    "dynatemp_range",
    "dynatemp_exponent",
)
KEYS = (*_POLICY, SAMPLE, PROFILE)


def extra_of(params: Any) -> Mapping[str, Any]:
    """The request's extra arguments that are tempering's own."""
    extra = getattr(params, "extra_args", None)
    if not extra:
        return {}
    own = {key: value for key, value in extra.items() if key in KEYS}
    for key in extra:
        if str(key).startswith("tempering") and key not in KEYS:
            raise InputError(f"there is no argument {key!r}; tempering takes {', '.join(KEYS)}")
    return own


def asks_policy(params: Any) -> bool:
    """Whether the request asks for a policy."""
    extra = getattr(params, "extra_args", None) or {}
    return any(key in extra for key in _POLICY)


def policy_of(params: Any, tokenizer: Any) -> Policy | None:
    """The policy of a request; None when it asks for none.

    `tempering` is a policy's text. The names that users of other engines know
    (`policy_from_request`) take the request's own temperature as theirs; `post_thinking` may be
    JSON text, because `vllm_xargs` holds no mappings.

    Raises
    ------
    InputError: a policy that doesn't parse, two temperatures, or temperature 0.
    """
    request = {key: value for key, value in extra_of(params).items() if key in _POLICY}
    if not request:
        return None
    tokenizer = templates.tokenizer_of(params, tokenizer)
    temperature = float(params.temperature)
    if temperature == 0:
        raise InputError(
            "temperature=0 makes vLLM take the likeliest token and forget top_p and top_k, "
            "whatever a policy says; send temperature=1, with T = 0 in the policy where it is "
            'meant: "tempering": "phases(thinking=1, answer=0)"'
        )
    if "tempering" in request:
        if temperature != 1:
            raise InputError(
                f"two temperatures: the policy {request['tempering']!r:.60}, and "
                f"temperature={temperature:g} of the request or of the model's generation_config; "
                "send temperature=1"
            )
        return _made(request, tokenizer)
    after = request.get("post_thinking")
    if isinstance(after, str):
        try:
            request["post_thinking"] = json.loads(after)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(
                f"post_thinking is JSON such as '{{\"temperature\": 0.2}}', got {after!r:.60}"
            ) from error
    return _made({**request, "temperature": temperature}, tokenizer)


def _made(request: Mapping[str, Any], tokenizer: Any) -> Policy:
    """The policy of these arguments; one object for all requests that ask for the same."""
    try:
        text = json.dumps(request, sort_keys=True)
    except (TypeError, ValueError):  # what isn't JSON is refused by name
        return policy_from_request(request, tokenizer)
    return _kept(text, tokenizer)


# Reading a tokenizer's chat template for the phases takes milliseconds, in the engine's own loop.
@lru_cache(maxsize=1024)
def _kept(text: str, tokenizer: Any) -> Policy:
    return policy_from_request(json.loads(text), tokenizer)


def sample_of(params: Any, policy: Policy, *, child: bool = False) -> int:
    """Which of the n samples of its prompt a request is, for a ladder; else 0.

    child: a request that vLLM made of one for n samples, whose number is known whatever the policy.

    Raises InputError: a ladder whose request is neither n samples nor one of them by number.
    """
    given, n = extra_of(params).get(SAMPLE), policy.samples
    if n is None:
        if given is not None and not child:
            raise InputError(f"{SAMPLE} is for a ladder; {policy} has one temperature for all")
        return 0
    if given is None:
        if params.n != n:
            raise InputError(
                f"{policy} has a temperature for each of {n} samples; send n={n}, or n=1 with "
                f"{SAMPLE} from 0 to {n - 1}"
            )
        return 0
    if params.n != 1:
        raise InputError(f"{SAMPLE} says which sample one request is; send n=1 with it")
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < n:
        raise InputError(f"{SAMPLE} is a whole number from 0 to {n - 1}, got {given!r:.40}")
    return given
