"""Replies that were paid for, which are read as far as they can be."""

from __future__ import annotations

from typing import Any, NamedTuple

from tempering.engines.providers import reasons
from tempering.engines.providers.bodies import first, load, text_of_bytes
from tempering.engines.providers.transport import HTTPResponse, HTTPStatusError


class Completion(NamedTuple):
    """The content of a provider's reply.

    tokens_in, tokens_out: None where the reply doesn't say. refused: why there is no text, or only
    a part of one, in the provider's words; None for a whole reply.
    """

    text: str
    tokens_in: int | None
    tokens_out: int | None
    finish: str | None
    refused: str | None = None


class MalformedError(Exception):
    """A complete reply with status 200 has no content. again: whether to try again."""

    def __init__(self, reason: str, again: bool = True) -> None:
        super().__init__(reason)
        self.again = again


def opened(response: HTTPResponse) -> dict[str, Any]:
    """The JSON object in a complete reply.

    Raises HTTPStatusError for a web page, MalformedError for a body that is no JSON object.
    """
    if reasons.is_page(response.content):
        raise HTTPStatusError(response)
    try:
        payload = load(response.content)
    except ValueError:
        said = reasons.plain(text_of_bytes(response.content))
        raise MalformedError(f"no JSON: {said}" if said else "it is empty") from None
    if not isinstance(payload, dict) and not first(payload):
        raise MalformedError(f"no JSON object: {reasons.reason_of(response.content)}")
    return first(payload)
