"""Swapping the profile of a server from outside, over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from tempering.attention.profile import Profile
from tempering.errors import InputError, RefusedError

PATH = "/v1/tempering/profile"


def active_profile(url: str, key: str | None = None) -> str:
    """The digest of the profile that a server uses ("untempered" for none)."""
    return str(_asked(url, key, None)["active"])


def swap_remote(url: str, profile: Profile | None, key: str | None = None) -> str:
    """Give a running server another profile, or none.

    Returns when the requests that were in flight are finished and every worker has the profile.

    Parameters
    ----------
    url: of the server, e.g. "http://localhost:8000". key: its --api-key, if any.

    Raises
    ------
    InputError: the profile is for another model, or the url is none. RefusedError: the server
    can't be reached or has no tempering; says which.
    """
    data = None if profile is None else profile.to_json()
    return str(_asked(url, key, json.dumps({"profile": data}).encode())["active"])


def _asked(url: str, key: str | None, body: bytes | None) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise InputError(f"a server's url begins with http:// or https://, got {url!r}")
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(base + PATH, body, headers)
    try:
        # No limit of time: a swap waits for the requests in flight.
        with urllib.request.urlopen(request) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        raise _told(error, base) from error
    except (urllib.error.URLError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise RefusedError(
            f"no server answers at {base} ({reason}); a swap that was cut off has changed all "
            "workers or none, ask again which profile is in use"
        ) from error
    except ValueError as error:
        raise RefusedError(f"{base} answers, but not as a tempering server: {error}") from error


def _told(error: urllib.error.HTTPError, base: str) -> Exception:
    try:
        message = json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError):
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
