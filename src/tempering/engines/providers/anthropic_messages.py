"""Anthropic's Messages interface."""

from __future__ import annotations

import json
from typing import Any

from tempering.agents.contract import Call
from tempering.agents.temperatures import Sent
from tempering.engines.providers import reasons
from tempering.engines.providers.addresses import address_of
from tempering.engines.providers.bodies import count, mapping, text_of, word
from tempering.engines.providers.keys import key_of
from tempering.engines.providers.replies import Completion, MalformedError, opened
from tempering.engines.providers.transport import HTTPResponse, HTTPStatusError

# The last version that takes temperatures: version 2026-10-21 answers 400 to every temperature
# (https://codersera.com/blog/anthropic-api-2026-10-21-sdk-migration-guide-2026/, 2026-11-29).
VERSION = "2023-06-01"


class Anthropic:
    """A client of Anthropic."""

    provider = spec = "anthropic"
    has_attention = False
    has_policies = False

    def __init__(self) -> None:
        self.address = address_of("ANTHROPIC_BASE_URL", "https://api.anthropic.com")
        self.key = key_of("anthropic")

    def url(self, model: str) -> str:
        """The address of calls."""
        return f"{self.address.removesuffix('/v1')}/v1/messages"

    def headers(self) -> dict[str, str]:
        """The key, and the version of the interface."""
        return {"x-api-key": self.key or "", "anthropic-version": VERSION}

    def body(self, call: Call, sent: Sent, model: str, seed: bool) -> dict[str, Any]:
        """The request."""
        turns = [{"role": "user", "content": call.prompt}]
        body: dict[str, Any] = {"model": model, "messages": turns, "max_tokens": call.tokens}
        body |= sent.extra
        if sent.temperature is not None:
            body["temperature"] = sent.temperature
        if sent.top_p is not None:
            body["top_p"] = sent.top_p
        if call.system is not None:
            body["system"] = call.system
        if call.stop is not None and call.stop.strip():  # a blank one is refused
            body["stop_sequences"] = [call.stop]
        return body

    def amend(self, body: dict[str, Any], reason: str) -> bool:
        """False: every request has one form only."""
        return False

    def read(self, response: HTTPResponse) -> Completion:
        """The content of a reply, of which any part may be missing."""
        payload = opened(response)
        text = text_of(payload.get("content"))
        usage = mapping(payload.get("usage"))
        read, written = count(usage.get("input_tokens")), count(usage.get("output_tokens"))
        refused = None
        if not text and payload.get("error"):
            if read is None and written is None:
                raise HTTPStatusError(response)
            refused = reasons.reason_of(json.dumps({"error": payload["error"]}).encode())
        elif not text and "content" not in payload:
            said = f"no content in the reply: {reasons.reason_of(response.content)}"
            if read is None and written is None:
                raise MalformedError(said)
            refused = said
        return Completion(text, read, written, word(payload.get("stop_reason")), refused)
