"""When to try again and how long to wait: exponential backoff with jitter, Retry-After honoured."""

from __future__ import annotations

import email.utils
import math
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tempering.engines.providers import reasons
from tempering.engines.providers.bodies import load, mapping
from tempering.engines.providers.keys import redacted
from tempering.engines.providers.replies import MalformedError
from tempering.engines.providers.transport import HTTPResponse, NoAnswerError


class Failure(NamedTuple):
    """Why a call failed. retry: whether to try again. after: seconds the server asks to wait."""

    reason: str
    retry: bool
    after: float | None


@dataclass(frozen=True)
class Backoff:
    """Waits of first * 2^(attempt - 1) seconds, at most `most`, each times a factor in [0.5, 1].

    retries: tries after the first, at most. patience: the longest wait in seconds that is granted
    when a server asks for one.
    """

    retries: int = 5
    first: float = 0.5
    most: float = 30.0
    patience: float = 120.0

    def wait(self, attempt: int, failure: Failure, rng: random.Random) -> float | None:
        """Seconds until the next try after `attempt` tries; None to give up."""
        if not failure.retry or attempt > self.retries or self.too_long(failure):
            return None
        own = min(self.most, self.first * 2 ** min(attempt - 1, 30)) * rng.uniform(0.5, 1.0)
        return max(own, failure.after or 0.0)

    def too_long(self, failure: Failure) -> bool:
        """Whether the server asks for a longer wait than `patience`."""
        return failure.after is not None and failure.after > self.patience


# Kinds of errors that waiting doesn't mend: of OpenAI, of Anthropic, and Gemini's daily quotas.
_FOR_GOOD = re.compile(
    r"insufficient_quota|exceeded_current_quota_error|billing_(?:not_active|hard_limit_reached|error)|access_terminated"
    r"|.*PerDay.*",
    re.IGNORECASE,
)
# The same in words, from servers whose kinds are numbers.
_SPENT = re.compile(
    r"insufficient (?:\w+ )?(?:quota|balance|credits?|funds)|out of credits"
    r"|account (?:\w+ )?(?:is |in )?(?:suspended|arrears|deactivated|disabled)",
    re.IGNORECASE,
)
# Kinds of errors, inside a reply with status 200, after which a try may succeed.
_PASSING = re.compile(
    r"overloaded(?:_error)?|rate_limit\w*|server_error|internal\w*|unavailable|api_error"
    r"|resource_exhausted|deadline_exceeded|timeout\w*|too_many_requests",
    re.IGNORECASE,
)


def classify(error: Exception) -> Failure:
    """The failure behind an exception: by the server's response, or by the exception's type.

    The reason is one line without a key, cut when it is long.
    """
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(status, int):
        headers = {str(name).lower(): str(v) for name, v in dict(response.headers).items()}
        url = response.url if isinstance(response, HTTPResponse) else ""
        return refusal(status, headers, bytes(response.content), url)
    if isinstance(error, MalformedError):
        return Failure(_line(f"malformed reply: {error}"), error.again, None)
    if isinstance(error, NoAnswerError):
        return Failure(_line(str(error)), error.again, None)
    if isinstance(error, TimeoutError):
        return Failure("timed out", True, None)
    said = str(error) or type(error).__name__
    return Failure(_line(f"{type(error).__name__}: {said}"), isinstance(error, OSError), None)


def refusal(status: int, headers: Mapping[str, str], data: bytes, url: str) -> Failure:
    """The failure that a response reports; with status 200, an error inside a complete reply."""
    said = reasons.reason_of(data) or reasons.phrase(status)
    codes = reasons.codes_of(data)
    after = wait_asked(headers, data)
    inner = _inner_status(data)
    if status == 200:
        retry = any(_PASSING.fullmatch(code) for code in codes)
        retry = _passes(inner) if inner is not None else retry
        start = "an error inside HTTP 200"
    else:
        retry = _passes(status)
        start = f"HTTP {status}"
    told = headers.get("x-should-retry")
    retry = told == "true" if told in ("true", "false") else retry
    if any(_FOR_GOOD.fullmatch(code) for code in codes) or _SPENT.search(said) or inner == 402:
        retry = False
    if status in (301, 302, 303, 307, 308) and "location" in headers:
        said += f"; it moved to {reasons.plain(headers['location'])}: give that address"
    reason = _line(f"{start}: {said}") + _line(reasons.advice(status, data, url))
    return Failure(reason, retry, after)


