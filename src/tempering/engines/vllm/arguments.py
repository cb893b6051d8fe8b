"""The arguments of a request to vLLM that are tempering's, and the policy that they ask for.

They come in `SamplingParams.extra_args`, which is `vllm_xargs` over HTTP.
"""

from __future__ import annotations

import copy
import difflib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from tempering.engines.vllm import templates
from tempering.errors import InputError
from tempering.tokens.policy import Policy
from tempering.tokens.request import POLICY_KEYS, Asked, asked_of
from tempering.tokens.settings import SETTINGS, TRUNCATIONS, RequestSettings, settings_of
from tempering.tokens.token_state import NOTHING_GIVEN

SAMPLE, PROFILE, ROOM = "tempering_sample", "tempering_profile", "tempering_room"
TRACE = "tempering_trace"
KEYS = (*POLICY_KEYS, SAMPLE, PROFILE, ROOM, TRACE)
# Strengths of a profile. beta ** room of a float32 beta is off by |room| roundings.
_MOST_ROOM = 10
# The extra argument that carries the request's own settings to the processes that sample, where
# they are the policy's to carry out. It is no argument of users: one that a request sends is
# dropped.
_TAKEN = "_own_sampling"
# How our arguments begin, and no argument of vLLM's or of another plugin does: an unknown argument
# that begins so is taken for a misspelt one of ours.
_OURS = (
    *("tempering", "temperature", "dynatemp", "post_think", "dyna_temp"),
    *(f"{name}_" for name in TRUNCATIONS),
)
_CLOSE = 0.8  # difflib's ratio: about one letter in five may differ
# Longer keys aren't compared: our longest has 20 letters, and difflib's time grows with the square.
_LONGEST = 32


def extra_of(params: Any) -> Mapping[str, Any]:
    """The request's extra arguments that are tempering's own."""
    extra = getattr(params, "extra_args", None)
    if not extra:
        return {}
    ours = {key: value for key, value in extra.items() if key in KEYS}
    for key in extra:
        if key not in KEYS:
            _refuse_misspelt(str(key))
    return ours


def _refuse_misspelt(key: str) -> None:
    """InputError for an argument that looks like one of ours: ignored, it would temper nothing."""
    plain = key.strip().lower().replace("-", "_").replace(" ", "_")
    close = difflib.get_close_matches(plain, KEYS, 1, _CLOSE) if len(plain) <= _LONGEST else []
    if plain in SETTINGS:
        raise InputError(
            f"send {plain} beside vllm_xargs (extra_args), among vLLM's own parameters"
        )
    if not close and not plain.startswith(_OURS):
        return
    hint = f"did you mean {close[0]}? " if close else ""
    raise InputError(f"there is no argument {key!r:.60}; {hint}tempering takes {', '.join(KEYS)}")


def asks_policy(params: Any) -> bool:
    """Whether the request asks for a policy. One that asks for a trace has one, its own T."""
    extra = getattr(params, "extra_args", None) or {}
    return any(key in extra for key in POLICY_KEYS) or asks_trace(params)


def asks_trace(params: Any) -> bool:
    """Whether the request asks what its tokens are drawn from; InputError: not true or false."""
    return trace_asked(getattr(params, "extra_args", None) or {})


def trace_asked(extra: Mapping[str, Any]) -> bool:
    """`asks_trace`, of a request's extra arguments."""
    value = extra.get(TRACE)
    # Over HTTP vLLM makes numbers of true and false.
    if value is not None and value not in (False, True):
        raise InputError(f"{TRACE} is true or false, got {value!r:.40}")
    return bool(value)


def without_taken(params: Any) -> Any:
    """The parameters of a request as its client sent them."""
    extra = getattr(params, "extra_args", None) or {}
    if _TAKEN not in extra:
        return params
    params = copy.copy(params)
    params.extra_args = {key: value for key, value in extra.items() if key != _TAKEN}
    return params


def with_taken(params: Any, tokenizer: Any) -> Any:
    """Parameters whose truncation is off where the request's policy takes it over."""
    asked = asked_by(params, tokenizer)
    if asked is None or not asked.policy.truncates:
        return params
    own = _own(params)
    params = copy.copy(params)
    params.extra_args = {**params.extra_args, _TAKEN: own.active()}
    for name, value in vars(NOTHING_GIVEN).items():
        if name != "temperature":  # by which vLLM divides; that is undone
            setattr(params, name, value)
    return params


def _own(params: Any) -> RequestSettings:
    """The request's own settings."""
    taken = (getattr(params, "extra_args", None) or {}).get(_TAKEN)
    if taken is not None:
        return settings_of(taken)
    return settings_of({name: getattr(params, name) for name in SETTINGS})


