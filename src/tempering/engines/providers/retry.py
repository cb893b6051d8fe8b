"""When to try again and how long to wait: exponential backoff with jitter, Retry-After honoured."""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from dataclasses import dataclass
from typing import Any, NamedTuple


class MalformedError(Exception):
    """A reply that came whole but is not what the interface promises."""


class Failure(NamedTuple):
    """Why a call failed. retry: whether trying again may help. after: seconds the server asks."""

    reason: str
    retry: bool
    after: float | None


@dataclass(frozen=True)
class Backoff:
    """Waits of first * 2^(attempt - 1) seconds, at most `most`, each times a factor in [0.5, 1].

    retries: tries after the first, at most. patience: longest Retry-After that is waited for.
    """

    retries: int = 5
    first: float = 0.5
    most: float = 30.0
    patience: float = 120.0

    def wait(self, attempt: int, failure: Failure, rng: random.Random) -> float | None:
        """Seconds until the next try after `attempt` tries; None to give up."""
        if not failure.retry or attempt > self.retries:
            return None
        if failure.after is not None and failure.after > self.patience:
            return None
        own = min(self.most, self.first * 2 ** min(attempt - 1, 30)) * rng.uniform(0.5, 1.0)
        return max(own, failure.after or 0.0)


# Of the SDKs and of the HTTP libraries under them, which share no base class.
_TRANSIENT = (
    "APIConnectionError",
    "APITimeoutError",
    "APIResponseValidationError",
    "UnknownApiResponseError",
    "TransportError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ValidationError",
)


def classify(error: Exception) -> Failure:
    """What an exception of an SDK means: by its status, else by its kind."""
    status = _status(error)
    if status is not None:
        retry = status in (408, 409, 429) or status >= 500
        return Failure(f"HTTP {status}: {_words(error)}", retry, retry_after(error))
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return Failure("timed out", True, None)
    if isinstance(error, MalformedError | json.JSONDecodeError | UnicodeDecodeError):
        return Failure(f"malformed reply: {_words(error)}", True, None)
    names = {base.__name__ for base in type(error).__mro__}
    if isinstance(error, OSError) or names.intersection(_TRANSIENT):
        return Failure(f"{type(error).__name__}: {_words(error)}", True, None)
    return Failure(f"{type(error).__name__}: {_words(error)}", False, None)


def retry_after(error: Exception) -> float | None:
    """Seconds that the server's reply asks to wait, from a number or a date."""
    headers: Any = getattr(getattr(error, "response", None), "headers", None)
    if headers is None:
        return None
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / unit
        except ValueError:
            parsed = email.utils.parsedate_tz(value)
            if parsed is None:
                continue
            seconds = email.utils.mktime_tz(parsed) - time.time()
        if seconds == seconds and seconds >= 0:
            return seconds
    return None


def _status(error: Exception) -> int | None:
    for name in ("status_code", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return None


def _words(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