def wait_asked(headers: Mapping[str, str], data: bytes = b"") -> float | None:
    """Seconds that a server asks to wait, in a header (a number or a date) or in its body."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if not value:
            continue
        seconds = _seconds(value)
        if seconds is not None:
            return seconds / unit
        date = email.utils.parsedate_tz(value)
        if date is not None and (left := email.utils.mktime_tz(date) - time.time()) >= 0:
            return left
    try:
        body = load(data)
    except ValueError:
        body = None
    if (stated := _stated(body)) is not None:
        return stated
    said = re.search(
        r"(?:(?:retry|try again)(?: your request)? (?:in|after)|wait(?: for)?)"
        r" ((?:[\d.]+ ?(?:ms|d|h|m|s)[a-z]* ?)+)",
        reasons.reason_of(data),
        re.IGNORECASE,
    )
    return _seconds(said[1]) if said else None


_STATED = {"retrydelay": 1.0, "retryafter": 1.0, "retryafterseconds": 1.0, "retryafterms": 1000.0}


def _stated(value: Any, depth: int = 0) -> float | None:
    """Seconds in a field such as Gemini's retryDelay or a gateway's retry_after, of a JSON body."""
    if depth > 8:
        return None
    if isinstance(value, dict):
        for name, item in value.items():
            unit = _STATED.get(re.sub(r"[_-]", "", name).lower())
            if unit is not None and (seconds := _duration(item)) is not None:
                return seconds / unit
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = (_stated(item, depth + 1) for item in items)
    return next((seconds for seconds in found if seconds is not None), None)


def _duration(value: Any) -> float | None:
    """A number, "20s", or {"seconds": 20, "nanos": 0}, in seconds."""
    if isinstance(value, dict):
        whole, part = (_duration(value.get(name, 0)) for name in ("seconds", "nanos"))
        return None if whole is None or part is None else whole + part * 1e-9
    return None if isinstance(value, bool) else _seconds(str(value))


_UNITS = {"ms": 0.001, "d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


def _seconds(text: str) -> float | None:
    """ "6", "6s", "1m30.5s", "20ms" in seconds; None for a text that is no duration."""
    text = text.strip().rstrip(".").lower()
    try:
        found = float(text)
    except ValueError:
        parts = re.findall(r"([\d.]+) ?(ms|d|h|m|s)[a-z]*", text)
        if not parts or not re.fullmatch(r"(?:[\d.]+ ?(?:ms|d|h|m|s)[a-z]* ?)+", text):
            return None
        try:
            found = sum(float(number) * _UNITS[unit] for number, unit in parts)
        except ValueError:
            return None
    return found if math.isfinite(found) and found >= 0 else None


def _passes(status: int) -> bool:
    """Whether another try may succeed after this status; after 501 and 505 none does."""
    return status in (408, 409, 425, 429) or (status >= 500 and status not in (501, 505))


def _inner_status(data: bytes) -> int | None:
    """The HTTP status that an error in a body states, or None."""
    try:
        body = load(data)
    except ValueError:
        return None
    item = body[0] if isinstance(body, list) and body else body
    code = mapping(mapping(item).get("error")).get("code", mapping(item).get("code"))
    if isinstance(code, str) and code.isascii() and code.isdigit():
        code = int(code[:4])
    return code if isinstance(code, int) and 400 <= code < 600 else None


def _line(text: str) -> str:
    """One line without a key, then cut to length."""
    return reasons.cut(redacted(reasons.plain(text)))
