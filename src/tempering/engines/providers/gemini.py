"""Google's Gemini interface."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from tempering.agents.contract import Call
from tempering.agents.temperatures import Sent
from tempering.engines.providers import reasons
from tempering.engines.providers.addresses import address_of
from tempering.engines.providers.bodies import count, first, mapping, text_of, word
from tempering.engines.providers.keys import key_of
from tempering.engines.providers.replies import Completion, MalformedError, opened
from tempering.engines.providers.transport import HTTPResponse, HTTPStatusError


class Gemini:
    """A client of Gemini."""

    provider = spec = "gemini"
    has_attention = False
    has_policies = False

    def __init__(self) -> None:
        default = "https://generativelanguage.googleapis.com"
        self.address = address_of("GOOGLE_GEMINI_BASE_URL", default)
        self.key = key_of("gemini")

    def url(self, model: str) -> str:
        """The address of calls; a model's name without a folder is in `models/`."""
        name = quote(model if "/" in model else f"models/{model}", safe="/")
        versioned = self.address.endswith(("/v1", "/v1beta"))
        return f"{self.address}{'' if versioned else '/v1'}/{name}:generateContent"

    def headers(self) -> dict[str, str]:
        """The key."""
        return {"x-goog-api-key": self.key or ""}

    def body(self, call: Call, sent: Sent, model: str, seed: bool) -> dict[str, Any]:
        """The request."""
        config = {
            "maxOutputTokens": call.tokens,
            "temperature": sent.temperature,
            "topP": sent.top_p,
            "seed": call.seed if seed else None,
            "stopSequences": [call.stop] if call.stop is not None else None,
            **sent.extra,
        }
        config = {name: value for name, value in config.items() if value is not None}
        turns = [{"role": "user", "parts": [{"text": call.prompt}]}]
        body: dict[str, Any] = {"contents": turns, "generationConfig": config}
        if call.system is not None:
            body["systemInstruction"] = {"role": "user", "parts": [{"text": call.system}]}
        return body

    def amend(self, body: dict[str, Any], reason: str) -> bool:
        """False: every request has one form only."""
        return False

    def read(self, response: HTTPResponse) -> Completion:
        """The content of a reply, of which any part may be missing."""
        payload = opened(response)
        candidate = first(payload.get("candidates"))
        text = text_of(mapping(candidate.get("content")).get("parts"))
        usage = mapping(payload.get("usageMetadata"))
        read = count(usage.get("promptTokenCount"))
        # Thinking is paid for as output, and Gemini counts it in a field of its own.
        parts = [count(usage.get(n)) for n in ("candidatesTokenCount", "thoughtsTokenCount")]
        written = None if parts == [None, None] else sum(n or 0 for n in parts)
        finish = word(candidate.get("finishReason"))
        feedback = mapping(payload.get("promptFeedback"))
        blocked = word(feedback.get("blockReason"))
        if blocked is not None or (not text and not candidate and read is not None):
            written = written or 0  # nothing was written
        refused = None
        if not text and payload.get("error"):
            if read is None and written is None:
                raise HTTPStatusError(response)
            refused = reasons.reason_of(json.dumps({"error": payload["error"]}).encode())
        elif not text and blocked is not None:
            more = feedback.get("blockReasonMessage")
            refused, finish = f"the prompt was blocked: {blocked}", finish or f"blocked: {blocked}"
            refused += f" ({more})" if isinstance(more, str) and more else ""
        elif not text and isinstance(candidate.get("finishMessage"), str):
            refused = candidate["finishMessage"]
        elif not text and "candidates" not in payload and read is None:
            raise MalformedError(
                f"no candidates in the reply: {reasons.reason_of(response.content)}"
            )
        elif not text and not candidate:
            refused = "the reply has no candidates"
        return Completion(text, read, written, finish, refused)
