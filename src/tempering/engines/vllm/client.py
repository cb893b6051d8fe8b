"""Swapping the profile of a server from outside, over HTTP."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException, InvalidURL
from typing import Any

from tempering.attention.profiles.profile import Profile
from tempering.errors import InputError, RefusedError, TemperingError

PATH = "/v1/tempering/profile"
LAYERS = "/v1/tempering/layers"


def active_profile(url: str, key: str | None = None) -> str:
    """The digest of the profile that a server uses ("untempered" for none)."""
    return _asked(url, key, None)


def swap_remote(url: str, profile: Profile | None, key: str | None = None) -> str:
    """Give a running server another profile, or none.

    Returns when the requests that were in flight are finished and every worker has the profile.

    Parameters
    ----------
    url: of the server, e.g. "http://localhost:8000". key: its --api-key, if any.

    Raises
    ------
    InputError: the profile is for another model, or the url or key can't be sent. RefusedError: the
    server can't be reached or has no tempering; says which.
    """
    data = None if profile is None else profile.to_json()
    return _asked(url, key, json.dumps({"profile": data}).encode())


def served_model(url: str, key: str | None = None) -> str:
    """The name of the model that a server runs; its named profiles are not told by servers."""
    with _opened(url, "/v1/models", key, None, _PATIENCE) as answer:
        text = answer.read()
    try:
        return str(json.loads(text)["data"][0]["id"])
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise RefusedError(f"{url} answers, but lists no model: {text[:60]!r}") from error


def streamed_events(url: str, key: str | None, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a server writes, event by event; closing the iterator ends it there.

    body: a request of the chat interface where it has `messages`, else of the plain one.

    Raises RefusedError or InputError in the server's words.
    """
    sent = json.dumps({**body, "stream": True}).encode()
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    with _opened(url, path, key, sent, _PATIENCE) as answer:
        try:
            for line in answer:
                data = line.strip().removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                if not line.startswith(b"data:"):
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise RefusedError(f"the server failed: {event['error']['message']}")
                yield event
            # A chunked answer that is cut off reads as one that has ended (http.client).
            raise ConnectionError("its answer ends without [DONE]")
        except (OSError, HTTPException, ValueError, TypeError, LookupError) as error:
            if isinstance(error, TemperingError):
                raise
            raise RefusedError(
                f"the server at {url} broke off: {type(error).__name__} {error}"
            ) from error


_PATIENCE = 300.0  # seconds without a word from a server, after which it is taken for gone


def _asked(url: str, key: str | None, body: bytes | None) -> str:
    base = url.rstrip("/").removesuffix("/v1")
    # No timeout: a swap waits for the requests in flight.
    with _opened(url, PATH, key, body, None) as answer:
        text = answer.read()
    try:
        return str(json.loads(text)["active"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RefusedError(
            f"{base} answers, but not as a tempering server: {text[:60]!r}"
        ) from error


@contextlib.contextmanager
def _opened(
    url: str, path: str, key: str | None, body: bytes | None, timeout: float | None
) -> Iterator[Any]:
    """The open answer of a server; what goes wrong before it is closed is in words."""
    if not url.startswith(("http://", "https://")):
        raise InputError(f"a server's url begins with http:// or https://, got {url!r}")
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Content-Type": "application/json"}
    if key is not None:
        if not (key.isascii() and key.isprintable()):
            raise InputError("the server's key has characters that an HTTP header can't carry")
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(base + path, body, headers)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        raise _told(error, base, path) from error
    except (InvalidURL, ValueError) as error:
        raise InputError(
            f"{url!r} is no url of a server ({error}); expected one such as http://localhost:8000"
        ) from error
    except (OSError, HTTPException) as error:
        if isinstance(error, TemperingError):
            raise
        reason = getattr(error, "reason", error)
        raise RefusedError(
            f"no server answers at {base} ({reason}); if the connection broke during a swap, "
            "all workers have changed or none has: ask which profile is in use"
        ) from error


def _told(error: urllib.error.HTTPError, base: str, path: str) -> Exception:
    try:
        message = str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError, HTTPException):
        message = ""
    if error.code == 400 and message:
        return InputError(message)
    if error.code == 409 and message:
        return RefusedError(message)
    if error.code == 404:
        return RefusedError(
            f"the server at {base} has no {path}; start it by `tempering serve`, or with "
            "'tempering' in VLLM_PLUGINS"
        )
    if error.code == 401:
        return RefusedError(f"the server at {base} wants its key; give --api-key")
    return RefusedError(f"the server at {base} failed: {error.code} {error.reason} {message}")
