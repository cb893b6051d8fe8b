"""Anthropic's Messages interface."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tempering.agents.contract import Call
from tempering.agents.temperatures import Sent
from tempering.engines.providers.keys import key_of
from tempering.engines.providers.remote import Completion, Session
from tempering.engines.providers.retry import MalformedError
from tempering.errors import MissingExtraError


class Anthropic:
    """A client of Anthropic."""

    provider = spec = "anthropic"
    has_attention = False

    def __init__(self) -> None:
        self.key = key_of("anthropic")

    @asynccontextmanager
    async def open(self, timeout: float) -> AsyncIterator[Session]:
        """Connect, with the SDK's own retries off."""
        try:
            from anthropic import AsyncAnthropic
        except ImportError:
            raise MissingExtraError("anthropic", "agents") from None
        async with AsyncAnthropic(api_key=self.key, max_retries=0, timeout=timeout) as sdk:
            yield _Session(sdk)


class _Session:
    def __init__(self, sdk: Any) -> None:
        self.sdk = sdk

    async def send(self, call: Call, sent: Sent, model: str, seed: bool, name: str) -> Completion:
        # Releases from 1.0 on have no argument for what older models still take.
        body: dict[str, Any] = dict(sent.extra)
        if sent.temperature is not None:
            body["temperature"] = sent.temperature
        if sent.top_p is not None:
            body["top_p"] = sent.top_p
        options: dict[str, Any] = {} if call.system is None else {"system": call.system}
        if call.stop is not None and call.stop.strip():  # a blank one is refused there
            options["stop_sequences"] = [call.stop]
        reply = await self.sdk.messages.create(
            model=model,
            max_tokens=call.tokens,
            messages=[{"role": "user", "content": call.prompt}],
            extra_body=body,
            extra_headers={"Idempotency-Key": name},
            **options,
        )
        try:
            text = "".join(block.text for block in reply.content if block.type == "text")
            usage = reply.usage
            return Completion(text, usage.input_tokens, usage.output_tokens, reply.stop_reason)
        except (AttributeError, TypeError) as error:
            raise MalformedError(f"no content or no usage in the reply ({error})") from None
