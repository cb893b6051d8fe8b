"""Addresses of servers: checked before anything is sent; errors suggest what was meant."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from tempering.errors import InputError


def address_of(name: str, default: str) -> str:
    """The address in an environment variable such as OPENAI_BASE_URL, or the provider's own."""
    given = os.environ.get(name, "").strip()
    return checked(given, f"the address in {name}") if given else default


def checked(url: str, what: str = "the engine") -> str:
    """`url` without a slash at its end; InputError where it is no address, or may hold a key."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise InputError(f"{what}'s address can't be read: {error}") from None
    if "@" in url or parts.query or parts.fragment:
        raise InputError(
            f"{what}: an address holds no user, password or query; put the key into the "
            "environment variable TEMPERING_SERVER_KEY"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        meant = re.sub(r"^(https?)(:/?|/+)(?=[^:/])", r"\1://", url)
        if meant == url:
            meant = f"http://{url}"
        likely = re.match(r"https?://(localhost|\[|[\w-]+(\.[\w-]+)+|[\w.-]+:\d+)", meant)
        kinds = "neither local, openai, anthropic, gemini nor" if what == "the engine" else "not"
        hint = f"; did you mean {meant}?" if likely else ""
        raise InputError(
            f"{what} {url!r} is {kinds} an address such as http://localhost:8000/v1{hint}"
        )
    if not re.fullmatch(r"[!-~]+", url):
        raise InputError(f"{what} {url!r} holds a character that no address has")
    url = url.rstrip("/")
    for ending in ("/chat/completions", "/completions", "/messages", "/models"):
        if url.endswith(ending):
            raise InputError(
                f"{what} {url} names one function of the server; give {url.removesuffix(ending)}"
            )
    return url
