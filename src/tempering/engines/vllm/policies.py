"""The policy that a request to vLLM asks for through `extra_args` (`vllm_xargs` over HTTP)."""

from __future__ import annotations

import difflib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
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
# Words that no argument of vLLM's or of another plugin begins with, but a misspelt one of ours may.
_OURS = ("tempering", "temperature", "dynatemp", "post_think", "dyna_temp")
_CLOSE = 0.8  # of difflib: one letter in five may be another
_LONGEST = 32  # letters of a name that may be a misspelt one of ours


def extra_of(params: Any) -> Mapping[str, Any]:
    """The request's extra arguments that are tempering's own."""
    extra = getattr(params, "extra_args", None)
    if not extra:
        return {}
    own = {key: value for key, value in extra.items() if key in KEYS}
    for key in extra:
        if key not in KEYS:
            _refuse_misspelt(str(key))
    return own


def _refuse_misspelt(key: str) -> None:
    """InputError for an argument that looks like one of ours: ignored, it would temper nothing."""
    plain = key.strip().lower().replace("-", "_").replace(" ", "_")
    close = difflib.get_close_matches(plain, KEYS, 1, _CLOSE) if len(plain) <= _LONGEST else []
    if not close and not plain.startswith(_OURS):
        return
    if plain == "temperature":
        raise InputError(
            "temperature stands beside vllm_xargs (extra_args), among vLLM's own parameters"
        )
    hint = f"did you mean {close[0]}? " if close else ""
    raise InputError(f"there is no argument {key!r:.60}; {hint}tempering takes {', '.join(KEYS)}")


def asks_policy(params: Any) -> bool:
    """Whether the request asks for a policy."""
    extra = getattr(params, "extra_args", None) or {}
    return any(key in extra for key in _POLICY)


def policy_of(params: Any, tokenizer: Any) -> Policy | None:
    """The policy of a request; None when it asks for none.

    `tempering` is a policy's text. The names that users of other engines know
    (`policy_from_request`) take the request's own temperature as theirs; `post_thinking` is JSON
    text there, because `vllm_xargs` holds no mappings.

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
    return _made({**request, "temperature": temperature}, tokenizer)


def _made(request: Mapping[str, Any], tokenizer: Any) -> Policy:
    """The policy of these arguments; one object for all requests that ask for the same."""
    try:
        text = json.dumps(request, sort_keys=True)
    except (TypeError, ValueError, RecursionError):  # what isn't JSON is refused by name
        return policy_from_request(request, tokenizer)
    key = (text, id(tokenizer))
    policy = _KEPT.get(key)
    if policy is None:
        policy = policy_from_request(request, tokenizer)
        _KEPT.add(key, policy, tokenizer, len(text))
    return policy


class _Kept:
    """The policies of recent requests, by their arguments and tokenizer; counts what they take.

    Reading a tokenizer's chat template for the phases takes milliseconds, in the engine's own loop.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.bytes = 0
        self._policies: OrderedDict[tuple[str, int], tuple[Policy, Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int]) -> Policy | None:
        with self._lock:
            if key not in self._policies:
                return None
            self._policies.move_to_end(key)
            return self._policies[key][0]

    def add(self, key: tuple[str, int], policy: Policy, tokenizer: Any, length: int) -> None:
        """Keep a policy, and drop those longest unused until all fit. The tokenizer is kept with
        it, so that no other can have its id."""
        size = policy.most_bytes + 200 * length  # the objects of a text: 120 bytes a character
        with self._lock:
            if key in self._policies or size > self.most:
                return
            self._policies[key] = policy, tokenizer, size
            self.bytes += size
            while self.bytes > self.most:
                _, (_, _, freed) = self._policies.popitem(last=False)
                self.bytes -= freed


_KEPT = _Kept(32 * 2**20)


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
