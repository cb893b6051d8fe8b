"""Google's Gemini interface."""

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


class Gemini:
    """A client of Gemini."""

    provider = spec = "gemini"
    has_attention = False

    def __init__(self) -> None:
        self.key = key_of("gemini")

    @asynccontextmanager
    async def open(self, timeout: float) -> AsyncIterator[Session]:
        """Connect, with the SDK's own retries off."""
        try:
            from google import genai
        except ImportError:
            raise MissingExtraError("google-genai", "agents") from None
        once = genai.types.HttpRetryOptions(attempts=1)
        options = genai.types.HttpOptions(timeout=int(timeout * 1000), retry_options=once)
        sdk = genai.Client(api_key=self.key, http_options=options)
        try:
            yield _Session(sdk, genai.types)
        finally:
            await sdk.aio.aclose()
            sdk.close()


class _Session:
    def __init__(self, sdk: Any, types: Any) -> None:
        self.sdk = sdk
        self.types = types

    async def send(self, call: Call, sent: Sent, model: str, seed: bool, name: str) -> Completion:
        config = self.types.GenerateContentConfig(
            max_output_tokens=call.tokens,
            temperature=sent.temperature,
            top_p=sent.top_p,
            seed=call.seed if seed else None,
            system_instruction=call.system,
            stop_sequences=None if call.stop is None else [call.stop],
            http_options=self.types.HttpOptions(headers={"Idempotency-Key": name}),
            **sent.extra,
        )
        reply = await self.sdk.aio.models.generate_content(
            model=model, contents=call.prompt, config=config
        )
        try:
            candidate, usage = reply.candidates[0], reply.usage_metadata
            parts = (candidate.content.parts if candidate.content else None) or []
            text = "".join(part.text for part in parts if part.text and not part.thought)
            # Thinking is paid for as output and counted beside it.
            out = (usage.candidates_token_count or 0) + (usage.thoughts_token_count or 0)
            finish = None if candidate.finish_reason is None else candidate.finish_reason.value
            return Completion(text, usage.prompt_token_count or 0, out, finish)
        except (AttributeError, TypeError, IndexError) as error:
            raise MalformedError(f"no candidates or no usage in the reply ({error})") from None
