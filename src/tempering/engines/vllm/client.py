"""Swapping the profile of a server from outside, over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException, InvalidURL

from tempering.attention.profiles.profile import Profile
from tempering.errors import InputError, RefusedError

PATH = "/v1/tempering/profile"


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


def _asked(url: str, key: str | None, body: bytes | None) -> str:
    if not url.startswith(("http://", "https://")):
        raise InputError(f"a server's url begins with http:// or https://, got {url!r}")
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Content-Type": "application/json"}
    if key is not None:
        if not (key.isascii() and key.isprintable()):
            raise InputError("the server's key has characters that an HTTP header can't carry")
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(base + PATH, body, headers)
        # No timeout: a swap waits for the requests in flight.
        with urllib.request.urlopen(request) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        raise _told(error, base) from error
    except (InvalidURL, ValueError) as error:
        raise InputError(
            f"{url!r} is no url of a server ({error}); expected one such as http://localhost:8000"
        ) from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise RefusedError(
            f"no server answers at {base} ({reason}); if the connection broke during a swap, "
            "all workers have changed or none has: ask which profile is in use"
        ) from error
    try:
        return str(json.loads(text)["active"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RefusedError(
            f"{base} answers, but not as a tempering server: {text[:60]!r}"
        ) from error


def _told(error: urllib.error.HTTPError, base: str) -> Exception:
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
            f"the server at {base} has no {PATH}; start it by `tempering serve`, or with "
            "'tempering' in VLLM_PLUGINS"
        )
    if error.code == 401:
        return RefusedError(f"the server at {base} wants its key; give --api-key")
    return RefusedError(f"the server at {base} failed: {error.code} {error.reason} {message}")
