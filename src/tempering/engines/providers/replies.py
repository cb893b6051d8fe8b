"""Reading replies that were paid for, whatever is missing in them or broken."""

from __future__ import annotations

from typing import Any, NamedTuple

from tempering.engines.providers import reasons
from tempering.engines.providers.bodies import first, load, text_of_bytes
from tempering.engines.providers.transport import HTTPResponse, HTTPStatusError


class Completion(NamedTuple):
    """A provider's answer, in plain values.

    tokens_in, tokens_out: None where the reply doesn't tell. refused: why it has no (whole) text,
    in the provider's words; None for a reply that is as it should be.
    """

    text: str
    tokens_in: int | None
    tokens_out: int | None
    finish: str | None
    refused: str | None = None


class MalformedError(Exception):
    """A whole reply with status 200 that holds no answer. again: asking anew may help."""

    def __init__(self, reason: str, again: bool = True) -> None:
        super().__init__(reason)
        self.again = again


def opened(response: HTTPResponse) -> dict[str, Any]:
    """The mapping in a whole reply.

    Raises HTTPStatusError for a web page, MalformedError for what is no JSON object.
    """
    if reasons.is_page(response.content):
        raise HTTPStatusError(response)
    try:
        payload = load(response.content)
    except ValueError:
        said = reasons.plain(text_of_bytes(response.content))
        raise MalformedError(f"no JSON: {said}" if said else "it is empty") from None
    if not isinstance(payload, dict) and not first(payload):
        raise MalformedError(f"no JSON object: {reasons.reason_of(answer.content)}")
    return first(payload)