def asked_by(params: Any, tokenizer: Any) -> Asked | None:
    """The policy of a request and what it takes over; None when it asks for none.

    `tempering` is a policy's text. The names that users of other engines know
    (`policy_from_request`) take the request's own settings as theirs; `post_thinking` is JSON
    text there, because `vllm_xargs` holds no mappings.

    Raises
    ------
    InputError: a policy that doesn't parse, a setting given twice, or temperature 0.
    """
    request = {key: value for key, value in extra_of(params).items() if key in POLICY_KEYS}
    traced = asks_trace(params)
    if not request and not traced:
        return None
    tokenizer = templates.tokenizer_of(params, tokenizer)
    temperature = float(params.temperature)
    if temperature == 0 and not request:
        raise InputError(
            "temperature=0 makes vLLM take the likeliest token, which no policy and no trace sees; "
            'for its trace send "tempering": "constant(0)" with temperature=1'
        )
    if temperature == 0:
        raise InputError(
            "temperature=0 makes vLLM take the likeliest token and forget top_p and top_k, "
            "whatever a policy says; send temperature=1, with T = 0 in the policy where it is "
            'meant: "tempering": "phases(thinking=1, answer=0)"'
        )
    return _made(request, _own(params), tokenizer, traced)


def _made(request: Mapping[str, Any], own: RequestSettings, tokenizer: Any, traced: bool) -> Asked:
    """What these arguments ask for; requests with the same arguments share one policy."""

    def made() -> Asked:
        where = "the request (or its model's generation_config)"
        asked = asked_of(request, own, tokenizer, where)
        # Traced, the policy truncates as vLLM would, so that the trace has what is drawn from.
        return asked.truncating(own) if traced else asked

    try:
        text = json.dumps([request, own.active(), traced], sort_keys=True)
    except (TypeError, ValueError, RecursionError):  # not JSON: the call names the key and refuses
        return made()
    key = (text, id(tokenizer))
    asked = _CACHE.get(key)
    if asked is None:
        asked = made()
        _CACHE.add(key, asked, tokenizer, len(text))
    return asked


class _PolicyCache:
    """The policies of recent requests, by their arguments and tokenizer, within a limit of bytes.

    Without the cache the engine's own loop would read the tokenizer's chat template for the phases
    of every request, which takes milliseconds.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.bytes = 0
        self._policies: OrderedDict[tuple[str, int], tuple[Asked, Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int]) -> Asked | None:
        with self._lock:
            if key not in self._policies:
                return None
            self._policies.move_to_end(key)
            return self._policies[key][0]

    def add(self, key: tuple[str, int], asked: Asked, tokenizer: Any, length: int) -> None:
        """Keep a policy, and drop those longest unused until all fit.

        The tokenizer is kept beside it, so that no other object gets its id.
        """
        size = asked.policy.most_bytes + 200 * length  # the objects: up to 120 bytes a character
        with self._lock:
            if key in self._policies or size > self.most:
                return
            self._policies[key] = asked, tokenizer, size
            self.bytes += size
            while self.bytes > self.most:
                _, (_, _, freed) = self._policies.popitem(last=False)
                self.bytes -= freed


_CACHE = _PolicyCache(32 * 2**20)  # 32 MB, beside the gigabytes of an engine


def profile_of(params: Any) -> tuple[str | None, float]:
    """(name of a request's attention profile, its room): T ** room acts; (None, 1) without one.

    Raises InputError: a room without a profile, or one that is no number from -10 to 10.
    """
    extra = getattr(params, "extra_args", None) or {}
    name, room = extra.get(PROFILE), extra.get(ROOM)
    if room is None:
        return name, 1.0
    if name is None:
        raise InputError(f"{ROOM} is the strength of a named profile; send {PROFILE} with it")
    number = isinstance(room, int | float) and not isinstance(room, bool)
    if not number or not -_MOST_ROOM <= room <= _MOST_ROOM:
        raise InputError(
            f"{ROOM} is a number from {-_MOST_ROOM} to {_MOST_ROOM}: 0 is the untempered model, 1 "
            f"the profile, between them T ** room; got {room!r:.40}"
        )
    return name, float(room)


def sample_of(params: Any, policy: Policy, *, child: bool = False) -> int:
    """Which of the n samples of its prompt a request is, for a ladder; else 0.

    child: whether vLLM made this request out of one for n samples. Such a request has a number
        under every policy, so without a ladder the number is ignored, not refused.

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
